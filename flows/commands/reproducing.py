"""Building a model again from its record: reproduce."""

import contextlib
import sys
from typing import Annotated

import typer

from flows.commands.common import Json, Model, open_registry, tell
from flows.launch import interruptible
from gptcore.artifacts import Store, home_folder

app = typer.Typer()


@app.command()
def reproduce(
    model: Model,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Rebuild although a source or a published file has changed.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Only say what has changed since; build nothing.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep what was rebuilt.")] = False,
    as_json: Json = False,
) -> None:
    """Build a model again from its record alone, in a scratch store, and say whether it is the same, bit by bit."""
    from flows.reproduction import reproduce as rebuild
    from flows.tables import reproduction_table
    from flows.terminal import Terminal

    told = "interrupted; what was rebuilt so far is removed, the recorded model was not touched"
    with interruptible(told), Terminal() as terminal, contextlib.redirect_stdout(sys.stderr):
        found = rebuild(
            model, Store(home_folder()), open_registry, terminal, anyway=anyway, check=check, keep=keep
        )  # fmt: skip
    tell(found.as_json(), as_json, lambda: reproduction_table(found.as_json()))
    if not (found.equal or (check and not found.stopped)):
        raise typer.Exit(1)
