"""Encode a corpus: every document becomes begin, its ids, end (`Tokenizer.document`)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from gptcore.artifacts import REPORT
from gptcore.config import ShardsConfig
from gptcore.corpus.splitting import SPLITS, SplitName
from gptcore.tokens.documents import read_documents
from gptcore.tokens.report import write_shards_report
from gptcore.tokens.shards import ShardWriter
from gptcore.tokens.tokenizer import Tokenizer


def encode_corpus(folder: Path, config: ShardsConfig, corpus: Path, tokenizer: Tokenizer) -> dict[str, float | int | str]:
    """Write the shards of a corpus into `folder`; returns the tokens of each split and bytes of text per token.

    Control symbols count as tokens; nothing is cropped and no document is left out.
    """
    return _encode(folder, config, tokenizer, lambda split: read_documents(corpus, split, ["source", "text"]))


def encode_round(
    folder: Path, config: ShardsConfig, new: Path, corpus: Path, tokenizer: Tokenizer, *, replay: float, seed: int
) -> dict[str, float | int | str]:
    """Write the shards of a round: train is that of `new` and old text beside it, valid and test are those of `corpus`.

    `corpus` holds `new` too. Old text is drawn from the rest of its train until it is a share `replay` of all bytes, or all.
    """
    size = sum(len(text.encode()) for (texts,) in read_documents(new, "train", ["text"]) for text in texts)
    old = draw_old(corpus, new, round(size * replay / (1.0 - replay)), seed)

    def batches(split: SplitName) -> Iterator[list[list[str]]]:
        if split != "train":
            yield from read_documents(corpus, split, ["source", "text"])
            return
        yield from read_documents(new, split, ["source", "text"])
        yield old

    numbers = _encode(folder, config, tokenizer, batches)
    return {**numbers, "new_bytes": size, "replayed_bytes": sum(len(text.encode()) for text in old[1])}


def draw_old(corpus: Path, new: Path, wanted: int, seed: int) -> list[list[str]]:
    """Sources and texts of train documents that are in `corpus` and not in `new`, drawn until they are `wanted` bytes."""
    added = {
        place for sources, ids in read_documents(new, "train", ["source", "id"]) for place in zip(sources, ids, strict=True)
    }
    old = [
        (source, text)
        for sources, ids, texts in read_documents(corpus, "train", ["source", "id", "text"])
        for source, identity, text in zip(sources, ids, texts, strict=True)
        if (source, identity) not in added
    ]
    drawn, size = list[tuple[str, str]](), 0
    for place in np.random.default_rng(seed).permutation(len(old)):
        if size >= wanted:
            break
        drawn.append(old[place])
        size += len(old[place][1].encode())
    return [[source for source, _ in drawn], [text for _, text in drawn]]


def _encode(
    folder: Path, config: ShardsConfig, tokenizer: Tokenizer, documents: Callable[[SplitName], Iterable[list[list[str]]]]
) -> dict[str, float | int | str]:
    """Write the documents of each split, given as batches of sources and texts."""
    counts: Counter[tuple[str, str, str]] = Counter()
    with ShardWriter(folder, tokenizer.vocabulary, tokenizer.digest, config.tokens_per_shard) as writer:
        for split in SPLITS:
            for sources, texts in documents(split):
                for source, text, ids in zip(sources, texts, tokenizer.encode_batch(texts), strict=True):
                    document = tokenizer.document(ids)
                    size = len(text.encode())
                    writer.add(split, document, size, source=source)
                    counts.update({(source, split, "documents"): 1, (source, split, "tokens"): len(document)})
                    counts[source, split, "bytes"] += size
    write_shards_report(folder / REPORT, counts)
    tokens = {split: sum(counts[key] for key in counts if key[1:] == (split, "tokens")) for split in SPLITS}
    size = sum(count for (_, _, kind), count in counts.items() if kind == "bytes")
    return {
        **{f"{split}_tokens": count for split, count in tokens.items()},
        "bytes_per_token": size / max(1, sum(tokens.values())),
    }
