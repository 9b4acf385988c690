"""What the sources hold that a corpus does not, and both as one corpus.

    old corpus ─┬──────────────────────────▶ ┐
                ▼ subtract                   ├─ unite ─▶ corpus-all, the old corpus of the next round
    sources ─▶ corpus-new ─────────────────▶ ┘

No test document of any round is train of any round. A text is known by its content, so files that were moved, sorted or
extended bring nothing twice; a group keeps the split it has; new train documents that hold an old held-out one are set aside,
and so are new held-out documents that stand in train, old or new. An old held-out document that new train documents hold only
together is retired: it is no longer tested on, and its text is train never.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptcore.artifacts import REPORT, write_json
from gptcore.config import CorpusConfig, FilesSource, SplitConfig
from gptcore.corpus.build import read_split, write_split
from gptcore.corpus.contamination import Protected, ngram_hashes, shares_in_train
from gptcore.corpus.document import Document
from gptcore.corpus.prepare import Corpus, gather, load_protected, separate
from gptcore.corpus.report import count, table, write_counts, write_set_aside
from gptcore.corpus.splitting import SPLITS, SplitName

Documents = Mapping[SplitName, Sequence[Document]]
Numbers = dict[str, float | int | str]

EARLIER = "earlier_versions"
"""In whose test new train documents must not stand."""
_RETIRED = "retired.json"
_FILES = "files.json"


def build_new(
    folder: Path, config: CorpusConfig, split: SplitConfig, old: Path, identities: Mapping[str, Mapping[str, Any]],
    protected: Sequence[Path] = (), home: Path | None = None,
) -> Numbers:  # fmt: skip
    """Fill `folder` like a corpus with what the sources hold and the corpus `old` does not; splits may be empty.

    `identities`: what every source is right now; of files whose content was read before, none is read again.
    `protected`: finished examples artifacts. Raises `SourceError` for a source that cannot be read.
    """
    tasks, before = [load_protected(path) for path in protected], read_all(old)
    seen = _files_of(old)
    skip = {
        source.name: {name for name, digest in identities[source.name].items() if digest in seen.get(source.name, ())}
        for source in config.sources
        if isinstance(source, FilesSource)
    }
    corpus = gather(config, split, home, skip)
    gone = [entry["text"] for entry in _retired(old)]
    retired = subtract(corpus, before, split, tasks, gone)
    for name in SPLITS:
        write_split(folder / "data" / f"{name}.parquet", corpus.documents[name], name)
    write_json(folder / _RETIRED, [{"source": d.source, "id": d.id, "text": content(d.text)} for d in retired])
    numbers = _numbers(corpus.documents)
    numbers |= {"retired": len(retired), "set_aside": len(corpus.aside), "files_passed": sum(map(len, skip.values()))}
    write_files(folder, config, identities, seen)
    _write_report(folder / REPORT, corpus, numbers)
    return numbers


def build_all(folder: Path, old: Path, new: Path) -> Numbers:
    """Fill `folder` with the corpus `old` and what was added to it, `new`, as one corpus."""
    retired = _retired(new)
    united = unite(read_all(old), read_all(new), {(entry["source"], entry["id"]) for entry in retired})
    for name in SPLITS:
        write_split(folder / "data" / f"{name}.parquet", united[name], name)
    write_json(folder / _RETIRED, [*_retired(old), *retired])
    (folder / REPORT).mkdir()
    write_json(folder / REPORT / _FILES, _files_of(new))
    numbers = _numbers(united)
    _write_card(folder / REPORT, "# Data card: corpus, old and new", numbers)
    return numbers


def read_all(corpus: Path) -> dict[SplitName, list[Document]]:
    """Every document of a corpus artifact."""
    columns = ("id", "text", "source", "group", "meta")
    return {
        name: [
            Document(identity, text, source, group, json.loads(meta))
            for identity, text, source, group, meta in read_split(corpus, name)[list(columns)].itertuples(index=False)
        ]
        for name in SPLITS
    }


def subtract(
    corpus: Corpus, old: Documents, split: SplitConfig, tasks: Sequence[Protected] = (), gone: Collection[str] = ()
) -> list[Document]:
    """Leave in `corpus`, which was gathered, only what is new beside `old`, and may be; returns old documents to retire.

    `gone`: `content` of texts that were retired before.
    """
    _keep_unknown(corpus, old, gone)
    held_out = [document for name in SPLITS[1:] for document in old[name]]
    old_train = [ngram_hashes(document.text, split.ngram) for document in old["train"]]
    earlier = Protected.of(EARLIER, (document.text for document in held_out), split.ngram)
    separate(corpus, split, [*tasks, earlier], old_train)
    new_train = [ngram_hashes(document.text, split.ngram) for document in corpus.documents["train"]]
    if not new_train:
        return []
    shares = shares_in_train([ngram_hashes(document.text, split.ngram) for document in held_out], [*old_train, *new_train])
    return [document for document, share in zip(held_out, shares, strict=True) if share > split.max_overlap]


def unite(old: Documents, new: Documents, retired: Collection[tuple[str, str]]) -> dict[SplitName, list[Document]]:
    """Old and new documents of each split, without the held-out ones whose (source, id) is in `retired`."""
    kept = {
        name: [document for document in old[name] if name == "train" or (document.source, document.id) not in retired]
        for name in SPLITS
    }
    return {name: [*kept[name], *new[name]] for name in SPLITS}


def write_files(
    folder: Path, config: CorpusConfig, identities: Mapping[str, Mapping[str, Any]], seen: Mapping[str, Collection[str]]
) -> None:
    """Note in the report of a corpus which files, by their sha256, it and the one it was added to were read from."""
    files = {
        source.name: sorted({*seen.get(source.name, ()), *map(str, identities[source.name].values())})
        for source in config.sources
        if isinstance(source, FilesSource)
    }
    (folder / REPORT).mkdir(exist_ok=True)
    write_json(folder / REPORT / _FILES, {**{name: sorted(digests) for name, digests in seen.items()}, **files})


def _files_of(corpus: Path) -> dict[str, list[str]]:
    """sha256 of the files that a corpus was read from, by source; none where it does not say."""
    try:
        files: dict[str, list[str]] = json.loads((corpus / REPORT / _FILES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return files


def _retired(corpus: Path) -> list[dict[str, str]]:
    """Source, id and content of held-out documents that are no longer tested on; none where nothing was added yet."""
    try:
        retired: list[dict[str, str]] = json.loads((corpus / _RETIRED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return retired


def _keep_unknown(corpus: Corpus, old: Documents, gone: Collection[str]) -> None:
    """Set aside texts that `old` holds, and give every other one a place of its own: a free id, and the split of its group."""
    before = [(name, document) for name in SPLITS for document in old[name]]
    texts = {*gone, *(content(document.text) for _, document in before)}
    places = {(document.source, document.id) for _, document in before}
    groups = {document.group: name for name, document in before}
    found = corpus.documents
    corpus.documents = {name: [] for name in SPLITS}
    for name in SPLITS:
        for document in found[name]:
            if (key := content(document.text)) in texts:
                corpus.set_aside(document, "known")
                continue
            if (document.source, document.id) in places:  # the same row or file with another text
                document = replace(document, id=f"{document.id}@{key[:12]}")
            corpus.documents[groups.get(document.group, name)].append(document)


def content(text: str) -> str:
    """What tells two texts apart, in 32 characters."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------------------------------- report --


