"""What people see of a corpus: a data card, counts, what was set aside, a picture. Nothing here enters the digest."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gptcore.config import CorpusConfig, FilesSource, HubSource, Source, SplitConfig
from gptcore.corpus.document import SetAside, explain
from gptcore.corpus.prepare import Corpus
from gptcore.corpus.splitting import SPLITS
from gptcore.corpus.tables import write_parquet


class Count(NamedTuple):
    """How much of a source ended where."""

    source: str
    outcome: str
    """`read`, a split, or the reason for which it was set aside."""
    documents: int
    """Parts of a text that was cut count one by one in the splits and where they overlap, whole texts elsewhere."""
    bytes: int


def write_report(
    folder: Path, corpus: Corpus, config: CorpusConfig, split: SplitConfig, numbers: Mapping[str, float | int | str]
) -> None:
    """Write card.md, counts.csv, set_aside.parquet and corpus.png."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = count(corpus)
    write_counts(folder / "counts.csv", counts)
    write_set_aside(folder / "set_aside.parquet", corpus.aside)
    (folder / "card.md").write_text(_card(corpus, config, split, counts, numbers), encoding="utf-8")
    _plot(folder / "corpus.png", corpus, counts)


def count(corpus: Corpus) -> list[Count]:
    """One row per source and outcome; the bytes of all outcomes of a source add up to its bytes read."""
    documents: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    for name in SPLITS:
        for document in corpus.documents[name]:
            documents[document.source, name] += 1
            size[document.source, name] += len(document.text.encode())
    for aside in corpus.aside:
        documents[aside.source, aside.reason] += 1
        size[aside.source, aside.reason] += aside.bytes
    outcomes = [*SPLITS, *sorted({reason for _, reason in documents} - set(SPLITS))]
    counts = []
    for source in corpus.texts_read:
        counts.append(Count(source, "read", corpus.texts_read[source], corpus.bytes_read[source]))
        counts += [Count(source, o, documents[source, o], size[source, o]) for o in outcomes if documents[source, o]]
    return counts


def write_counts(path: Path, counts: Sequence[Count]) -> None:
    """Write counts.csv: source, outcome, documents, bytes."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Count._fields)
        writer.writerows(counts)


def write_set_aside(path: Path, aside: Sequence[SetAside]) -> None:
    """Write what was set aside: id, source, reason and the beginning of the text."""
    columns = ("id", "source", "reason", "text")
    write_parquet(path, {column: [getattr(item, column) for item in aside] for column in columns})


# --------------------------------------------------------------------------------------------------------- card --


def _card(
    corpus: Corpus,
    config: CorpusConfig,
    split: SplitConfig,
    counts: Sequence[Count],
    numbers: Mapping[str, float | int | str],
) -> str:
    sections = [
        "# Data card: corpus",
        "## Where the text comes from",
        "\n".join(f"- **{source.name}**: {_describe(source)}" for source in config.sources),
        "The licence of every text is that of its source.",
        "## What was done to it",
        f"UTF-8 decoded, Unicode NFC, line ends `\\n`. Texts under {config.min_characters:,} characters and exact duplicates "
        f"were set aside; texts over {config.max_characters:,} characters were cut into parts, without loss. Groups were "
        f"dealt to valid ({split.valid:.0%}), test ({split.test:.0%}) and train by the hash of their name (seed {split.seed}).",
        "## What there is",
        table(("split", "documents", "MB"), [_size_row(name, numbers) for name in SPLITS]),
        "## What became of every source",
        table(
            ("source", "outcome", "documents", "MB"),
            [(c.source, c.outcome, f"{c.documents:,}", f"{c.bytes / 1e6:.3f}") for c in counts],
        ),
        "## Overlap with train",
        _overlap(corpus, split, numbers),
        "## What was set aside, and why",
        _reasons(corpus.aside),
    ]
    return "\n\n".join(sections) + "\n"


def _describe(source: Source) -> str:
    if isinstance(source, FilesSource):
        return f"files in {', '.join(f'`{path}`' for path in source.paths)}"
    if isinstance(source, HubSource):
        return f"dataset `{source.dataset}`, split `{source.split}`"
    return f"docstrings of the installed Python packages {', '.join(f'`{name}`' for name in source.packages)}"


def _size_row(name: str, numbers: Mapping[str, float | int | str]) -> tuple[str, str, str]:
    return name, f"{numbers[f'{name}_documents']:,}", f"{float(numbers[f'{name}_bytes']) / 1e6:.3f}"


def _overlap(corpus: Corpus, split: SplitConfig, numbers: Mapping[str, float | int | str]) -> str:
    rows = [
        (
            name,
            f"{len(corpus.overlap[name]):,}",
            f"{float(numbers[f'{name}_sharing_any']):.1%}",
            f"{float(numbers[f'{name}_overlapping']):.1%}",
            f"{float(numbers[f'{name}_shared_ngrams']):.2%}",
        )
        for name in SPLITS[1:]
    ]
    columns = ("split", "documents dealt", "share any", f"set aside (over {split.max_overlap:.0%})", "shared in the rest")
    return f"Shared {split.ngram}-grams of words, in lower case and without punctuation.\n\n" + table(columns, rows)


def _reasons(aside: Sequence[SetAside]) -> str:
    """A line and one example per reason."""
    if not aside:
        return "Nothing."
    documents = Counter(item.reason for item in aside)
    first = {item.reason: item for item in reversed(aside)}
    lines = []
    for reason, number in documents.most_common():
        example = first[reason]
        text = " ".join(example.text.replace("`", "'").replace("\0", "").split())[:80]
        shown = f"`{example.id}`" + (f" `{text}`" if text else "")
        lines.append(f"- `{reason}` ({number:,}): {explain(reason)}; the first: {shown}")
    return "\n".join(lines)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right where all its values are numbers."""
    numeric = [
        bool(rows) and all(row[place].strip("%").replace(",", "").replace(".", "").isdigit() for row in rows)
        for place in range(len(columns))
    ]
    lines = [columns, ["---:" if right else "---" for right in numeric], *rows]
    escaped = [[value.replace("|", "\\|") for value in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


# ------------------------------------------------------------------------------------------------------- picture --


def _plot(path: Path, corpus: Corpus, counts: Sequence[Count]) -> None:
    """Left: megabytes per source and outcome. Right: how long the documents are."""
    from matplotlib.figure import Figure  # half a second; no pyplot, which keeps state

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sources = list(corpus.texts_read)
    outcomes = list(dict.fromkeys(c.outcome for c in counts if c.outcome != "read"))
    size = {(c.source, c.outcome): c.bytes / 1e6 for c in counts}
    before = [0.0] * len(sources)
    for outcome in outcomes:
        widths = [size.get((source, outcome), 0.0) for source in sources]
        left.barh(sources, widths, 0.5, left=before, label=outcome)
        before = [start + width for start, width in zip(before, widths, strict=True)]
    left.set_xlabel("megabytes")
    left.set_title("what became of every source")
    left.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    lengths = [[len(document.text) for document in corpus.documents[name]] for name in SPLITS]
    right.hist(lengths, bins=40, histtype="step", label=list(SPLITS), log=True)
    right.set_xlabel("characters in a document")
    right.set_ylabel("documents")
    right.set_title("how long the documents are")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)
