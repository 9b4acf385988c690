"""What an evaluation leaves behind: `results.json`, and how the numbers in it are read, compared and listed.

{"kind": "base" | "summarize" | "classify", "name": …, "headline": "bits_per_byte",
 "metrics": {"bits_per_byte": {"value": …, "low": …, "high": …,
                               "baselines": {"xz -9 primed": {"value": …, "low": …, "high": …, "verdict": …}}}},
 "sources": {…: {"documents": …, "metrics": {…}}},  (base)
 "labels": {…: {"rows": …, "precision": …, "recall": …, "f1": …}},  (classify)
 "confusion": {"labels": […], "counts": […]},  (classify; a line per true label)
 "data": {…}, "model": {…}, "samples": […], "settings": {…}}
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from gptcore.artifacts import write_json
from gptcore.errors import ArtifactError
from gptcore.evaluation.comparison import Comparison, compare, verdict
from gptcore.evaluation.intervals import Interval

FILE = "results.json"
Results = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """How a number is called and read."""

    title: str
    higher_is_better: bool
    digits: int = 3
    percent: bool = False

    def text(self, value: float) -> str:
        """The number as people read it."""
        return f"{100 * value:.1f} %" if self.percent else f"{value:,.{self.digits}f}"

    def gain(self, difference: float) -> str:
        """The difference of two such numbers as people read it, with its sign."""
        return f"{100 * difference:+.1f} points" if self.percent else f"{difference:+,.{self.digits}f}"


METRICS = {
    "bits_per_byte": Metric("bits per byte", higher_is_better=False),
    "perplexity": Metric("perplexity per token", higher_is_better=False, digits=1),
    "masked_bits_per_byte": Metric("bits per byte, hidden tokens", higher_is_better=False),
    "masked_perplexity": Metric("perplexity per hidden token", higher_is_better=False, digits=1),
    "rouge_l": Metric("ROUGE-L", higher_is_better=True),
    "accuracy": Metric("accuracy", higher_is_better=True, percent=True),
    "macro_f1": Metric("macro-F1", higher_is_better=True),
}


def measured(interval: Interval, baselines: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """An entry of `metrics`: the number, its interval and what it is to be compared with."""
    return {**interval.as_dict(), "baselines": dict(baselines or {})}


def beside_number(ours: Interval, number: float, *, higher_is_better: bool) -> dict[str, Any]:
    """A baseline that is one number without samples, such as the size of a compressed file."""
    difference = Interval(ours.value - number, ours.low - number, ours.high - number)
    said = verdict(difference, higher_is_better=higher_is_better)
    return {"value": number, "low": None, "high": None, "verdict": said}


def beside_model(baseline: Interval, comparison: Comparison) -> dict[str, Any]:
    """A baseline that answered the same rows; the verdict on ours comes from the paired comparison."""
    return {
        **baseline.as_dict(),
        "verdict": comparison.verdict,
        "difference": comparison.difference,
        "difference_low": comparison.low,
        "difference_high": comparison.high,
    }


def write_results(folder: Path, results: Results) -> None:
    """Write `results.json`."""
    write_json(folder / FILE, results)


def read_results(folder: Path) -> Results:
    """`results.json` of an evaluation folder. Raises `ArtifactError` when there is none."""
    try:
        results: Results = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder} is not a finished evaluation: its {FILE} cannot be read ({error}); run the evaluation again"
        ) from error
    return results


def headline(results: Results) -> tuple[str, float, bool]:
    """The number that decides about a model: its name, its value and whether higher is better."""
    name = str(results["headline"])
    return name, float(results["metrics"][name]["value"]), METRICS[name].higher_is_better


def headline_sentence(results: Results) -> str:
    """The headline number with its interval, and how it stands beside every baseline."""
    name = str(results["headline"])
    metric, entry = METRICS[name], results["metrics"][name]
    test = results["data"]["test"]
    rows = f"{test['documents']:,} test documents" if "documents" in test else f"{test['rows']:,} test rows"
    against = [
        f"{_STANDS[other['verdict']]} {baseline} ({metric.text(other['value'])})"
        for baseline, other in entry["baselines"].items()
    ]
    low, high = metric.text(entry["low"]), metric.text(entry["high"])
    direction = "higher" if metric.higher_is_better else "lower"
    return (
        f"**{metric.title[0].upper()}{metric.title[1:]} {metric.text(entry['value'])}** on {rows} "
        f"({direction} is better; 95 % interval {low} to {high}){': ' if against else ''}{', '.join(against)}."
    )


_STANDS = {"better": "better than", "worse": "worse than", "no clear difference": "no clear difference from"}


def summary_rows(evaluations: Mapping[str, Path]) -> pandas.DataFrame:
    """A row per model, metric and baseline: model, metric, value, low, high, baseline, baseline_value, better, verdict.

    `evaluations`: name of each model -> its evaluation folder. A metric without a baseline has one row, whose last
    columns are missing.
    """
    rows = []
    for model, folder in evaluations.items():
        for name, entry in read_results(folder)["metrics"].items():
            ours = {"model": model, "metric": name, "value": entry["value"], "low": entry["low"], "high": entry["high"]}
            for baseline, other in entry["baselines"].items() or [(None, None)]:
                rows.append({**ours, **_against(name, entry["value"], baseline, other)})
    return pandas.DataFrame(rows, columns=[*_OURS, *_THEIRS]).astype({"better": "boolean"})


_OURS = ("model", "metric", "value", "low", "high")
_THEIRS = ("baseline", "baseline_value", "better", "verdict")


def _against(metric: str, value: float, baseline: str | None, other: Mapping[str, Any] | None) -> dict[str, Any]:
    if other is None:
        return dict.fromkeys(_THEIRS)
    better = value > other["value"] if METRICS[metric].higher_is_better else value < other["value"]
    return dict(zip(_THEIRS, (baseline, other["value"], better, other["verdict"]), strict=True))


def compare_evaluations(a: Path, b: Path, *, resamples: int = 1000, seed: int = 0) -> Comparison:
    """Compare two finished evaluations of one kind, sample by sample, by their headline number.

    `a` and `b` are evaluation folders. Raises `ArtifactError` when they were not measured on the same test set.
    """
    results_a, results_b = read_results(a), read_results(b)
    name, _, higher_is_better = headline(results_a)
    other = headline(results_b)[0]
    if other != name:
        raise ArtifactError(f"{a} and {b} cannot be compared: the one measures {name}, the other {other}")
    base = results_a["kind"] == "base"
    table, score = ("scores.parquet", "bits") if base else ("predictions.parquet", "score")
    same = ["id", "source", "bytes"] if base else ["id", "target"]
    rows_a, rows_b = (pandas.read_parquet(folder / table, columns=[*same, score]) for folder in (a, b))
    both = rows_a.merge(rows_b, on=same, suffixes=("_a", "_b"), validate="one_to_one")
    if not len(both) == len(rows_a) == len(rows_b):
        raise ArtifactError(
            f"{a} and {b} were not measured on the same test set: they share {len(both)} of {len(rows_a)} and "
            f"{len(rows_b)} samples; evaluate both models on the same one"
        )
    return compare(
        both[f"{score}_a"],
        both[f"{score}_b"],
        sizes=both["bytes"] if base else None,
        higher_is_better=higher_is_better,
        resamples=resamples,
        seed=seed,
    )
