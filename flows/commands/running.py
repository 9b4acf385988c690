"""Running the chain: run, plan, verify-resume."""

import contextlib
import json
import sys
import time
from typing import Annotated

import typer

from flows.commands.common import Config, Json, Overrides, Rebuild, Seed, Text, check_stages, read_settings

app = typer.Typer()


@app.command()
def run(
    config: Config = None,
    text: Text = None,
    overrides: Overrides = None,
    rebuild: Rebuild = None,
    as_json: Json = False,
) -> None:
    """Build or reuse every stage, evaluate, register and promote."""
    from flows.launch import flow_environment
    from flows.tables import closing
    from flows.terminal import Terminal

    settings = read_settings(config, text, overrides)
    check_stages(settings, rebuild or [])
    started = time.monotonic()
    with (
        Terminal() as terminal,
        contextlib.redirect_stdout(sys.stderr),
        flow_environment(terminal, frozenset(rebuild or [])),
    ):
        from flows.pipeline import pipeline

        outcome = pipeline(settings)
    seconds = time.monotonic() - started
    terminal.console.print(closing(outcome, seconds))
    if as_json:
        print(json.dumps(outcome.as_json(), ensure_ascii=False))


@app.command()
def plan(
    config: Config = None,
    text: Text = None,
    overrides: Overrides = None,
    rebuild: Rebuild = None,
    as_json: Json = False,
) -> None:
    """Say for every stage whether a run would reuse or build it, and why."""
    from flows.operations.server import set_default_environment
    from flows.session import OPTIONS, Options, plan_run
    from flows.start import open_chain
    from flows.tables import plan_table
    from flows.terminal import Terminal

    settings = read_settings(config, text, overrides)
    check_stages(settings, rebuild or [])
    set_default_environment()
    OPTIONS.set(Options(rebuild=frozenset(rebuild or [])))
    planned = plan_run()
    open_chain(planned, settings).promote()
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
