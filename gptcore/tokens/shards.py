"""Token ids on disk: flat files that are memory-mapped, with the documents' boundaries beside them. Nothing is cropped.

<folder>/index.json                  dtype, vocabulary, tokenizer, masked, sources, and per split its counts and shards
<folder>/<split>/00000.tokens        the ids one after the other, raw little-endian uint16 or uint32
<folder>/<split>/00000.offsets.npy   int64, (documents + 1,): where each document begins and the last one ends
<folder>/<split>/00000.bytes.npy     int64, (documents,): UTF-8 bytes of the text behind each document
<folder>/<split>/00000.sources.npy   uint16, (documents,): which of the index's sources each document came from
<folder>/<split>/00000.mask          raw uint8, 1 where a token is learned; of tasks only
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from gptcore.artifacts import write_json
from gptcore.corpus.splitting import SPLITS
from gptcore.errors import ArtifactError, CorruptArtifactError, TokenizerError

INDEX = "index.json"
Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Mask = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
Sources = npt.NDArray[np.uint16]
_SOURCE = np.dtype("<u2")
_COUNT = np.dtype("<i8")


class ShardWriter:
    """Writes documents of token ids, split by split; a document is never cut at a file's end. Used as a context manager.

    The index is written last, when the block ends without an error.
    """

    def __init__(self, folder: Path, vocabulary: int, tokenizer: str, tokens_per_shard: int, *, masked: bool = False) -> None:
        self._folder, self._vocabulary, self._limit, self._masked = folder, vocabulary, tokens_per_shard, masked
        self._dtype = np.dtype("<u2" if vocabulary <= 2**16 else "<u4")
        self._index: dict[str, Any] = {
            "dtype": "uint16" if vocabulary <= 2**16 else "uint32",
            "vocabulary": vocabulary,
            "tokenizer": tokenizer,
            "masked": masked,
            "sources": [],
            "splits": {split: {"documents": 0, "tokens": 0, "bytes": 0, "shards": []} for split in SPLITS},
        }
        self._open: dict[str, _OpenShard] = {}
        self._sources: dict[str, int] = {}

    def add(self, split: str, ids: Sequence[int], text_bytes: int, mask: Sequence[int] | None = None, source: str = "") -> None:
        """Append a document to a split. `mask` (of a masked writer) has one 0 or 1 per id; the rows of a task name no source.

        Raises `TokenizerError` for an id outside the vocabulary.
        """
        assert (None if mask is None else len(mask)) == (len(ids) if self._masked else None)
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self._vocabulary:
            raise TokenizerError(f"token ids outside 0..{self._vocabulary - 1}: encode with the tokenizer of these shards")
        shard = self._open.get(split)
        if shard is not None and shard.offsets[-1] and shard.offsets[-1] + array.size > self._limit:
            self._close(split)
            shard = None
        if shard is None:
            place = self._folder / split / f"{len(self._index['splits'][split]['shards']):05}"
            shard = self._open[split] = _OpenShard(place, masked=self._masked)
        shard.tokens.write(array.astype(self._dtype).tobytes())
        if shard.mask is not None:
            shard.mask.write(np.asarray(mask, dtype=np.uint8).tobytes())
        shard.offsets.append(shard.offsets[-1] + array.size)
        shard.bytes.append(text_bytes)
        shard.sources.append(self._sources.setdefault(source, len(self._sources)))

    def _close(self, split: str) -> None:
        shard = self._open.pop(split)
        shard.close()
        counts = {"documents": len(shard.bytes), "tokens": shard.offsets[-1], "bytes": sum(shard.bytes)}
        total = self._index["splits"][split]
        total["shards"].append({"name": shard.place.name, **counts})
        for key, count in counts.items():
            total[key] += count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for split in list(self._open):
            self._close(split)
        if error is None:
            self._index["sources"] = list(self._sources)
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / INDEX, self._index)


class _OpenShard:
    """The files of one shard while they are written."""

    def __init__(self, place: Path, *, masked: bool) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        self.place = place
        self.tokens = place.with_suffix(".tokens").open("wb")
        self.mask: IO[bytes] | None = place.with_suffix(".mask").open("wb") if masked else None
        self.offsets, self.bytes, self.sources = [0], list[int](), list[int]()

    def close(self) -> None:
        self.tokens.close()
        if self.mask is not None:
            self.mask.close()
        np.save(self.place.with_suffix(".offsets.npy"), np.array(self.offsets, _COUNT))
        np.save(self.place.with_suffix(".bytes.npy"), np.array(self.bytes, _COUNT))
        np.save(self.place.with_suffix(".sources.npy"), np.array(self.sources, _SOURCE))


class Shards:
    """A folder of shards, opened for reading. Opening checks every file's size against the index."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.dtype: np.dtype[Any] = np.dtype(index["dtype"]).newbyteorder("<")
        self.vocabulary: int = index["vocabulary"]
        self.tokenizer: str = index["tokenizer"]
        """Digest of the tokenizer that made the ids."""
        self.masked: bool = index["masked"]
        self.sources: tuple[str, ...] = tuple(index["sources"])
        """Names of those that the documents came from."""
        self._splits = {
            name: Split([_Shard(folder / name, shard, self) for shard in split["shards"]], self.dtype, self.sources)
            for name, split in index["splits"].items()
        }

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Memory-map a folder. Raises `ArtifactError` when it holds no shards, `CorruptArtifactError` naming a wrong file."""
        folder = Path(folder)
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            return cls(folder, index)
        except FileNotFoundError as error:
            if Path(error.filename).name == INDEX:
                raise ArtifactError(f"{folder} holds no shards: {INDEX} is missing") from None
            raise _corrupt(Path(error.filename), "is missing") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _corrupt(folder / INDEX, f"cannot be read ({error})") from error

    def split(self, name: str) -> "Split":
        """`train`, `valid` or `test`."""
        return self._splits[name]


class Split:
    """The documents of a split over all its shards; arrays are views of the files, in their dtype."""

    def __init__(self, shards: Sequence["_Shard"], dtype: np.dtype[Any], sources: tuple[str, ...]) -> None:
        self._shards, self._dtype = shards, dtype
        self.sources = sources
        """Of all splits: one may have no document here."""
        self._first_document = np.cumsum([0, *(shard.documents for shard in shards)])
        self._first_token = np.cumsum([0, *(len(shard.tokens) for shard in shards)])

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self._first_document[-1])

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self._first_token[-1])

    def document(self, index: int) -> Tokens:
        """Ids of a document. (length,)"""
        shard, inside = self._locate(index)
        return shard.tokens[shard.offsets[inside] : shard.offsets[inside + 1]]

    def mask(self, index: int) -> Mask:
        """1 where a token of the document is learned; all ones in shards without a mask. (length,)"""
        shard, inside = self._locate(index)
        start, end = shard.offsets[inside], shard.offsets[inside + 1]
        return np.ones(end - start, np.uint8) if shard.mask is None else shard.mask[start:end]

    def bytes(self, index: int) -> int:
        """UTF-8 bytes of the text behind a document; of a task's row, of its answer."""
        shard, inside = self._locate(index)
        return int(shard.bytes[inside])

    def source(self, index: int) -> str:
        """Name of the source that a document came from."""
        shard, inside = self._locate(index)
        return self.sources[int(shard.sources[inside])]

    def of(self, source: str) -> "SourceStream":
        """The documents of one source as a stream of their own; empty where there are none."""
        number = self.sources.index(source) if source in self.sources else -1
        mine = np.concatenate([[False], *(shard.sources == number for shard in self._shards), [False]])
        offsets = zip(self._first_token, self._shards, strict=False)
        bounds = np.concatenate([*(first + shard.offsets[:-1] for first, shard in offsets), [self.tokens]])
        runs = bounds[np.flatnonzero(mine[1:] != mine[:-1])].reshape(-1, 2)
        return SourceStream(self, runs)

    def window(self, start: int, length: int) -> Tokens:
        """`length` ids from `start` on, over all documents as one stream. (length,)"""
        if not 0 <= start <= start + length <= self.tokens:
            raise IndexError(f"tokens {start} to {start + length} of {self.tokens}")
        parts: list[Any] = []
        shard = int(np.searchsorted(self._first_token, start, side="right")) - 1
        while length and shard < len(self._shards):
            inside = start - int(self._first_token[shard])
            part = self._shards[shard].tokens[inside : inside + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self._dtype), *parts])

    def _locate(self, index: int) -> "tuple[_Shard, int]":
        """The shard of a document and its number there."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of {self.documents}")
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        return self._shards[shard], index - int(self._first_document[shard])


class SourceStream:
    """The tokens of one source, as if there were no others."""

    def __init__(self, split: Split, runs: Counts) -> None:
        """`runs`: begin and end, in the split, of documents that follow one another. (runs, 2)"""
        self._split, self._begins = split, runs[:, 0]
        self._first = np.cumsum([0, *(runs[:, 1] - runs[:, 0])])

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self._first[-1])

    def window(self, start: int, length: int) -> Tokens:
        """`length` ids from `start` on, over the documents of the source. (length,)"""
        if not 0 <= start <= start + length <= self.tokens:
            raise IndexError(f"tokens {start} to {start + length} of {self.tokens}")
        end = start + length
        parts: list[Any] = [self._split.window(0, 0)]
        for run in range(int(np.searchsorted(self._first, start, side="right")) - 1, int(np.searchsorted(self._first, end))):
            first, last = max(start, int(self._first[run])), min(end, int(self._first[run + 1]))
            parts.append(self._split.window(int(self._begins[run]) + first - int(self._first[run]), last - first))
        return np.concatenate(parts)


class _Shard:
    """The files of one shard, memory-mapped and held against the index."""

    def __init__(self, folder: Path, entry: dict[str, Any], of: Shards) -> None:
        place = folder / entry["name"]
        self.documents: int = entry["documents"]
        self.tokens: Tokens = _map(place.with_suffix(".tokens"), of.dtype, entry["tokens"])
        self.mask: Mask | None = _map(place.with_suffix(".mask"), np.dtype(np.uint8), entry["tokens"]) if of.masked else None
        self.offsets: Counts = _load(place.with_suffix(".offsets.npy"), entry["documents"] + 1, _COUNT)
        self.bytes: Counts = _load(place.with_suffix(".bytes.npy"), entry["documents"], _COUNT)
        self.sources: Sources = _load(place.with_suffix(".sources.npy"), entry["documents"], _SOURCE)
        if self.offsets[0] != 0 or self.offsets[-1] != entry["tokens"] or (np.diff(self.offsets) < 0).any():
            raise _corrupt(place.with_suffix(".offsets.npy"), f"does not divide the {entry['tokens']} tokens of its shard")
        if self.bytes.sum() != entry["bytes"]:
            raise _corrupt(place.with_suffix(".bytes.npy"), f"does not add up to the {entry['bytes']} bytes of its shard")
        if (self.sources >= len(of.sources)).any():
            raise _corrupt(place.with_suffix(".sources.npy"), f"names other sources than the {len(of.sources)} of {INDEX}")


def _map(path: Path, dtype: Any, count: int) -> Any:
    size, expected = path.stat().st_size, count * dtype.itemsize
    if size != expected:
        raise _corrupt(path, f"has {size} bytes instead of {expected}")
    # An empty file cannot be mapped. As a plain array a map is cut several times faster.
    return np.asarray(np.memmap(path, dtype, mode="r")) if count else np.empty(0, dtype)


def _load(path: Path, count: int, dtype: np.dtype[Any]) -> Any:
    try:
        array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise _corrupt(path, f"cannot be read ({error})") from error
    if array.shape != (count,) or array.dtype != dtype:
        raise _corrupt(path, f"holds {array.dtype} {array.shape} instead of {dtype} ({count},)")
    return array


def _corrupt(path: Path, problem: str) -> CorruptArtifactError:
    return CorruptArtifactError(f"{path} {problem}: the shards were damaged; rebuild them with: gptcore run --rebuild shards")
