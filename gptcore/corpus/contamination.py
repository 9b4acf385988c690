"""Whether texts overlap: shared n-grams of words (Brown et al. 2020, appendix C), as 64-bit hashes.

A word is a run of letters and digits in lower case; in scripts written without spaces (Han, kana) every character is a word.
Hashes are the same on every machine and in every version of Python and numpy.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_WORD_ASCII = re.compile(r"\w+", re.ASCII)

# Odd 64-bit constants of splitmix64 (Steele et al. 2014); any odd ones would do.
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_BASE = np.uint64(0xBF58476D1CE4E5B9)
_MIX = np.uint64(0x94D049BB133111EB)


def words(text: str) -> list[str]:
    """The words of a text, in lower case and in order."""
    text = text.lower()
    return (_WORD_ASCII if text.isascii() else _WORD).findall(text)


def ngram_hashes(text: str, n: int) -> Hashes:
    """Hashes of the different n-grams of a text, sorted. (grams,) uint64.

    A text of fewer than `n` words counts as one gram of all its words, so that equal short texts are seen; a text without
    words has none.
    """
    found = words(text)
    if not found:
        return np.empty(0, np.uint64)
    size = min(n, len(found))
    ids = np.fromiter(map(_word_id, found), np.uint64, len(found)) * _SPREAD
    count = len(found) - size + 1
    grams = ids[:count].copy()
    for offset in range(1, size):
        grams *= _BASE
        grams += ids[offset : offset + count]
    grams ^= grams >> np.uint64(31)
    grams *= _MIX
    grams ^= grams >> np.uint64(29)
    return np.unique(grams)


def shares_in_train(held_out: Sequence[Hashes], train: Iterable[Hashes]) -> NDArray[np.float64]:
    """For every held-out text the share of its n-grams that stand anywhere in train. (texts,) in 0..1; 0 without n-grams.

    Memory grows with the held-out texts only; train is a stream.
    """
    shares = np.zeros(len(held_out))
    if not any(grams.size for grams in held_out):
        return shares
    pool = np.unique(np.concatenate(held_out))
    seen = np.zeros(pool.size, np.bool_)
    for grams in train:
        seen[_found(pool, grams)] = True
    for number, grams in enumerate(held_out):
        if grams.size:
            shares[number] = seen[np.searchsorted(pool, grams)].mean()
    return shares


@dataclass(frozen=True)
class Protected:
    """The n-grams of a task's test rows, which must not stand in the text that the base learns from."""

    task: str
    hashes: Hashes
    """Sorted; a gram that stands in several rows comes several times. (grams,)"""
    rows: NDArray[np.int32]
    """Number of the row that each gram stands in. (grams,)"""
    sizes: NDArray[np.int32]
    """Different grams of each row. (rows,)"""

    @classmethod
    def of(cls, task: str, texts: Iterable[str], n: int) -> Self:
        """Protect these texts, one a row."""
        grams = [ngram_hashes(text, n) for text in texts]
        hashes = np.concatenate([np.empty(0, np.uint64), *grams])
        sizes = np.array([part.size for part in grams], np.int32)
        rows = np.repeat(np.arange(len(grams), dtype=np.int32), sizes)
        order = np.argsort(hashes, kind="stable")
        return cls(task, hashes[order], rows[order], sizes)

    def is_held_by(self, grams: Hashes, max_overlap: float) -> bool:
        """Whether a text shares more than `max_overlap` of its own n-grams, or of a row's, with any one row.

        Both ways round: a part that was cut out of a long row is all row, though it holds little of it.
        """
        if not self.hashes.size:
            return False
        first = _found(self.hashes, grams)
        if not first.size:
            return False
        last = np.searchsorted(self.hashes, self.hashes[first], side="right")
        rows = np.concatenate([self.rows[start:end] for start, end in zip(first, last, strict=True)])
        held = np.bincount(rows, minlength=self.sizes.size)
        return bool((held > max_overlap * np.minimum(self.sizes, grams.size)).any())

    def save(self, path: Path) -> None:
        """Write `protected.npz`; equal n-grams give equal bytes."""
        np.savez(path, hashes=self.hashes, rows=self.rows, sizes=self.sizes)

    @classmethod
    def load(cls, path: Path, task: str) -> Self:
        """Read `protected.npz`."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(task, arrays["hashes"], arrays["rows"], arrays["sizes"])


@lru_cache(maxsize=2**18)
def _word_id(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))


def _found(pool: Hashes, grams: Hashes) -> NDArray[np.intp]:
    """First places in the sorted `pool` of those `grams` that stand in it."""
    places: NDArray[np.intp] = np.searchsorted(pool, grams)
    places[places == pool.size] = 0
    return places[np.equal(pool[places], grams)]
