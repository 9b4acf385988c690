"""The `gptcore` command. What a command needs is imported when it runs, so `--help` is quick and only models load torch."""

import contextlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcore.artifacts import home_folder, open_home
from gptcore.config import PipelineConfig, load_config
from gptcore.errors import GptcoreError, Interrupted, SettingsError, is_disk_full

if TYPE_CHECKING:
    from tasks.promotion import Outcome

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

Config = Annotated[Path | None, typer.Argument(help="Settings (YAML); default: the quickstart.", show_default=False)]
Text = Annotated[list[str] | None, typer.Option(help="Use these files or folders as the text.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value", show_default=False)]
Rebuild = Annotated[list[str] | None, typer.Option(help="Build this stage although it is there.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Name = Annotated[str, typer.Argument(help="A registered name, without version or alias.")]
Model = Annotated[str, typer.Argument(help="name@alias, name/version, a stage, or the path of an artifact or checkpoint.")]
Registered = Annotated[str, typer.Argument(metavar="MODEL", help="name@alias or name/version.")]
NewTokens = Annotated[int | None, typer.Option(help="Longest answer in tokens.", min=1, show_default=False)]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0.0)]
TopK = Annotated[int, typer.Option(help="Draw from the likeliest k tokens; 0: from all.", min=0)]
TopP = Annotated[float, typer.Option(help="Draw from the smallest set of this probability.", min=0.0, max=1.0)]
Seed = Annotated[int, typer.Option(help="Another seed draws another text.")]


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


# -------------------------------------------------------------------------------------------------------- running --


@app.command()
def run(
    config: Config = None,
    text: Text = None,
    overrides: Overrides = None,
    rebuild: Rebuild = None,
    as_json: Json = False,
) -> None:
    """Build or reuse every stage, evaluate, register and promote."""
    from flows.terminal import Terminal, closing

    settings = _settings(config, text, overrides)
    _check_stages(settings, rebuild or [])
    started = time.monotonic()
    with Terminal() as terminal, contextlib.redirect_stdout(sys.stderr):
        outcome = _run_pipeline(settings, terminal, frozenset(rebuild or []))
    seconds = time.monotonic() - started
    terminal.console.print(closing(outcome, seconds))
    if as_json:
        print(json.dumps(outcome.as_json(), ensure_ascii=False))


def _run_pipeline(settings: PipelineConfig, watcher: Any, rebuild: frozenset[str]) -> "Outcome":
    from flows.server import mark_dead_flow_runs, private_server, set_default_environment

    set_default_environment()
    # The person sees one message; Prefect's own log, with the traceback, is in its UI.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    home = open_home(home_folder())
    with _interruptible(), private_server(home) as server:
        os.environ.update(server.client_environment())
        from flows.pipeline import pipeline  # imports prefect, while the server starts
        from flows.session import OPTIONS, Options
        from tasks.tracking import Connection

        # MLflow's import, and the first time its database, take seconds too: beside the server's start they cost nothing.
        with contextlib.suppress(Exception):  # whatever is wrong with it, the run says so when it matters
            _ = Connection(home).client
        server.wait_ready()
        mark_dead_flow_runs(home)
        OPTIONS.set(Options(watcher, rebuild))
        return pipeline(settings)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, after the trainer has saved, and both end it with one sentence."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; what was finished and the last checkpoint are kept, run again to go on") from error
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def plan(
    config: Config = None,
    text: Text = None,
    overrides: Overrides = None,
    rebuild: Rebuild = None,
    as_json: Json = False,
) -> None:
    """Say for every stage whether a run would reuse or build it, and why."""
    from flows.chain import Chain
    from flows.session import OPTIONS, Options, plan_run
    from flows.terminal import Terminal, plan_table

    settings = _settings(config, text, overrides)
    _check_stages(settings, rebuild or [])
    OPTIONS.set(Options(rebuild=frozenset(rebuild or [])))
    planned = plan_run()
    Chain(planned, settings).promote()
    if as_json:
        print(json.dumps({stage: vars(decision) for stage, decision in planned.decisions.items()}, ensure_ascii=False))
    else:
        Terminal(sys.stdout).console.print(plan_table(planned.decisions))


@app.command()
def verify_resume(
    config: Config = None, text: Text = None, overrides: Overrides = None,
    kills: Annotated[int, typer.Option(help="How often the trainer is killed.", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="Steps of training.", min=2)] = 60,
    seed: Seed = 0, as_json: Json = False,
) -> None:  # fmt: skip
    """Train straight, and again with kills -9 at random moments; say whether the weights are the same bits."""
    from flows.terminal import Terminal
    from flows.verification import verify_resume as verify

    settings = _settings(config, text, [*(overrides or []), f"training.steps={steps}"])
    with Terminal() as terminal, contextlib.redirect_stdout(sys.stderr):
        result = verify(settings, kills, seed, terminal)
    if as_json:
        print(json.dumps(result))
    else:
        print(f"straight  {result['straight']}\nkilled    {result['killed']}   ({result['kills']} kills)")
        print("equal" if result["equal"] else "NOT EQUAL")
    if not result["equal"]:
        raise typer.Exit(1)


