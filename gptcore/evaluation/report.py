"""Writes what people read: page, model card and pictures of an evaluation, and the curves of a training run.

Everything goes into the `report/` folder of an artifact. No torch here, and matplotlib only where something is drawn, so
that tasks may import it cheaply.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas

from gptcore.artifacts import REPORT
from gptcore.evaluation import pages
from gptcore.evaluation.intervals import Interval
from gptcore.evaluation.results import METRICS, Results
from gptcore.training.journal import read_journal


def write_base_report(folder: Path, results: Results, scores: pandas.DataFrame) -> None:
    """Write the report of a base model from its results and its row per document."""
    from gptcore.evaluation import plots

    report = folder / REPORT
    report.mkdir(exist_ok=True)
    plots.bars(
        report / "bits_per_byte.png",
        {name: _bars(entry["metrics"][results["headline"]]) for name, entry in pages.parts_of_the_text(results).items()},
        title="Bits per byte of text that the model never saw",
        note="lower is better; thin lines: 95 % interval",
    )
    plots.distribution(
        report / "documents.png",
        {pages.OURS: scores["bits"] / scores["bytes"]},
        title="Bits per byte of each document",
        note=f"{len(scores):,} test documents; dashed: their mean (long and short documents count alike here)",
        unit="bits per byte",
        rows="documents",
    )
    _write_pages(report, results)


def write_task_report(folder: Path, results: Results, rows: pandas.DataFrame) -> None:
    """Write the report of a task model from its results and its row per test row."""
    from gptcore.evaluation import plots

    report = folder / REPORT
    report.mkdir(exist_ok=True)
    plots.bars(
        report / "metrics.png",
        {METRICS[name].title: _bars(entry) for name, entry in results["metrics"].items()},
        title=f"{results['name']}: the model beside its baselines",
        note="higher is better; thin lines: 95 % interval",
    )
    if results["kind"] == "classify":
        counts, labels = results["confusion"]["counts"], results["confusion"]["labels"]
        plots.confusion(report / "confusion.png", counts, labels, title=f"{results['name']}: answers by true label")
        right = rows["score"] > 0.5
        series = {"right answers": rows["probability"][right], "wrong answers": rows["probability"][~right]}
        title, unit = "How sure the model was of its answers", "probability of the answer among the labels"
    else:
        series = {pages.OURS: rows["score"], "first sentence": rows["first_sentence_score"]}
        title, unit = "ROUGE-L of each summary", "ROUGE-L"
    note = f"{len(rows):,} test rows; dashed: mean"
    plots.distribution(report / "rows.png", series, title=title, note=note, unit=unit, rows="rows", limits=(0.0, 1.0))
    _write_pages(report, results)


def training_curves(journal: Path, png: Path) -> None:
    """Draw loss, bits per byte (of each source too), learning rate and speed from the metric lines of a `journal.jsonl`."""
    from gptcore.evaluation import plots

    series: dict[str, tuple[list[int], list[float]]] = {}
    for line in read_journal(journal):
        for name, value in line.get("values", {}).items() if line.get("kind") == "metric" else ():
            steps, values = series.setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(float(value))
    sources = {name: (name.removeprefix(f"{_BITS}/"), False) for name in sorted(series) if name.startswith(f"{_BITS}/")}
    panels = []
    for title, names, from_zero in _PANELS:
        shown = {**names, **sources} if _BITS in names else names
        lines = [plots.Curve(label, *series[name], noisy) for name, (label, noisy) in shown.items() if name in series]
        if lines:
            panels.append(plots.Panel(title, lines, from_zero))
    plots.curves(png, panels, title="Training curves")


_BITS = "valid/bits_per_byte"
# Title, journal name -> (label, whether it is noisy), whether the axis begins at zero.
_PANELS: tuple[tuple[str, dict[str, tuple[str, bool]], bool], ...] = (
    ("Loss, nats per token", {"train/loss": ("train", True), "valid/loss": ("valid", False)}, False),
    ("Bits per byte of held-out text", {_BITS: ("valid", False)}, False),
    ("Learning rate, share of its peak", {"rate": ("rate", False)}, True),
    ("Tokens per second", {"tokens_per_second": ("speed", True)}, True),
)


def _bars(entry: Mapping[str, Any]) -> dict[str, Interval]:
    return {name: _interval(other) for name, other in {pages.OURS: entry, **entry["baselines"]}.items()}


def _interval(entry: Mapping[str, Any]) -> Interval:
    value = float(entry["value"])
    return Interval(value, *(value if entry[side] is None else float(entry[side]) for side in ("low", "high")))


def _write_pages(report: Path, results: Results) -> None:
    (report / "results.md").write_text(pages.results_page(results), encoding="utf-8")
    (report / "model_card.md").write_text(pages.model_card(results), encoding="utf-8")
