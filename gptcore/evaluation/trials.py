"""What a sweep leaves behind: a table of its trials, a picture, a page for people and the best settings as a file that runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from gptcore.evaluation import plots
from gptcore.evaluation.markdown import page, table
from gptcore.search import TrialResult, best_of, ranked
from gptcore.sweeps import Range, SweepConfig, settings_yaml, words

BEST = "best.yaml"
_FACTS = ("parameters", "steps", "tokens", "tokens_per_second")
"""Numbers of a model that stand beside what its trial is judged by."""


def write_trials(folder: Path, sweep: SweepConfig, results: Sequence[TrialResult], final: Path) -> None:
    """Write trials.csv, trials.md, trials.png and best.yaml into `folder`, which will be called `final`."""
    best = best_of(sweep, results)
    assert best is not None, "a sweep whose trials all failed ends in an error"
    assert best.config is not None
    frame = comparison(sweep, results)
    frame.to_csv(folder / "trials.csv", index=False)
    _picture(folder / "trials.png", sweep, results, best)
    found = f"trial {best.number} of {len(results)}: {sweep.number} {best.value:.6g} with {words(best.settings)}"
    heading = f"The best of the sweep {sweep.name}, {found}\nChosen on validation text; no test set was looked at."
    (folder / BEST).write_text(settings_yaml(best.config, heading), encoding="utf-8")
    (folder / "trials.md").write_text(_page(sweep, frame, found, final), encoding="utf-8")


def comparison(sweep: SweepConfig, results: Sequence[TrialResult]) -> pandas.DataFrame:
    """A row per trial, the best first: its settings, what it is judged by, facts of its model, why it failed."""
    rows: list[dict[str, Any]] = []
    for result in ranked(sweep, results):
        model = result.model
        rows.append({
            "trial": result.number,
            **{key: _plain(value) for key, value in result.settings.items()},
            sweep.number: result.value,
            **{key: model.numbers.get(key) if model else None for key in _FACTS if key != sweep.number},
            "seconds": model.seconds if model else None,
            "fingerprint": model.fingerprint[:12] if model else "",
            "error": result.error or "",
        })  # fmt: skip
    return pandas.DataFrame(rows)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _picture(png: Path, sweep: SweepConfig, results: Sequence[TrialResult], best: TrialResult) -> None:
    good = [result for result in results if result.value is not None]
    slices = []
    for key, dimension in sweep.space.items():
        places = [_place(result.settings[key]) for result in good]
        slices.append(plots.Slice(key, places, _is_log(dimension, places)))
    numbers, values = [result.number for result in good], [result.value or 0.0 for result in good]
    plots.trials(png, numbers, values, slices, good.index(best), sweep.number.replace("_", " "))


def _place(value: Any) -> float | int | str:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _is_log(dimension: object, places: Sequence[float | int | str]) -> bool:
    """Whether a setting is read by its order of magnitude: as the range says, or as the listed numbers spread."""
    if isinstance(dimension, Range):
        return dimension.log
    numbers = [place for place in places if not isinstance(place, str)]
    return len(set(numbers)) > 1 and len(numbers) == len(places) and min(numbers) > 0 and max(numbers) >= 8 * min(numbers)


def _page(sweep: SweepConfig, frame: pandas.DataFrame, found: str, final: Path) -> str:
    shown = frame.drop(columns=["fingerprint", *(["error"] if not frame["error"].any() else [])])
    rows = [[_cell(value) for value in row] for row in shown.itertuples(index=False)]
    aim = "most" if sweep.maximise else "least"
    return page(
        f"# Sweep {sweep.name}",
        f"The {aim} is best. Best: {found}.",
        "Trials are judged on validation text after their last step, one run each: what lies closer together than two runs "
        "with different seeds is no difference. No test set was looked at, and nothing was registered.",
        f"To evaluate and register the best: `gptcore run {final / BEST}`",
        table([name.replace("_", " ") if "." not in name else name for name in shown.columns], rows, numbers_from=0),
        "![The trials](trials.png)",
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pandas.isna(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
    return "" if value is None else str(value)