# --------------------------------------------------------------------------------------------------------- models --


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts; without any, the whole of standard input is one.")] = None,
    max_new_tokens: NewTokens = None, temperature: Temperature = 0.0, top_k: TopK = 0, top_p: TopP = 1.0, seed: Seed = 0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Let a model continue, summarise or classify texts: whatever it was trained for."""
    folder = _model_folder(model)
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
        if predictor.task is None:
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
    folder = _model_folder(model)
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
    from flows.terminal import models_table

    rows = [version.as_row() for version in _registry().all_versions()]
    none = f"No model is registered yet in {home_folder()}: gptcore run makes the first ones."
    _tell(rows, as_json, lambda: models_table(rows) if rows else none)


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="A model, an artifact's path or the name of a stage.")],
    as_json: Json = False,
) -> None:
    """Show what an artifact or a registered model is made of and how good it is."""
    from flows.lookup import describe
    from flows.terminal import facts_table

    facts = describe(what, open_home(home_folder()), _registry)
    _tell(facts, as_json, lambda: facts_table(facts))


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
    _tell(verdict, as_json, lambda: f"{verdict['name']} version {verdict['version']}: {verdict['verdict']}")


@app.command()
def lineage(
    what: Annotated[str, typer.Argument(help="A model, an artifact, the name of a stage or a source, or a document's id.")],
    as_json: Json = False,
) -> None:
    """Tell what something was made of, down to the sources, and every artifact, version and alias that depends on it."""
    from flows.lookup import lineage as trace
    from flows.terminal import lineage_tree

    found = trace(what, open_home(home_folder()), _registry)
    _tell(found, as_json, lambda: lineage_tree(found))


@app.command()
def rollback(
    name: Name,
    reason: Annotated[str, typer.Option(help="Recorded in the history.")] = "rolled back by hand",
    as_json: Json = False,
) -> None:
    """Make the champion before this one champion again."""
    champion = _registry().rollback(name, reason)
    _tell(champion.as_row(), as_json, lambda: f"{name} version {champion.version} is champion again: {reason}")


@app.command()
def history(
    name: Name,
    on: Annotated[str | None, typer.Option(help="Say who was champion on this day (its end) or at this moment, UTC.")] = None,
    as_json: Json = False,
) -> None:
    """Tell every change of champion: when, from which version to which, why and by whom."""
    from flows.terminal import history_table

    registry = _registry()
    changes = registry.history(name)
    if on is not None:
        moment = _moment(on)
        version = registry.champion_at(name, moment)
        answer = {"name": name, "at": moment.isoformat(), "champion": version}
        _tell(answer, as_json, lambda: f"{name} had no champion then" if version is None else f"{name}: version {version}")
    else:
        _tell(changes, as_json, lambda: history_table(changes) if changes else f"{name} never had a champion")


@app.command()
def verify(
    artifact: Annotated[str, typer.Argument(help="An artifact's path, the name of a stage, or a model.")],
) -> None:
    """Compare every file of an artifact with the sha256 it was published with."""
    from flows.lookup import find_artifact
    from gptcore.artifacts import verify as verify_files

    path = find_artifact(artifact, open_home(home_folder()), _registry)
    found = verify_files(path)
    print(f"{found.stage} {found.name} {found.digest[:12]}: {len(found.manifest()['files'])} files are as published, {path}")


# -------------------------------------------------------------------------------------------------------- helpers --


def _tell(answer: Any, as_json: bool, for_people: Callable[[], Any]) -> None:
    """Print the answer of a command: one line of JSON, or a sentence or table for people."""
    from flows.terminal import Terminal

    shown = json.dumps(answer, ensure_ascii=False) if as_json else for_people()
    if isinstance(shown, str):
        print(shown)
    else:
        Terminal(sys.stdout).console.print(shown)


def _settings(config: Path | None, text: list[str] | None, overrides: list[str] | None) -> PipelineConfig:
    if text and config is not None and config.suffix.lower() not in (".yaml", ".yml"):
        raise SettingsError(
            f"{config} is no settings file; --text takes one path, so repeat it: --text {text[0]} --text {config}"
        )
    return load_config(config or quickstart(), overrides or (), text or ())


def quickstart() -> Path:
    """The default settings: in the wheel beside this file, in a checkout under deployments/."""
    here = Path(__file__).parent
    packed = here / "configs" / "quickstart.yaml"
    return packed if packed.exists() else here.parent / "deployments" / "configs" / "quickstart.yaml"


def _check_stages(settings: PipelineConfig, rebuild: list[str]) -> None:
    tasks = [task.name for task in settings.tasks]
    known = ["corpus", "tokenizer", "shards", "base", "evaluation-base"]
    known += [f"{stage}-{task}" for task in tasks for stage in ("examples", "shards", "finetune", "evaluation")]
    if unknown := [stage for stage in rebuild if stage not in known]:
        raise SettingsError(f"--rebuild {unknown[0]}: no such stage; there are {', '.join(known)}")


def _moment(text: str) -> datetime:
    """A day means its last moment."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise SettingsError(f"--on {text}: expected a day such as 2026-05-03, or a moment such as 2026-05-03T14:00") from None
    if "T" not in text and " " not in text:
        moment += timedelta(days=1) - timedelta(microseconds=1)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _registry() -> Any:
    from flows.server import set_default_environment

    set_default_environment()
    from tasks.registry import Registry

    return Registry(open_home(home_folder()), lambda text: print(text, file=sys.stderr))


def _model_folder(model: str) -> Path:
    from flows.lookup import model_folder

    return model_folder(model, open_home(home_folder()), _registry)
