"""Running the chain: run, plan, verify-resume."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from flows.commands.common import Config, Json, Overrides, Rebuild, Seed, Text, check_stages, read_settings
from gptcore.artifacts import home_folder, open_home
from gptcore.config import PipelineConfig
from gptcore.errors import Interrupted

if TYPE_CHECKING:
    from tasks.promotion import Outcome

app = typer.Typer()

Result = TypeVar("Result")


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

    settings = read_settings(config, text, overrides)
    check_stages(settings, rebuild or [])
    started = time.monotonic()
    with Terminal() as terminal, contextlib.redirect_stdout(sys.stderr):
        outcome = run_flow(settings, terminal, frozenset(rebuild or []), _pipeline)
    seconds = time.monotonic() - started
    terminal.console.print(closing(outcome, seconds))
    if as_json:
        print(json.dumps(outcome.as_json(), ensure_ascii=False))


def _pipeline() -> "Callable[[PipelineConfig], Outcome]":
    from flows.pipeline import pipeline  # imports prefect, while the server starts

    return pipeline


def run_flow(
    settings: PipelineConfig, watcher: Any, rebuild: frozenset[str], flow_of: "Callable[[], Callable[[PipelineConfig], Result]]"
) -> Result:
    """Run the flow that `flow_of` imports, with the settings, against the home's server."""
    from flows.server import mark_dead_flow_runs, private_server, set_default_environment

    set_default_environment()
    # The person sees one message; Prefect's own log, with the traceback, is in its UI.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    home = open_home(home_folder())
    with _interruptible(), private_server(home) as server:
        os.environ.update(server.client_environment())
        flow = flow_of()
        from flows.session import OPTIONS, Options
        from tasks.tracking import Connection

        # MLflow's import, and the first time its database, take seconds too: beside the server's start they cost nothing.
        with contextlib.suppress(Exception):  # whatever is wrong with it, the run says so when it matters
            _ = Connection(home).client
        server.wait_ready()
        mark_dead_flow_runs(home)
        OPTIONS.set(Options(watcher, rebuild))
        return flow(settings)


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

    settings = read_settings(config, text, overrides)
    check_stages(settings, rebuild or [])
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

    settings = read_settings(config, text, [*(overrides or []), f"training.steps={steps}"])
    with Terminal() as terminal, contextlib.redirect_stdout(sys.stderr):
        result = verify(settings, kills, seed, terminal)
    if as_json:
        print(json.dumps(result))
    else:
        print(f"straight  {result['straight']}\nkilled    {result['killed']}   ({result['kills']} kills)")
        print("equal" if result["equal"] else "NOT EQUAL")
    if not result["equal"]:
        raise typer.Exit(1)
