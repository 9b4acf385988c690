"""Many runs of one pipeline with different settings: sweep."""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import Json, Overrides

app = typer.Typer()


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep (YAML): a pipeline, and what to try in it.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train a pipeline's model with different settings, compare on validation text, and write the best as settings that run."""
    from flows.launch import flow_environment
    from flows.tables import sweep_closing
    from flows.terminal import Terminal
    from gptcore.sweeps import load_sweep

    settings = load_sweep(config, overrides or ())
    started = time.monotonic()
    with Terminal() as terminal, contextlib.redirect_stdout(sys.stderr), flow_environment(terminal):
        from flows.sweep import sweep as flow

        outcome = flow(settings)
    terminal.console.print(sweep_closing(outcome, time.monotonic() - started))
    if as_json:
        print(json.dumps(outcome.as_json(), ensure_ascii=False))
