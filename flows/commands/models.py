"""Using models, and what was made: generate, chat, models, show, promote, rollback, history, lineage, verify."""

import contextlib
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from flows.commands.common import Json, Model, Name, Registered, Seed, folder_of, open_registry, tell
from gptcore.artifacts import home_folder, open_home
from gptcore.errors import GptcoreError, SettingsError

app = typer.Typer()

NewTokens = Annotated[int | None, typer.Option(help="Longest answer in tokens.", min=1, show_default=False)]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0.0)]
TopK = Annotated[int, typer.Option(help="Draw from the likeliest k tokens; 0: from all.", min=0)]
TopP = Annotated[float, typer.Option(help="Draw from the smallest set of this probability.", min=0.0, max=1.0)]


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts; without any, the whole of standard input is one.")] = None,
    max_new_tokens: NewTokens = None, temperature: Temperature = 0.0, top_k: TopK = 0, top_p: TopP = 1.0, seed: Seed = 0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Let a model continue, summarise or classify texts: whatever it was trained for."""
    folder = folder_of(model)
    texts = prompts or [_standard_input()]
    if not all(text.strip() for text in texts):
        raise GptcoreError("the prompt is empty: give a text, as an argument or on standard input")
    from gptcore.inference import Predictor

    predictor = Predictor(folder)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    if as_json:
        print(json.dumps({"prompts": texts, "outputs": predictor.predict(texts, **settings)}, ensure_ascii=False))
        return
    for text in texts:
        if predictor.continues:
            print(text, end="")
        for piece in predictor.stream(text, **settings):
            print(piece, end="", flush=True)
        print()


@app.command()
def chat(
    model: Model, max_new_tokens: NewTokens = None, temperature: Temperature = 0.7, top_k: TopK = 50, top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:  # fmt: skip
    """Talk with a model, a line at a time. A base goes on with the text so far; a task model answers each line for itself."""
    folder = folder_of(model)
    from gptcore.inference import Predictor

    predictor = Predictor(folder)
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{model}: type a line, end with Ctrl-D", file=sys.stderr)
    so_far = ""
    for turn, line in enumerate(_lines("> " if interactive else "")):
        prompt = line if predictor.task is not None else f"{so_far}{line}"
        answer = ""
        for piece in predictor.stream(
            prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed + turn
        ):
            print(piece, end="", flush=True)
            answer += piece
        print()
        so_far = f"{prompt}{answer}\n"


def _standard_input() -> str:
    """All of it, without the end of its last line."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise GptcoreError(f"standard input is not UTF-8 text (byte {error.start}); convert it first") from error


def _lines(prompt: str) -> Iterator[str]:
    """Lines that are not empty, until the end of standard input."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


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
