"""What people see of a tokenizer and of shards. Nothing here enters the digest."""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptcore.artifacts import write_json
from gptcore.corpus.report import table
from gptcore.tokens.learned import LearnedTokenizer

_SHOWN = 20


class Drawn(NamedTuple):
    """A document that was drawn from a split."""

    source: str
    text: str


class Piece(NamedTuple):
    """An entry of the vocabulary and how often it was used in the text it was learned from."""

    id: int
    piece: str
    kind: str
    """`control`, `byte` or `text`."""
    score: float
    characters: int
    uses: int


def write_tokenizer_report(
    folder: Path, tokenizer: LearnedTokenizer, sample: Sequence[Drawn], held_out: Sequence[Drawn]
) -> dict[str, float | int | str]:
    """Write report.md, report.json and pieces.csv; returns vocabulary, bytes per token and the share of byte tokens.

    Bytes per token are measured on held-out documents, or on the sample when there are none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measured = _measure(tokenizer, held_out or sample)
    total = _with_shares(sum(measured.values(), Counter()))
    pieces = _pieces(tokenizer, sample)
    with (folder / "pieces.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Piece._fields)
        writer.writerows(pieces)
    learned = [piece for piece in pieces if piece.kind == "text"]
    report = {
        "vocabulary": tokenizer.vocabulary,
        "digest": tokenizer.digest,
        "sample_documents": len(sample),
        "sample_characters": sum(len(document.text) for document in sample),
        "measured_on": "valid" if held_out else "the sample",
        "all": total,
        "sources": {source: _with_shares(count) for source, count in measured.items()},
        "rarest": [piece._asdict() for piece in sorted(learned, key=lambda piece: (piece.uses, piece.id))[:_SHOWN]],
        "longest": [piece._asdict() for piece in sorted(learned, key=lambda piece: (-piece.characters, piece.id))[:_SHOWN]],
    }
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(_tokenizer_page(report), encoding="utf-8")
    return {
        "vocabulary": tokenizer.vocabulary,
        "bytes_per_token": total["bytes_per_token"],
        "byte_fallback_share": total["byte_fallback_share"],
    }


def write_shards_report(folder: Path, counts: Mapping[tuple[str, str, str], int]) -> None:
    """Write tokens.csv and report.md from {(source, split, `documents` | `tokens` | `bytes`): count}."""
    folder.mkdir(parents=True, exist_ok=True)
    header = ("source", "split", "documents", "tokens", "bytes", "bytes_per_token")
    rows: list[tuple[Any, ...]] = []
    for source, split in dict.fromkeys((source, split) for source, split, _ in counts):
        documents, tokens, size = (counts[source, split, kind] for kind in ("documents", "tokens", "bytes"))
        rows.append((source, split, documents, tokens, size, f"{size / max(1, tokens):.4f}"))
    with (folder / "tokens.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    shown = [[f"{value:,}" if isinstance(value, int) else value for value in row] for row in rows]
    page = f"# Shards\n\nControl symbols count as tokens; nothing was cropped.\n\n{table(header, shown)}\n"
    (folder / "report.md").write_text(page, encoding="utf-8")


def _measure(tokenizer: LearnedTokenizer, documents: Sequence[Drawn]) -> dict[str, Counter[str]]:
    """Per source the documents, their bytes and tokens, and the tokens that spell a byte."""
    is_byte = np.array([tokenizer.is_byte(token) for token in range(tokenizer.vocabulary)])
    counts: dict[str, Counter[str]] = {}
    for document, ids in zip(documents, tokenizer.encode_arrays(document.text for document in documents), strict=True):
        count = counts.setdefault(document.source, Counter())
        count.update(documents=1, bytes=len(document.text.encode()), tokens=len(ids), byte_tokens=int(is_byte[ids].sum()))
    return counts


def _with_shares(count: Mapping[str, int]) -> dict[str, Any]:
    tokens = max(1, count["tokens"])
    return {**count, "bytes_per_token": count["bytes"] / tokens, "byte_fallback_share": count["byte_tokens"] / tokens}


def _pieces(tokenizer: LearnedTokenizer, sample: Sequence[Drawn]) -> list[Piece]:
    uses: npt.NDArray[np.int64] = np.zeros(tokenizer.vocabulary, np.int64)
    for ids in tokenizer.encode_arrays(document.text for document in sample):
        uses += np.bincount(ids, minlength=tokenizer.vocabulary)
    pieces = []
    for token in range(tokenizer.vocabulary):
        kind = "control" if token in tokenizer.control_ids else "byte" if tokenizer.is_byte(token) else "text"
        text = tokenizer.piece(token)
        pieces.append(Piece(token, text, kind, round(tokenizer.score(token), 4), len(text), int(uses[token])))
    return pieces


def _tokenizer_page(report: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            f"{counts['documents']:,}",
            f"{counts['bytes']:,}",
            f"{counts['tokens']:,}",
            f"{counts['bytes_per_token']:.3f}",
            f"{counts['byte_fallback_share']:.3%}",
        ]
        for name, counts in [*report["sources"].items(), ("**all**", report["all"])]
    ]
    sections = [
        "# Tokenizer",
        f"{report['vocabulary']:,} pieces, learned from {report['sample_characters']:,} characters in "
        f"{report['sample_documents']:,} training documents. Measured on {report['measured_on']}:",
        table(("source", "documents", "bytes", "tokens", "bytes per token", "tokens that spell a byte"), rows),
        "All pieces, with their uses in the text they were learned from, are in `pieces.csv`.",
        f"## Longest pieces\n\n{_listed(report['longest'])}",
        f"## Rarest pieces\n\n{_listed(report['rarest'])}",
    ]
    return "\n\n".join(sections) + "\n"


def _listed(pieces: Sequence[Mapping[str, Any]]) -> str:
    """Pieces in quotes, so that white space is seen."""
    shown = [json.dumps(piece["piece"], ensure_ascii=False).replace("`", "'") for piece in pieces]
    return table(("piece", "uses"), [[f"`{text}`", f"{piece['uses']:,}"] for text, piece in zip(shown, pieces, strict=True)])
