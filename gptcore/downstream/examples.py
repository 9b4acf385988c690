"""The stage `examples`: from a source to the rows of a task, in the splits of the corpus.

read ─▶ clean ─▶ find rows ─▶ deduplicate ─▶ deal by group ─┬─▶ train ─────────────────────────────────┬─▶ draw ─▶ write
          │          │            │                         └─▶ valid, test: without what stands in train ─┘
          └──────────┴────────────┴──▶ set aside, with its reason
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gptcore.artifacts import REPORT, write_json
from gptcore.config import PythonDocsSource, SplitConfig, TaskConfig
from gptcore.corpus.cleaning import clean, objection
from gptcore.corpus.contamination import Protected, ngram_hashes, shares_in_train
from gptcore.corpus.document import Document, SetAside
from gptcore.corpus.sources import read_source
from gptcore.corpus.splitting import SPLITS, SplitName, split_of
from gptcore.corpus.tables import write_parquet
from gptcore.downstream.classify import frequent_labels
from gptcore.downstream.report import write_examples_report
from gptcore.downstream.row import Row
from gptcore.downstream.tasks import TASKS
from gptcore.errors import CorpusError, SettingsError


@dataclass
class Examples:
    """Rows in their splits, what was set aside, and the counts that both add up to."""

    rows: dict[SplitName, list[Row]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    aside: list[SetAside] = field(default_factory=list)
    texts_read: int = 0
    overlapping: dict[SplitName, float] = field(default_factory=dict)
    """valid and test: share of their rows that were set aside because they stand in train."""


def build_examples(
    folder: Path, task: TaskConfig, split: SplitConfig, workers: int = 1, home: Path | None = None
) -> dict[str, float | int | str]:
    """Fill `folder` with data/{train,valid,test}.parquet, protected.npz, task.json and report/; returns counts.

    The data has the columns id, input, target, group, split, meta; `protected.npz` the n-grams of the test rows, which must
    not stand in the text that the base learns from. A row stands in the split of its group, as in the corpus. With a
    `home`, parsed Python is remembered there. Equal sources and settings give equal bytes.
    Raises `SettingsError` for a source without answers, `SourceError` for one that cannot be read and `CorpusError` when a
    split is left with fewer than `split.minimum` rows.
    """
    _check_answers(task)
    examples = Examples()
    rows = _usable(task, _read(task, workers, home, examples), examples)
    for row in rows:
        examples.rows[split_of(row.document.group, split)].append(row)
    _separate(examples, split)
    _draw(examples, task, split.seed)
    labels = _labels(examples) if task.type == "classify" else []
    _check_enough(examples, task, split)
    (folder / "data").mkdir(parents=True)
    for name in SPLITS:
        _write_split(folder / "data" / f"{name}.parquet", examples.rows[name], name)
    Protected.of(task.name, (row.text for row in examples.rows["test"]), split.ngram).save(folder / "protected.npz")
    described = {"type": task.type, "name": task.name, "labels": labels, "max_new_tokens": task.max_new_tokens}
    write_json(folder / "task.json", described)
    write_examples_report(folder / REPORT, task, split, examples.rows, examples.aside, examples.overlapping)
    return _numbers(examples, labels)


def _check_answers(task: TaskConfig) -> None:
    if not isinstance(task.source, PythonDocsSource) and task.source.target is None:
        raise SettingsError(
            f"task {task.name}: its source {task.source.name} names no column with answers; "
            "set `target` of the source to the column that holds them"
        )


def _read(task: TaskConfig, workers: int, home: Path | None, examples: Examples) -> Iterator[Document]:
    """Cleaned documents; what cannot be used goes to `examples.aside`."""
    for item in read_source(task.source, workers, home):
        examples.texts_read += 1
        if isinstance(item, SetAside):
            examples.aside.append(item)
            continue
        target = None if item.target is None else clean(item.target)
        document = replace(item, text=clean(item.text), target=target)
        reason = objection(document.text, 1) or (None if target is None else _objection_to_answer(target))
        if reason is not None:
            examples.aside.append(SetAside.of(document, reason))
        else:
            yield document


def _objection_to_answer(target: str) -> str | None:
    """As `objection`; that an answer is empty is the task's to say."""
    reason = objection(target, 0)
    return None if reason == "empty" else reason


