"""Training a champion on: continual, watch."""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import Config, Json, Overrides, Text, read_settings, tell
from gptcore.artifacts import home_folder, open_home
from gptcore.corpus.watching import Watch
from gptcore.errors import GptcoreError

app = typer.Typer()


@app.command()
def continual(config: Config = None, text: Text = None, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train the champion on with what is new in the sources; promote it if it learned that and kept the old."""
    from flows.launch import flow_environment
    from flows.tables import closing, forgetting_table
    from flows.terminal import Terminal

    settings = read_settings(config, text, overrides)
    started = time.monotonic()
    with Terminal() as terminal, contextlib.redirect_stdout(sys.stderr), flow_environment(terminal):
        from flows.continual import run_continual

        continued = run_continual(settings)
    if continued.outcome.artifacts:
        terminal.console.print(closing(continued.outcome, time.monotonic() - started))
    if continued.table is not None:
        terminal.console.print(forgetting_table(continued.table))
    tell(continued.as_json(), as_json, lambda: f"{continued.state}: {continued.said}.")


@app.command()
def watch(
    config: Config = None, text: Text = None, overrides: Overrides = None,
    every: Annotated[float, typer.Option(help="Seconds between two looks at the sources.", min=1.0)] = 30.0,
) -> None:  # fmt: skip
    """Tell Prefect (event gptcore.new-data) whenever the sources hold something new; a deployment can start on it."""
    settings = read_settings(config, text, overrides)
    home = open_home(home_folder())
    watching = Watch(home, settings)
    where = ", ".join(source.name for source in settings.corpus.sources)
    print(f"watching {where} of {settings.name} every {every:g} seconds, end with Ctrl-C", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            if changed := watching.look():
                try:
                    _announce(home, settings.name, changed)
                    watching.told()
                    print(f"new in {', '.join(changed)}: told Prefect", file=sys.stderr)
                except GptcoreError as error:  # it is told of with the next look
                    print(f"new in {', '.join(changed)}, but {error}", file=sys.stderr)
            time.sleep(every)


def _announce(home: Path, name: str, changed: list[str]) -> None:
    from flows.operations.server import private_server, set_default_environment

    set_default_environment()
    with private_server(home) as server:
        os.environ.update(server.client_environment())
        server.wait_ready()
        from flows.events import announce

        announce(name, changed)
