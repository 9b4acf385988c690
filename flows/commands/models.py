"""Models, and what was made: models, show, promote, rollback, history, lineage, verify."""

import contextlib
import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from flows.commands.common import Json, Name, Registered, open_registry, tell
from gptcore.artifacts import home_folder, open_home
from gptcore.errors import SettingsError

app = typer.Typer()


@app.command()
def models(as_json: Json = False) -> None:
    """List the registered models, their versions and aliases."""
    from flows.tables import models_table

    rows = [version.as_row() for version in open_registry().all_versions()]
    none = f"No model is registered yet in {home_folder()}: gptcore run makes the first ones."
    tell(rows, as_json, lambda: models_table(rows) if rows else none)


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="A model, an artifact's path or the name of a stage.")],
    as_json: Json = False,
) -> None:
    """Show what an artifact or a registered model is made of and how good it is."""
    from flows.lookup import describe
    from flows.tables import facts_table

    facts = describe(what, open_home(home_folder()), open_registry)
    tell(facts, as_json, lambda: facts_table(facts))


@app.command()
def promote(
    model: Registered,
    force: Annotated[str | None, typer.Option(help="Promote although it is not better; the reason is recorded.")] = None,
    as_json: Json = False,
) -> None:
    """Make a registered version the champion, if it is better on its own test set, where the champion is evaluated again."""
    from tasks.promotion import promote_version

    with contextlib.redirect_stdout(sys.stderr):
        verdict = promote_version(open_home(home_folder()), model, force)
    tell(verdict, as_json, lambda: f"{verdict['name']} version {verdict['version']}: {verdict['verdict']}")
    if "champion" not in verdict["aliases"]:  # scripts should see that it was refused
        raise typer.Exit(1)


@app.command()
def lineage(
    what: Annotated[str, typer.Argument(help="A model, an artifact, the name of a stage or a source, or a document's id.")],
    as_json: Json = False,
) -> None:
    """Tell what something was made of, down to the sources, and every artifact, version and alias that depends on it."""
    from flows.lookup import lineage as trace
    from flows.tables import lineage_tree

    found = trace(what, open_home(home_folder()), open_registry)
    tell(found, as_json, lambda: lineage_tree(found))


@app.command()
def rollback(
    name: Name,
    reason: Annotated[str, typer.Option(help="Recorded in the history.")] = "rolled back by hand",
    as_json: Json = False,
) -> None:
    """Make the champion before this one champion again."""
    champion = open_registry().rollback(name, reason)
    tell(champion.as_row(), as_json, lambda: f"{name} version {champion.version} is champion again: {reason}")


@app.command()
def history(
    name: Name,
    on: Annotated[str | None, typer.Option(help="Say who was champion on this day (its end) or at this moment, UTC.")] = None,
    as_json: Json = False,
) -> None:
    """Tell every change of champion: when, from which version to which, why and by whom."""
    from flows.tables import history_table

    registry = open_registry()
    changes = registry.history(name)
    if on is not None:
        moment = _moment(on)
        version = registry.champion_at(name, moment)
        answer = {"name": name, "at": moment.isoformat(), "champion": version}
        tell(answer, as_json, lambda: f"{name} had no champion then" if version is None else f"{name}: version {version}")
    else:
        tell(changes, as_json, lambda: history_table(changes) if changes else f"{name} never had a champion")


@app.command()
def verify(
    artifact: Annotated[str, typer.Argument(help="An artifact's path, the name of a stage, or a model.")],
) -> None:
    """Compare every file of an artifact with the sha256 it was published with."""
    from flows.lookup import find_artifact
    from gptcore.artifacts import verify as verify_files

    path = find_artifact(artifact, open_home(home_folder()), open_registry)
    found = verify_files(path)
    print(f"{found.stage} {found.name} {found.digest[:12]}: {len(found.manifest()['files'])} files are as published, {path}")


def _moment(text: str) -> datetime:
    """A day means its last moment."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise SettingsError(f"--on {text}: expected a day such as 2026-05-03, or a moment such as 2026-05-03T14:00") from None
    if "T" not in text and " " not in text:
        moment += timedelta(days=1) - timedelta(microseconds=1)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
