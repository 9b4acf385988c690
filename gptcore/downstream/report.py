"""What people see of a task's rows: a data card, counts, samples, what was set aside. Nothing here enters the digest."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gptcore.config import SplitConfig, TaskConfig
from gptcore.corpus.document import REASONS, SetAside, explain
from gptcore.corpus.report import Count, table, write_counts, write_set_aside
from gptcore.corpus.splitting import SPLITS, SplitName
from gptcore.downstream.row import Row
from gptcore.downstream.tasks import TASKS

_SAMPLES = 5
_SHOWN = 600


def write_examples_report(
    folder: Path,
    task: TaskConfig,
    split: SplitConfig,
    rows: Mapping[SplitName, Sequence[Row]],
    aside: Sequence[SetAside],
    overlapping: Mapping[SplitName, float],
) -> None:
    """Write card.md, counts.csv, samples.md and set_aside.parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = _count(task.source.name, rows, aside)
    write_counts(folder / "counts.csv", counts)
    write_set_aside(folder / "set_aside.parquet", aside)
    (folder / "card.md").write_text(_card(task, split, rows, counts, overlapping), encoding="utf-8")
    (folder / "samples.md").write_text(_samples(task, rows["train"]), encoding="utf-8")


def _count(source: str, rows: Mapping[SplitName, Sequence[Row]], aside: Sequence[SetAside]) -> list[Count]:
    """One row per outcome: a split, or the reason for which texts were set aside."""
    counts = [
        Count(source, name, len(rows[name]), sum(len(row.document.text.encode()) for row in rows[name])) for name in SPLITS
    ]
    documents = Counter(item.reason for item in aside)
    size: Counter[str] = Counter()
    for item in aside:
        size[item.reason] += item.bytes
    return counts + [Count(source, reason, documents[reason], size[reason]) for reason in sorted(documents)]


def _card(
    task: TaskConfig,
    split: SplitConfig,
    rows: Mapping[SplitName, Sequence[Row]],
    counts: Sequence[Count],
    overlapping: Mapping[SplitName, float],
) -> str:
    held_out = ", ".join(f"{share:.1%} of {name}" for name, share in overlapping.items())
    sections = [
        f"# Data card: {task.name} ({task.type})",
        f"Rows of the source **{task.source.name}** (`{task.source.type}`). A row stands in the split of its group, as in the "
        f"corpus (valid {split.valid:.0%}, test {split.test:.0%}, seed {split.seed}). Held-out rows that share more than "
        f"{split.max_overlap:.0%} of their {split.ngram}-grams with training rows were set aside: {held_out}.",
        "## What became of every text",
        table(
            ("outcome", "texts", "MB", "meaning"),
            [
                (count.outcome, f"{count.documents:,}", f"{count.bytes / 1e6:.3f}", _explain(task, count.outcome))
                for count in counts
            ],
        ),
    ]
    if task.type == "classify":
        sections += ["## Labels", _label_table(rows)]
    else:
        sections += ["## Lengths", _length_table(rows)]
    return "\n\n".join(sections) + "\n"


def _explain(task: TaskConfig, outcome: str) -> str:
    if outcome in SPLITS:
        return "rows"
    if outcome == "not_drawn":
        return "is more than max_rows or max_test_rows asks for"
    own = TASKS[task.type].reasons
    return own[outcome] if outcome in own else explain(outcome) if outcome in REASONS else ""


def _label_table(rows: Mapping[SplitName, Sequence[Row]]) -> str:
    counts = {name: Counter(row.target for row in rows[name]) for name in SPLITS}
    lines = [[label, *(f"{counts[name][label]:,}" for name in SPLITS)] for label, _ in counts["train"].most_common()]
    return table(("label", *SPLITS), lines)


def _length_table(rows: Mapping[SplitName, Sequence[Row]]) -> str:
    lines = [
        [name, _median(len(row.input) for row in rows[name]), _median(len(row.target) for row in rows[name])] for name in SPLITS
    ]
    return table(("split", "median characters of input", "median characters of answer"), lines)


def _median(lengths: Iterable[int]) -> str:
    ordered = sorted(lengths)
    return f"{ordered[len(ordered) // 2]:,}" if ordered else "none"


def _samples(task: TaskConfig, rows: Sequence[Row]) -> str:
    """The first training rows of evenly spread places."""
    chosen = rows[:: max(1, len(rows) // _SAMPLES)][:_SAMPLES]
    parts = [f"# Samples of {task.name}"]
    for row in chosen:
        shown = row.input if len(row.input) <= _SHOWN else row.input[:_SHOWN] + " …"
        quoted = "\n".join(f"    {line}" for line in shown.splitlines())
        parts.append(f"## {row.document.id}\n\n{quoted}\n\n**Answer:** {row.target}")
    return "\n\n".join(parts) + "\n"
