"""Old text and new text, champion and candidate: what was learned, what was forgotten, and whether that is a bargain.

Both models are measured on the test documents of the corpus that holds old and new; the rows of either are compared document
by document with the paired bootstrap.
"""

import json
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas

from gptcore.artifacts import REPORT, write_json
from gptcore.config import EvaluationConfig
from gptcore.corpus import read_split
from gptcore.errors import ArtifactError, CorpusError
from gptcore.evaluation.comparison import Comparison, compare
from gptcore.evaluation.intervals import Interval, ratio_interval
from gptcore.evaluation.markdown import page, table

TEST_SETS = ("old", "new")
COLUMNS = ("model", "test_set", "documents", "bits_per_byte", "low", "high", "change", "verdict")
_COMPARISONS = "comparisons.json"


@dataclass(frozen=True)
class Gate:
    """Whether a candidate takes the champion's place, and why."""

    promote: bool
    reason: str
    """A sentence's end, with the numbers."""


def decide(old: Comparison, new: Comparison, max_forgetting: float, min_gain: float = 0.0) -> Gate:
    """The rule: clearly better on the new text, by `min_gain`, and surely not worse on the old by more than `max_forgetting`.

    Both limits are shares of the champion's number. Both comparisons are of candidate and champion in bits per byte, where
    lower is better. Clearly: the 95 % interval of the difference does not hold zero. Surely: its upper end counts, as in a test
    of non-inferiority.
    """
    numbers = f"new text {_change(new)}, old text {_change(old)}"
    worst = old.high / old.b
    if new.verdict != "better":
        how = "worse" if new.verdict == "worse" else "not clearly better"
        return Gate(False, f"{how} on the new text: {numbers}")
    if -new.difference / new.b < min_gain:
        return Gate(False, f"better on the new text by less than {min_gain:.1%}: {numbers}")
    if worst > max_forgetting:
        return Gate(False, f"forgets too much, the old text may cost {worst:+.1%} of {max_forgetting:.1%} allowed: {numbers}")
    return Gate(True, f"better on the new text and keeps the old: {numbers}")


def build_forgetting(folder: Path, champion: Path, candidate: Path, new: Path, config: EvaluationConfig) -> dict[str, float]:
    """Compare two evaluations on the same corpus, whose test documents that are in the corpus `new` are the new ones.

    Writes `forgetting.csv` (COLUMNS), the comparisons and a page in `report/`; returns the numbers. Raises `ArtifactError` when
    the evaluations are not of the same documents and `CorpusError` when none of them is old, or none is new.
    """
    scores = _scores(champion, candidate)
    added = read_split(new, "test")
    is_new = pandas.MultiIndex.from_frame(scores[["source", "id"]]).isin(pandas.MultiIndex.from_frame(added[["source", "id"]]))
    rows, comparisons = list[dict[str, Any]](), dict[str, Comparison]()
    for name, part in zip(TEST_SETS, (scores[~is_new], scores[is_new]), strict=True):
        if part.empty:
            raise CorpusError(f"no document of the {name} test set is left to compare on: raise split.test or give more text")
        comparisons[name] = compared = _compare(part, config)
        rows += _rows(name, part, compared, config)
    frame = pandas.DataFrame(rows, columns=list(COLUMNS)).sort_values(
        "model", ascending=False, kind="stable", ignore_index=True
    )
    frame.to_csv(folder / "forgetting.csv", index=False)
    write_json(folder / _COMPARISONS, {name: asdict(comparison) for name, comparison in comparisons.items()})
    (folder / REPORT).mkdir()
    frame.to_csv(folder / REPORT / "forgetting.csv", index=False)
    (folder / REPORT / "forgetting.md").write_text(page("# Forgetting", _EXPLAINED, as_markdown(frame)), encoding="utf-8")
    return {f"{name}_{what}": value for name, c in comparisons.items() for what, value in _numbers(c).items()}


_EXPLAINED = (
    "Bits per byte (lower is better) of the champion and of the candidate that was trained on from it, on test documents "
    "that the champion was measured on already and on new ones. Nobody was trained on either."
)


def read_forgetting(folder: Path) -> tuple[pandas.DataFrame, Comparison, Comparison]:
    """The table, and the comparisons on the old and on the new test set."""
    values = json.loads((folder / _COMPARISONS).read_text(encoding="utf-8"))
    frame = pandas.read_csv(folder / "forgetting.csv", keep_default_na=False, na_values={"change": [""]})
    return frame, Comparison(**values["old"]), Comparison(**values["new"])


def as_markdown(frame: pandas.DataFrame) -> str:
    """The forgetting table for people."""
    header = ("model", "test set", "documents", "bits per byte", "95 % interval", "change", "the candidate is")
    return table(header, (_texts(row) for row in frame.to_dict("records")), numbers_from=2)


def _texts(row: Mapping[Hashable, Any]) -> tuple[str, ...]:
    change = "" if pandas.isna(row["change"]) else f"{row['change']:+.2%}"
    between = f"{row['low']:.3f} to {row['high']:.3f}"
    return (
        row["model"], row["test_set"], f"{row['documents']:,}", f"{row['bits_per_byte']:.3f}", between, change, row["verdict"],
    )  # fmt: skip


def _scores(champion: Path, candidate: Path) -> pandas.DataFrame:
    same = ["id", "source", "bytes"]
    theirs, ours = (pandas.read_parquet(folder / "scores.parquet", columns=[*same, "bits"]) for folder in (champion, candidate))
    both = ours.merge(theirs, on=same, suffixes=("_candidate", "_champion"), validate="one_to_one")
    if not len(both) == len(theirs) == len(ours):
        raise ArtifactError(f"{champion} and {candidate} were not measured on the same documents; evaluate both models again")
    return both


def _compare(part: pandas.DataFrame, config: EvaluationConfig) -> Comparison:
    return compare(
        part["bits_candidate"], part["bits_champion"], sizes=part["bytes"], higher_is_better=False,
        resamples=config.resamples, seed=config.seed,
    )  # fmt: skip


def _rows(name: str, part: pandas.DataFrame, compared: Comparison, config: EvaluationConfig) -> list[dict[str, Any]]:
    """A row of the champion and one of the candidate."""

    def row(model: str, change: float | None, verdict: str) -> dict[str, Any]:
        draws = {"resamples": config.resamples, "seed": config.seed}
        measured: Interval = ratio_interval(part[f"bits_{model}"], part["bytes"], **draws)
        values = (model, name, len(part), measured.value, measured.low, measured.high, change, verdict)
        return dict(zip(COLUMNS, values, strict=True))

    return [row("champion", None, ""), row("candidate", compared.difference / compared.b, compared.verdict)]


def _numbers(comparison: Comparison) -> dict[str, float]:
    return {
        "champion": comparison.b, "candidate": comparison.a, "change": comparison.difference / comparison.b,
        "documents": comparison.samples,
    }  # fmt: skip


def _change(comparison: Comparison) -> str:
    return f"{comparison.a:.4f} against {comparison.b:.4f} bits per byte ({comparison.difference / comparison.b:+.1%})"