def _usable(task: TaskConfig, documents: Iterable[Document], examples: Examples) -> list[Row]:
    """The rows that the task finds, each input once, and of `classify` those with frequent labels."""
    found = TASKS[task.type].find_rows(documents, task)
    examples.aside += found.aside
    rows: list[Row] = []
    seen: set[bytes] = set()
    for row in found.rows:
        key = hashlib.blake2b(row.input.encode(), digest_size=16).digest()
        if key in seen:
            examples.aside.append(row.set_aside("duplicate"))
        else:
            seen.add(key)
            rows.append(row)
    if task.type != "classify":
        return rows
    frequent = frequent_labels(rows, task.min_label_share)
    examples.aside += [row.set_aside("rare_label") for row in rows if row.target not in frequent]
    return [row for row in rows if row.target in frequent]


def _separate(examples: Examples, split: SplitConfig) -> None:
    """Set aside held-out rows that stand in train. All of train counts, drawn or not, so that the test set stays the same."""
    held_out = [row for name in SPLITS[1:] for row in examples.rows[name]]
    train = (ngram_hashes(row.text, split.ngram) for row in examples.rows["train"])
    shares = shares_in_train([ngram_hashes(row.text, split.ngram) for row in held_out], train)
    start = 0
    for name in SPLITS[1:]:
        rows = examples.rows[name]
        overlaps = shares[start : start + len(rows)] > split.max_overlap
        start += len(rows)
        examples.overlapping[name] = round(float(overlaps.mean()), 4) if rows else 0.0
        examples.rows[name] = [row for row, overlap in zip(rows, overlaps, strict=True) if not overlap]
        examples.aside += [row.set_aside("overlaps_train") for row, overlap in zip(rows, overlaps, strict=True) if overlap]


def _labels(examples: Examples) -> list[str]:
    """The labels of the training rows; held-out rows with another one are set aside."""
    labels = {row.target for row in examples.rows["train"]}
    for name in SPLITS[1:]:
        examples.aside += [row.set_aside("label_not_in_train") for row in examples.rows[name] if row.target not in labels]
        examples.rows[name] = [row for row in examples.rows[name] if row.target in labels]
    return sorted(labels)


def _draw(examples: Examples, task: TaskConfig, seed: int) -> None:
    """Keep at most `max_rows` training rows and `max_test_rows` test rows: those whose hash of seed, source and id is least."""
    limits: dict[SplitName, int | None] = {"train": task.max_rows, "test": task.max_test_rows}
    for name, limit in limits.items():
        rows = examples.rows[name]
        if limit is None or len(rows) <= limit:
            continue
        keys = [hashlib.sha256(f"{seed}:{row.document.source}:{row.document.id}".encode()).digest() for row in rows]
        border = sorted(keys)[limit]
        examples.rows[name] = [row for row, key in zip(rows, keys, strict=True) if key < border]
        examples.aside += [row.set_aside("not_drawn") for row, key in zip(rows, keys, strict=True) if key >= border]


def _check_enough(examples: Examples, task: TaskConfig, split: SplitConfig) -> None:
    """Raise one `CorpusError` that counts what is there and says what to change, unless every split holds the minimum."""
    have = {name: len(rows) for name, rows in examples.rows.items()}
    if min(have.values()) >= split.minimum:
        return
    reasons = Counter(item.reason for item in examples.aside).most_common()
    aside = ", ".join(f"{number} {reason}" for reason, number in reasons) or "nothing"
    limits = [name for name in ("max_rows", "max_test_rows") if (getattr(task, name) or split.minimum) < split.minimum]
    advice = f"raise {' and '.join(limits)}" if limits else "give it more text, raise split.valid and split.test"
    rows = ", ".join(f"{number} {name}" for name, number in have.items())
    raise CorpusError(
        f"task {task.name} has too few rows: {rows}, each split needs {split.minimum} ("
        f"{examples.texts_read} texts were read and {aside} set aside); {advice} or lower split.minimum"
    )


def _write_split(path: Path, rows: Sequence[Row], split: SplitName) -> None:
    columns: dict[str, list[str]] = {
        "id": [row.document.id for row in rows],
        "input": [row.input for row in rows],
        "target": [row.target for row in rows],
        "group": [row.document.group for row in rows],
        "split": [split] * len(rows),
        "meta": [json.dumps(row.document.meta, ensure_ascii=False, sort_keys=True) for row in rows],
    }
    write_parquet(path, columns)


def _numbers(examples: Examples, labels: Sequence[str]) -> dict[str, float | int | str]:
    numbers: dict[str, float | int | str] = {"texts_read": examples.texts_read, "set_aside": len(examples.aside)}
    numbers |= {f"{name}_rows": len(examples.rows[name]) for name in SPLITS}
    numbers |= {f"{name}_overlapping": share for name, share in examples.overlapping.items()}
    return numbers | ({"labels": len(labels)} if labels else {})
