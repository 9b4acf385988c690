"""Running the chain: run, plan, verify-resume."""

import contextlib
import json
import math
import sys
import time
from typing import Annotated

import typer

from flows.commands.common import Config, Json, Overrides, Rebuild, Seed, Text, check_stages, read_settings, tell
from gptcore.config import PRESETS, PipelineConfig
from gptcore.config import preset as known_shape
from gptcore.errors import SettingsError

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
    on: Annotated[
        list[str] | None, typer.Option(metavar="CARD", help="A card such as h100, or here.", show_default=False)
    ] = None,
    preset: Annotated[list[str] | None, typer.Option(help="Shape by name, or all.", show_default="the settings' own")] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the peak that is reached.", min=0.01, max=1.0)] = None,
    per_hour: Annotated[
        list[str] | None, typer.Option(metavar="[CARD=]PRICE", help="Price of an hour.", show_default="cost.per_hour")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say for every stage whether a run would reuse or build it, and why.

    With --on or --preset, say instead what pretraining would take there: time, memory, energy and money.
    """
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
    chain = open_chain(planned, settings)
    if on or preset:
        _forecast(chain.config, on or ["here"], preset or [], mfu, per_hour or [], as_json)
        return
    chain.promote()
    if as_json:
        print(json.dumps({stage: vars(decision) for stage, decision in planned.decisions.items()}, ensure_ascii=False))
    else:
        Terminal(sys.stdout).console.print(plan_table(planned.decisions))


def _forecast(
    settings: PipelineConfig, on: list[str], presets: list[str], mfu: float | None, per_hour: list[str], as_json: bool
) -> None:  # fmt: skip
    from flows.tables import forecast_table
    from gptcore.training.forecast import forecasts, places

    prices = _prices(per_hour, on)
    names = list(PRESETS) if "all" in presets else presets
    shapes = {name: known_shape(name) for name in names} or {settings.name: settings.model}
    found = [row.as_row() for row in forecasts(settings, shapes, places(on, settings.training, mfu), prices)]
    tell(found, as_json, lambda: forecast_table(found, settings.cost.currency))


def _prices(given: list[str], on: list[str]) -> dict[str, float]:
    """Price of an hour by the name of the place: `2.50` for all, `h100=2.50` for one."""
    prices: dict[str, float] = {}
    for text in given:
        name, equals, number = text.rpartition("=")
        try:
            price = float(number)
        except ValueError:
            price = -1.0
        if not 0.0 <= price < math.inf or (equals and name not in on):
            raise SettingsError(f"--per-hour {text}: expected a price such as 2.50, or CARD=2.50 for one card of --on")
        prices |= {name: price} if equals else {place: price for place in on if place not in prices}
    return prices


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
