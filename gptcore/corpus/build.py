"""The stage `corpus`: one folder of parquet files that `datasets.load_dataset` opens, and a report for people."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptcore.config import CorpusConfig, SplitConfig
from gptcore.corpus.document import Document, explain
from gptcore.corpus.prepare import Corpus, prepare
from gptcore.corpus.report import write_report
from gptcore.corpus.splitting import SPLITS, SplitName
from gptcore.corpus.tables import write_parquet
from gptcore.errors import ArtifactError, CorpusError

if TYPE_CHECKING:
    import pandas


def build_corpus(
    folder: Path,
    config: CorpusConfig,
    split: SplitConfig,
    protected: Sequence[Path] = (),
    home: Path | None = None,
) -> dict[str, float | int | str]:
    """Fill `folder` with data/{train,valid,test}.parquet (id, text, source, group, split, meta) and report/.

    `protected` are finished examples artifacts, whose test rows shall not stand in train. With a `home`, parsed Python is
    remembered there. Equal sources and settings give equal bytes in data/.
    Raises `SourceError` for a source that cannot be read and `CorpusError` when a split holds fewer than `split.minimum`.
    """
    corpus = prepare(config, split, protected, home)
    _check_enough(corpus, split)
    for name in SPLITS:
        write_split(folder / "data" / f"{name}.parquet", corpus.documents[name], name)
    numbers = _numbers(corpus, split)
    write_report(folder / "report", corpus, config, split, numbers)
    return numbers


def read_split(folder: Path, split: SplitName) -> "pandas.DataFrame":
    """The documents of one split of a corpus artifact, or the rows of an examples artifact, in their order.

    Raises `ArtifactError` when they are not there.
    """
    import pandas

    path = folder / "data" / f"{split}.parquet"
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no split {split!r}: there is no {path}; rebuild it or name another folder")
    return pandas.read_parquet(path)


def write_split(path: Path, documents: Sequence[Document], split: SplitName) -> None:
    """Write the documents of one split; equal documents give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[str]] = {
        "id": [document.id for document in documents],
        "text": [document.text for document in documents],
        "source": [document.source for document in documents],
        "group": [document.group for document in documents],
        "split": [split] * len(documents),
        "meta": [json.dumps(document.meta, ensure_ascii=False, sort_keys=True) for document in documents],
    }
    write_parquet(path, columns)


def _numbers(corpus: Corpus, split: SplitConfig) -> dict[str, float | int | str]:
    """Documents and UTF-8 bytes per split, and how far valid and test overlapped with train before and after."""
    numbers: dict[str, float | int | str] = {"texts_read": corpus.texts_read.total(), "set_aside": len(corpus.aside)}
    for name in SPLITS:
        documents = corpus.documents[name]
        numbers[f"{name}_documents"] = len(documents)
        numbers[f"{name}_bytes"] = sum(len(document.text.encode()) for document in documents)
    for name, shares in corpus.overlap.items():
        kept = shares[shares <= split.max_overlap]
        numbers[f"{name}_sharing_any"] = round(float((shares > 0).mean()), 4)
        numbers[f"{name}_overlapping"] = round(float((shares > split.max_overlap).mean()), 4)
        numbers[f"{name}_shared_ngrams"] = round(float(kept.mean()), 4)
    return numbers


def _check_enough(corpus: Corpus, split: SplitConfig) -> None:
    """Raise one `CorpusError` that counts what is there and says what to change, unless every split holds the minimum."""
    have = {name: len(corpus.documents[name]) for name in SPLITS}
    if min(have.values()) >= split.minimum:
        return
    reasons = Counter(item.reason for item in corpus.aside).most_common()
    left_out = ", ".join(f"{number} {reason}" for reason, number in reasons) or "nothing"
    read = f"{corpus.texts_read.total()} texts were read and {left_out} set aside"
    if not any(have.values()):
        first = f" (the first, {corpus.aside[0].id}, {explain(corpus.aside[0].reason)})" if corpus.aside else ""
        shorter = " or lower corpus.min_characters" if "too_short" in dict(reasons) else ""
        raise CorpusError(f"the corpus is empty: {read}{first}; name other sources{shorter}")
    groups = {document.group for documents in corpus.documents.values() for document in documents}
    found = ", ".join(f"{number} {name}" for name, number in have.items())
    raise CorpusError(
        f"the corpus is too small to split: {found} documents in {len(groups)} groups are left, each split needs "
        f"{split.minimum} ({read}); {_advice(corpus, split, have, len(groups))}"
    )


def _advice(corpus: Corpus, split: SplitConfig, have: dict[SplitName, int], groups: int) -> str:
    """What would help, the most likely first."""
    total = sum(have.values())
    advice = []
    if total < 4 * split.minimum:
        advice.append("add text")
    if groups < 4 * split.minimum:
        advice.append("set `group: part` for a source of type files, which deals every part of a long text for itself")
    # Half as much again as the share that gives the minimum on average, in steps of 0.05.
    share = min(0.3, math.ceil(1.5 * split.minimum / total * 20) / 20)
    shares = {name: getattr(split, name) for name in SPLITS[1:] if have[name] < split.minimum}
    raising = [f"split.{name} to {share:g} (is {value:g})" for name, value in shares.items() if value < share]
    if raising:
        advice.append(f"raise {' and '.join(raising)}")
    if any(len(corpus.overlap[name]) >= split.minimum for name in shares):
        advice.append(f"raise split.max_overlap (is {split.max_overlap:g})")
    return ", ".join([*advice, f"or lower split.minimum (is {split.minimum})"])
