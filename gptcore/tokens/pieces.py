"""The file of a sentencepiece model, which is a protocol buffer: read without a library, and its scores rounded in place.

Fields as in sentencepiece_model.proto: https://github.com/google/sentencepiece/blob/v0.2.1/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from gptcore.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Types of pieces."""
_UNIGRAM, _BPE = 1, 2
_INTEGER, _BYTES = 0, 2
"""Kinds of fields; the rest are numbers of a fixed size."""
_FINEST = 256
"""Scores are multiples of 1 / this. sentencepiece adds them in float32, which is exact then up to 2^16 nats, some 30,000
characters: equally likely ways to cut a text stay equal, and who adds in float64 takes the same one of them."""


class Piece(NamedTuple):
    """An entry of the vocabulary."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class Pieces:
    """A sentencepiece model."""

    pieces: tuple[Piece, ...]
    algorithm: str
    """`unigram` or `bpe`."""
    byte_fallback: bool
    normalisation: bytes
    """What replaces characters before all else, in sentencepiece's own form; empty: nothing does."""
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_pieces(model: bytes) -> Pieces:
    """Raises `TokenizerError` for what is no sentencepiece model, or of another kind than unigram and bpe."""
    try:
        top = list(_fields(model, 0, len(model)))
        pieces = tuple(_piece(_values(model[start:end])) for number, _, start, end in top if number == 1)
        trainer, normaliser = (
            _values(next((model[start:end] for number, _, start, end in top if number == wanted), b"")) for wanted in (2, 3)
        )
        algorithm = {_UNIGRAM: "unigram", _BPE: "bpe"}[trainer.get(3, _UNIGRAM)]
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError, struct.error) as error:
        raise TokenizerError("it is no unigram or bpe model of sentencepiece") from error
    if not pieces:
        raise TokenizerError("it is no model of sentencepiece: it has no pieces")
    return Pieces(
        pieces, algorithm, bool(trainer.get(35)), normaliser.get(2, b""), bool(normaliser.get(3, 1)), bool(normaliser.get(4, 1))
    )


def with_rounded_scores(model: bytes) -> bytes:
    """The same model with scores that are multiples of 1 / 256."""
    rounded = bytearray(model)
    for number, _, start, end in _fields(model, 0, len(model)):
        for inner, _, at, _ in _fields(model, start, end) if number == 1 else ():
            if inner == 2:
                score = struct.unpack_from("<f", model, at)[0]
                struct.pack_into("<f", rounded, at, round(score * _FINEST) / _FINEST)
    return bytes(rounded)


def _piece(values: dict[int, Any]) -> Piece:
    return Piece(values[1].decode(), struct.unpack("<f", values[2])[0] if 2 in values else 0.0, values.get(3, NORMAL))


def _values(message: bytes) -> dict[int, Any]:
    """Field number -> integer, or bytes."""
    return {
        number: _varint(message, start)[0] if kind == _INTEGER else message[start:end]
        for number, kind, start, end in _fields(message, 0, len(message))
    }


def _fields(message: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number and kind of every field, and where its value lies."""
    while at < end:
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _INTEGER:
            after = _varint(message, at)[1]
        elif kind == _BYTES:
            size, at = _varint(message, at)
            after = at + size
        else:
            after = at + {1: 8, 5: 4}[kind]
        if after > end:
            raise IndexError
        yield key >> 3, kind, at, after
        at = after


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, and where it ends."""
    value = shift = 0
    while True:
        value |= (message[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if message[at - 1] < 0x80:
            return value, at
