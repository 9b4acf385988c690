"""Batches: what the model reads at a step. A pure function of (seed, step), so a resumed run needs no iterator's state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gptcore.errors import CorpusError, SettingsError
from gptcore.tokens.objectives import IGNORED, Batch, Causal, Excerpts, Flags, Ids, Objective, blank
from gptcore.tokens.shards import SourceStream, Split

_POOL = 32
"""Batches whose rows are sorted by length together, so that little is padding."""


class Batches(Protocol):
    """Every batch of an endless training run, by its step."""

    tokens_per_step: float
    """Mean number of tokens, padding left out."""

    def at(self, step: int) -> Batch:
        """The global batch of `step` (from 0), over all micro-batches and processes."""

    def longest(self, rows: int) -> Batch:
        """So many rows, each as long as any; for its shapes, whatever it says."""


class StreamBatches:
    """Windows over the text as one stream or, with a `mixture`, over each of its sources as one."""

    def __init__(
        self, split: Split, objective: Objective, batch: int, seed: int, mixture: Mapping[str, float] | None = None
    ) -> None:
        """`mixture`: share of the rows by source, scaled to sum to 1; 0 leaves a source out.

        Raises `SettingsError` for a source without a share, `CorpusError` for too little text.
        """
        self.objective, self.batch, length = objective, batch, objective.reads
        self.tokens_per_step = float(batch * length)
        if mixture is None:
            self.shares = [1.0]
            self.streams = [Windows(split, length, [seed], "the training text")]
            return
        if unnamed := ", ".join(source for source in split.sources if source not in mixture):
            raise SettingsError(f"training.mixture does not name {unnamed}: give every source a share, 0 leaves one out")
        total = sum(mixture.values())
        used = sorted(source for source, share in mixture.items() if share)
        self.shares = [mixture[source] / total for source in used]
        self.streams = [
            Windows(split.of(source), length, [seed, number], f"the source {source} of training.mixture")
            for number, source in enumerate(used, 1)
        ]

    def at(self, step: int) -> Batch:
        """The global batch of `step`: (batch, context)."""
        rows = dealt(step * self.batch, (step + 1) * self.batch, self.shares)
        ids, starts, epochs = zip(*(self.streams[stream].at(place) for stream, place in rows), strict=True)
        return self.objective.of_text(Excerpts(np.stack(ids), np.array(starts), np.array(epochs)))

    def longest(self, rows: int) -> Batch:
        """(rows, context)."""
        return blank(self.objective, rows)


class Windows:
    """Windows of one stream without end; each epoch cuts elsewhere and deals in another order."""

    def __init__(self, stream: Split | SourceStream, context: int, seed: Sequence[int], name: str) -> None:
        self.stream, self.context, self.seed = stream, context, seed
        # Any offset below `context` leaves this many windows, each with one more token as the last label.
        self.per_epoch = (stream.tokens - context) // context
        if self.per_epoch < 1:
            raise CorpusError(
                f"{name} has {stream.tokens} tokens, too few for one context of {context} at every offset "
                f"({2 * context} are needed): give more text or lower model.context"
            )
        self._epoch = -1
        self._order: Ids = np.empty(0, np.int64)
        self._offset = 0

    def at(self, place: int) -> tuple[Ids, int, int]:
        """The window at a place, (context + 1,), where it begins in the stream, and its epoch."""
        epoch, index = divmod(place, self.per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng([*self.seed, epoch])
            self._epoch, self._offset = epoch, int(random.integers(self.context))
            self._order = random.permutation(self.per_epoch)
        start = self._offset + int(self._order[index]) * self.context
        return self.stream.window(start, self.context + 1).astype(np.int64), start, epoch


def dealt(first: int, last: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """Stream and place in that stream of the rows `first` to `last - 1`, where each stream has its share of all rows.

    Place i of a stream with share w is due at (i + 1/2) / w, and rows come in the order in which they are due. So whatever the
    number of rows n, each of k streams has had n w of them, give or take 1/2 + k w / 2 (Webster's apportionment; Balinski and
    Young, Fair Representation, 1982).
    """
    slack = len(shares)  # n rows are due at n, give or take half as much
    begins = [max(0, round(share * (first - slack))) for share in shares]
    due = [
        ((place + 0.5) / share, stream, place)
        for stream, (share, begin) in enumerate(zip(shares, begins, strict=True))
        for place in range(begin, math.ceil(share * (last + slack)) + 1)
    ]
    skipped = first - sum(begins)
    return [(stream, place) for _, stream, place in sorted(due)[skipped : skipped + last - first]]


class RowBatches:
    """Rows of a task, each for itself, padded on the right; the loss is on the answer only."""

    def __init__(self, split: Split, objective: Objective, batch: int, seed: int) -> None:
        if split.documents < 1:
            raise CorpusError("the task has no training rows: give it more text")
        self.split, self.objective, self.batch, self.seed = split, objective, batch, seed
        self.lengths = np.array([len(split.document(row)) for row in range(split.documents)])
        self.steps_per_epoch = -(-split.documents // batch)
        self.tokens_per_step = float(self.lengths.sum() / self.steps_per_epoch)
        self._epoch = -1
        self._batches: list[npt.NDArray[np.intp]] = []

    def at(self, step: int) -> Batch:
        """The global batch of `step`: (batch or fewer at an epoch's end, longest row)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._deal(np.random.default_rng([self.seed, epoch]))
        return self.objective.of_rows(_rows(self.split, self._batches[index]))

    def longest(self, rows: int) -> Batch:
        """(rows, longest row)."""
        return self.objective.of_rows(_rows(self.split, np.full(rows, self.lengths.argmax())))

    def _deal(self, random: np.random.Generator) -> list[npt.NDArray[np.intp]]:
        """Batches of rows of similar length, in random order."""
        order = random.permutation(self.split.documents)
        pools = [order[start : start + self.batch * _POOL] for start in range(0, len(order), self.batch * _POOL)]
        rows = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        batches = [rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]
        return [batches[index] for index in random.permutation(len(batches))]


def _rows(split: Split, rows: npt.NDArray[np.intp]) -> list[tuple[Ids, Flags]]:
    """Ids of rows of a masked split, and which of them are the answer."""
    return [(split.document(int(row)).astype(np.int64), split.mask(int(row)) > 0) for row in rows]


@dataclass(frozen=True)
class HeldOut:
    """A fixed part of the validation split, the same at every measurement."""

    batches: tuple[Batch, ...]
    text_bytes: int
    """UTF-8 bytes of the text behind the labels; 0 where the loss is on answers only."""

    @property
    def labels(self) -> int:
        """Number of tokens that are predicted."""
        return sum(batch.learned for batch in self.batches)


def held_out_stream(split: Split, objective: Objective, batch: int, tokens: int) -> dict[str, HeldOut]:
    """Whole documents, drawn once and for all, up to about `tokens`, by source.

    The documents of a source are one stream, cut into windows; control symbols are not counted. Only where every token is
    learned are the labels all of the text, so that it has a number of bytes.
    """
    chosen: dict[str, list[int]] = {}
    total = 0
    for document in map(int, np.random.default_rng(0).permutation(split.documents)):
        chosen.setdefault(split.source(document), []).append(document)
        total += len(split.document(document))
        if total >= tokens:
            break
    return {
        source: HeldOut(
            _windows(np.concatenate([split.document(document) for document in documents]).astype(np.int64), objective, batch),
            sum(split.bytes(document) for document in documents) if isinstance(objective, Causal) else 0,
        )
        for source, documents in sorted(chosen.items())
    }


def _windows(stream: Ids, objective: Objective, batch: int) -> tuple[Batch, ...]:
    """A stream (N,) as batches of windows, the last of them filled up with padding."""
    length = objective.reads
    windows = -(-(len(stream) - 1) // length)
    stream = np.pad(stream, (0, windows * length + 1 - len(stream)), constant_values=objective.symbols.pad)
    starts = np.arange(windows) * length
    cut = np.lib.stride_tricks.sliding_window_view(stream, length + 1)[starts]
    return tuple(
        _without_controls(objective.of_text(Excerpts(cut[part], starts[part], np.zeros(len(cut[part]), np.int64))), objective)
        for part in (slice(start, start + batch) for start in range(0, windows, batch))
    )


def _without_controls(batch: Batch, objective: Objective) -> Batch:
    """A batch whose labels are text only."""
    return replace(batch, labels=np.where(np.isin(batch.labels, objective.symbols.control), IGNORED, batch.labels))


def held_out_rows(split: Split, objective: Objective, batch: int, tokens: int) -> HeldOut:
    """Rows of a task, drawn once and for all, up to about `tokens`, of similar length side by side."""
    lengths = np.array([len(split.document(row)) for row in range(split.documents)])
    order = np.random.default_rng(0).permutation(split.documents)
    order = order[: int(np.searchsorted(np.cumsum(lengths[order]), tokens)) + 1]
    order = order[np.argsort(lengths[order], kind="stable")]
    return HeldOut(tuple(objective.of_rows(_rows(split, order[at : at + batch])) for at in range(0, len(order), batch)), 0)
