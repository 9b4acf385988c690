"""Training a champion on: continual."""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from flows.commands.common import Config, Json, Overrides, Text, read_settings
from gptcore.config import PipelineConfig

if TYPE_CHECKING:
    from tasks.continual import Continued

app = typer.Typer()


@app.command()
def continual(config: Config = None, text: Text = None, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train the champion on with what is new in the sources; promote it if it learned that and kept the old."""
    from flows.commands.running import run_flow
    from flows.terminal import Terminal, closing, forgetting_table

    settings = read_settings(config, text, overrides)
    started = time.monotonic()
    with Terminal() as terminal, contextlib.redirect_stdout(sys.stderr):
        continued = run_flow(settings, terminal, frozenset(), _flow)
    if continued.outcome.artifacts:
        terminal.console.print(closing(continued.outcome, time.monotonic() - started))
    if continued.table is not None:
        terminal.console.print(forgetting_table(continued.table))
    terminal.say(f"[bold]{continued.state}[/bold]: {continued.said}.")
    if as_json:
        print(json.dumps(continued.as_json(), ensure_ascii=False))


def _flow() -> "Callable[[PipelineConfig], Continued]":
    from flows.continual import run_continual  # imports prefect, while the server starts

    return run_continual
