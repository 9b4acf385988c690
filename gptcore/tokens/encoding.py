"""Encode a corpus: every document becomes begin, its ids, end."""

from collections import Counter
from pathlib import Path

from gptcore.artifacts import REPORT
from gptcore.config import ShardsConfig
from gptcore.corpus.splitting import SPLITS
from gptcore.tokens.documents import read_documents
from gptcore.tokens.report import write_shards_report
from gptcore.tokens.shards import ShardWriter
from gptcore.tokens.tokenizer import Tokenizer


def encode_corpus(folder: Path, config: ShardsConfig, corpus: Path, tokenizer: Tokenizer) -> dict[str, float | int | str]:
    """Write the shards of a corpus into `folder`; returns the tokens of each split and bytes of text per token.

    Control symbols count as tokens; nothing is cropped and no document is left out.
    """
    counts: Counter[tuple[str, str, str]] = Counter()
    with ShardWriter(folder, tokenizer.vocabulary, tokenizer.digest, config.tokens_per_shard) as writer:
        for split in SPLITS:
            for sources, texts in read_documents(corpus, split, ["source", "text"]):
                for source, text, ids in zip(sources, texts, tokenizer.encode_batch(texts), strict=True):
                    document = [tokenizer.begin_id, *ids, tokenizer.end_id]
                    size = len(text.encode())
                    writer.add(split, document, size)
                    counts.update({(source, split, "documents"): 1, (source, split, "tokens"): len(document)})
                    counts[source, split, "bytes"] += size
    write_shards_report(folder / REPORT, counts)
    tokens = {split: sum(counts[key] for key in counts if key[1:] == (split, "tokens")) for split in SPLITS}
    size = sum(count for (_, _, kind), count in counts.items() if kind == "bytes")
    return {
        **{f"{split}_tokens": count for split, count in tokens.items()},
        "bytes_per_token": size / max(1, sum(tokens.values())),
    }
