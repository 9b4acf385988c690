"""One page for a whole run: every model, its numbers beside the baselines, what beat what, and the pictures."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas

from gptcore.artifacts import REPORT
from gptcore.cost import duration, energy, money
from gptcore.evaluation.markdown import fenced, page, table
from gptcore.evaluation.results import METRICS, headline_sentence, read_results, summary_rows


def results_page(
    folder: Path,
    evaluations: Mapping[str, Path],
    *,
    title: str,
    pictures: Mapping[str, Path] | None = None,
    costs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write `results.md` and the pictures it shows into `folder`; returns the page.

    `evaluations`: name of each model -> its evaluation folder. `pictures`: caption -> any further PNG, such as training
    curves; those that do not exist are left out. `costs`: registered name -> its cost card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = {name: read_results(path) for name, path in evaluations.items()}
    parts = [f"# {title}", "\n".join(f"- `{name}`: {headline_sentence(entry)}" for name, entry in results.items())]
    parts.append(_table(evaluations))
    for name, path in evaluations.items():
        parts.append(f"## {name}")
        for png in sorted((path / REPORT).glob("*.png")):
            parts.append(_picture(folder, f"{name}, {png.stem.replace('_', ' ')}", png))
        if results[name]["kind"] == "base" and results[name]["samples"]:
            sample = results[name]["samples"][0]
            does = "continues" if "drawn" in sample else "completes"
            parts += [f"It {does}", fenced(sample["prompt"]), "with", fenced(sample["likeliest"])]
    parts += ["## Training"] if pictures else []
    parts += [_picture(folder, caption, png) for caption, png in (pictures or {}).items() if png.is_file()]
    parts += ["## Cost", _cost_table(costs), _COST] if costs else []
    result = folder / "results.md"
    result.write_text(page(*parts), encoding="utf-8")
    return result


def _table(evaluations: Mapping[str, Path]) -> str:
    lines = []
    for row in summary_rows(evaluations).to_dict("records"):
        metric = METRICS[row["metric"]]
        text = metric.text
        ours = (row["model"], metric.title, text(row["value"]), f"{text(row['low'])} to {text(row['high'])}")
        theirs = ("", "", "")
        if pandas.notna(row["baseline"]):
            theirs = (row["baseline"], text(row["baseline_value"]), row["verdict"])
        lines.append((*ours, *theirs))
    header = ("model", "metric", "value", "95 % interval", "beside", "its value", "the model is")
    return table(header, lines, numbers_from=2)


_COST = (
    "*Alone* is the training and the evaluation of a model, *whole chain* all that it is made of as well, whenever it was "
    "built. Models share stages, so whole chains must not be added up. An attempt failed if its trainer did not get to the end."
)


def _cost_table(costs: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, card in costs.items():
        for title, key in (("alone", "alone"), ("whole chain", "whole_chain")):
            total = card[key]
            spent = (energy(total["training_energy_joules"]), money(total["money"], card["currency"]))
            attempts = f"{total['failed_attempts']} of {total['training_attempts']}"
            lines.append((name, title, duration(total["seconds"]), f"{total['training_tokens']:,}", *spent, attempts))
    header = ("model", "", "time", "training tokens", "energy of training", "money", "failed attempts")
    return table(header, lines, numbers_from=2)


def _picture(folder: Path, caption: str, png: Path) -> str:
    """Copy a picture beside the page, under a name of its own, and show it."""
    name = "-".join("".join(letter if letter.isalnum() else " " for letter in caption).split()) + ".png"
    shutil.copyfile(png, folder / name)
    return f"![{caption}]({name})"
