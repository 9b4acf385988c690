"""Keeping a home: clean, delete, backup, restore."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.common import Json, open_registry, tell
from gptcore.artifacts import Store, home_folder
from gptcore.errors import RegistryError
from gptcore.room import amount

app = typer.Typer()

File = Annotated[Path, typer.Argument(help="The backup, a .tar.zst file.", show_default=False)]


@app.command()
def clean(
    keep_days: Annotated[float, typer.Option(help="What was built, used or changed in the last N days stays.", min=0.0)] = 30,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this, only tell.")] = False,
    as_json: Json = False,
) -> None:
    """Tell what old artifacts, checkpoints and leftovers may go, and with --yes remove them. What an alias needs stays."""
    from flows.operations.clean import apply, plan_clean, upkeep
    from flows.tables import removals_table

    store = Store(home_folder())
    registry, now = open_registry(), time.time()
    with upkeep(store.home):
        plan = plan_clean(store, registry, keep_days)
        frees = plan.frees
        removed = apply(store, plan) if yes else []
    answer: dict[str, Any] = {
        "home": str(store.home), "keep_days": keep_days, "frees_bytes": frees, "artifacts_kept": plan.artifacts,
        "artifacts_needed_by_aliases": plan.pinned, "items": [removal.as_row(now) for removal in plan.removals],
        "removed": [str(removal.path) for removal in removed], "command": f"gptcore clean --keep-days {keep_days:g} --yes",
    }  # fmt: skip
    tell(answer, as_json, lambda: removals_table(answer, done=yes))


@app.command()
def delete(
    model: Annotated[str, typer.Argument(metavar="NAME/VERSION", help="A registered version that no alias points to.")],
    as_json: Json = False,
) -> None:
    """Take a version out of the registry, unless an alias points to it; its run and files in MLflow stay."""
    registry = open_registry()
    version = registry.find(model)
    if "/" not in model:
        raise RegistryError(f"{model} is version {version.version} now: say which version goes, {version.name}/N")
    registry.delete(version.name, version.version)
    tell(version.as_row(), as_json, lambda: f"{model} is no longer registered; its run and files in MLflow stay")


@app.command()
def backup(file: File, as_json: Json = False) -> None:
    """Save the whole home in one file, also while runs are at work. It holds a key: keep it as safe as the home."""
    from flows.operations.backup import backup as save
    from tasks.tracking import Connection

    if not (mlflow := Connection(home_folder())).is_private:
        print(
            f"gptcore: runs and models at {mlflow.address} are not in it; that MLflow needs a backup of its own",
            file=sys.stderr,
        )
    saved = save(home_folder(), file)
    text = f"{saved.files} files, {amount(saved.bytes)}, of {saved.home} are saved in {saved.file}, {amount(saved.size)}"
    tell(saved.as_row(), as_json, lambda: text)


@app.command()
def restore(file: File, as_json: Json = False) -> None:
    """Make the home that a backup holds in GPTCORE_HOME, a new or empty folder; everything is checked first."""
    from flows.operations.restore import restore as bring_back

    found = bring_back(file, home_folder())
    text = f"{found.files} files, {amount(found.bytes)}, saved {found.created}, are restored in {found.home}"
    tell(found.as_row(), as_json, lambda: text)
