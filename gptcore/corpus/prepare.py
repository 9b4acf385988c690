"""From sources to documents in three splits, with everything that was left out and why.

    read ─▶ clean ─▶ deduplicate ─▶ cut ─▶ deal by group ─┬─▶ train: without what stands in a task's test rows
              │            │                              └─▶ valid, test: without what stands in train
              └────────────┴──▶ set aside, with its reason

Every text that a source gives ends in a split or is set aside; `Corpus` counts both.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gptcore.config import CorpusConfig, FilesSource, SplitConfig
from gptcore.corpus.cleaning import clean, cut, objection
from gptcore.corpus.contamination import Hashes, Protected, ngram_hashes, shares_in_train
from gptcore.corpus.document import IN_TEST_OF, Document, SetAside
from gptcore.corpus.sources import read_source
from gptcore.corpus.splitting import SPLITS, SplitName, split_of
from gptcore.errors import ArtifactError


@dataclass
class Corpus:
    """Documents in their splits, what was set aside, and the counts that both must add up to."""

    documents: dict[SplitName, list[Document]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    aside: list[SetAside] = field(default_factory=list)
    texts_read: Counter[str] = field(default_factory=Counter)
    """Texts that each source gave, before cutting."""
    bytes_read: Counter[str] = field(default_factory=Counter)
    """Their UTF-8 bytes, after cleaning."""
    overlap: dict[SplitName, NDArray[np.float64]] = field(default_factory=dict)
    """valid and test: for every document, kept or not, the share of its n-grams that stand in train."""

    def set_aside(self, document: Document, reason: str) -> None:
        """Leave a document out."""
        self.aside.append(SetAside.of(document, reason))


def prepare(config: CorpusConfig, split: SplitConfig, protected: Sequence[Path] = (), home: Path | None = None) -> Corpus:
    """Read all sources and make of them what a corpus holds. `protected`: finished examples artifacts.

    Raises `SourceError` for a source that is missing, before any is read.
    """
    tasks = [load_protected(path) for path in protected]
    corpus = gather(config, split, home)
    separate(corpus, split, tasks)
    return corpus


def gather(
    config: CorpusConfig, split: SplitConfig, home: Path | None = None, skip: Mapping[str, Collection[str]] | None = None
) -> Corpus:
    """Read, clean and deal all sources, without looking for overlaps. `skip`: name of a source -> names of its files to pass.

    Raises `SourceError` for a source that is missing, before any is read.
    """
    skip = skip or {}
    opened = [(source, read_source(source, config.workers, home, skip.get(source.name, ()))) for source in config.sources]
    corpus = Corpus()
    seen: set[bytes] = set()
    for source, items in opened:
        each_part = isinstance(source, FilesSource) and source.group == "part"
        for document in _usable(items, config.min_characters, seen, corpus):
            for part in _parts(document, config.max_characters, each_part):
                corpus.documents[split_of(part.group, split)].append(part)
    return corpus


def load_protected(examples: Path) -> Protected:
    """The n-grams of the test rows of an examples artifact. Raises `ArtifactError` when it has none."""
    try:
        task = json.loads((examples / "task.json").read_text(encoding="utf-8"))
        return Protected.load(examples / "protected.npz", str(task["name"]))
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{examples} holds no readable test rows to protect ({error}); rebuild these examples") from error


def _usable(items: Iterable[Document | SetAside], min_characters: int, seen: set[bytes], corpus: Corpus) -> Iterator[Document]:
    """Cleaned documents, each text once; what is refused goes to `corpus.aside`."""
    for item in items:
        corpus.texts_read[item.source] += 1
        if isinstance(item, SetAside):
            corpus.bytes_read[item.source] += item.bytes
            corpus.aside.append(item)
            continue
        document = replace(item, text=clean(item.text))
        content = document.text.encode("utf-8", "surrogatepass")
        corpus.bytes_read[item.source] += len(content)
        key = hashlib.blake2b(content, digest_size=16).digest()
        reason = objection(document.text, min_characters) or ("duplicate" if key in seen else None)
        if reason is not None:
            corpus.set_aside(document, reason)
            continue
        seen.add(key)
        yield document


def _parts(document: Document, max_characters: int, each_part: bool) -> Iterator[Document]:
    """The document itself, or the parts it is cut into, `<id>#0001` and so on; `each_part` makes each a group of its own."""
    texts = cut(document.text, max_characters)
    for number, text in enumerate(texts, 1):
        identity = f"{document.id}#{number:04d}" if len(texts) > 1 else document.id
        yield replace(document, id=identity, text=text, group=identity if each_part else document.group)


def separate(corpus: Corpus, split: SplitConfig, tasks: Sequence[Protected], more_train: Sequence[Hashes] = ()) -> None:
    """Set aside train documents that hold test rows, then held-out documents that stand in train.

    `more_train`: n-grams of documents that are train as well, though they are not in this corpus.
    """
    train: list[Document] = []
    grams: list[Hashes] = []
    for document in corpus.documents["train"]:
        hashes = ngram_hashes(document.text, split.ngram)
        held = next((task.task for task in tasks if task.is_held_by(hashes, split.max_overlap)), None)
        if held is not None:
            corpus.set_aside(document, IN_TEST_OF + held)
        else:
            train.append(document)
            grams.append(hashes)
    corpus.documents["train"] = train
    held_out = [document for name in SPLITS[1:] for document in corpus.documents[name]]
    shares = shares_in_train([ngram_hashes(document.text, split.ngram) for document in held_out], [*grams, *more_train])
    border = len(corpus.documents["valid"])
    corpus.overlap = {"valid": shares[:border], "test": shares[border:]}
    for name in SPLITS[1:]:
        judged = list(zip(corpus.documents[name], corpus.overlap[name], strict=True))
        corpus.documents[name] = [document for document, share in judged if share <= split.max_overlap]
        corpus.aside += [SetAside.of(document, "overlaps_train") for document, share in judged if share > split.max_overlap]
