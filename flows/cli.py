"""The `gptcore` command. What a command needs is imported when it runs, so `--help` is quick and only models load torch."""

import importlib.metadata
import sys
from typing import Annotated

import typer

from flows.commands import (
    benching,
    continual,
    converting,
    explaining,
    generating,
    models,
    operations,
    reproducing,
    running,
    sweeping,
    upkeep,
)
from gptcore.errors import GptcoreError, is_disk_full

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip


def main() -> None:
    """Run the command; a user's mistake is one message and exit code 1."""
    try:
        app()
    except GptcoreError as error:
        print(f"gptcore: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if not is_disk_full(error):
            raise
        print(f"gptcore: no space left on the disk ({error}); free some space, then run again", file=sys.stderr)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gptcore {importlib.metadata.version('gptcore')}")
        raise typer.Exit


@app.callback()
def gptcore(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """From raw text to a promoted GPT."""


for commands in (
    running,
    continual,
    sweeping,
    operations,
    generating,
    models,
    explaining,
    reproducing,
    converting,
    upkeep,
    benching,
):
    app.add_typer(commands.app)


if __name__ == "__main__":
    main()