def _numbers(documents: Documents) -> Numbers:
    numbers: Numbers = {}
    for name in SPLITS:
        numbers[f"{name}_documents"] = len(documents[name])
        numbers[f"{name}_bytes"] = sum(len(document.text.encode()) for document in documents[name])
    return numbers


def _write_report(folder: Path, corpus: Corpus, numbers: Numbers) -> None:
    folder.mkdir(exist_ok=True)
    counts = count(corpus)
    write_counts(folder / "counts.csv", counts)
    write_set_aside(folder / "set_aside.parquet", corpus.aside)
    rows = [(entry.source, entry.outcome, f"{entry.documents:,}", f"{entry.bytes / 1e6:.3f}") for entry in counts]
    became = "## What became of every source\n\n" + table(("source", "outcome", "documents", "MB"), rows)
    passed = f"{numbers['files_passed']:,} files were known and not read again."
    retired = f"{numbers['retired']:,} old held-out documents are retired, because the new text holds them."
    _write_card(folder, "# Data card: new text", numbers, became, passed, retired)


def _write_card(folder: Path, title: str, numbers: Numbers, *parts: str) -> None:
    rows = [(name, f"{numbers[f'{name}_documents']:,}", f"{int(numbers[f'{name}_bytes']) / 1e6:.3f}") for name in SPLITS]
    text = "\n\n".join([title, table(("split", "documents", "MB"), rows), *parts]) + "\n"
    (folder / "card.md").write_text(text, encoding="utf-8")
