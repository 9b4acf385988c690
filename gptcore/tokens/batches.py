"""Batches: what the model reads at a step. A pure function of (seed, step), so a resumed run needs no iterator's state."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gptcore.errors import CorpusError
from gptcore.tokens.shards import Split

Ids = npt.NDArray[np.int64]

IGNORED = -100
"""Label of what is not learned from (torch's default)."""
_PAD_TO = 16
"""Rows are padded to a multiple of this, so that few shapes occur."""
_POOL = 32
"""Batches whose rows are sorted by length together, so that little is padding."""


@dataclass(frozen=True)
class Batch:
    """Tokens (B, T) and what follows each of them (B, T), both int64; labels are IGNORED where nothing is learned."""

    tokens: Ids
    labels: Ids


class Batches(Protocol):
    """Every batch of an endless training run, by its step."""

    tokens_per_step: float
    """Mean number of tokens, padding left out."""

    def at(self, step: int) -> Batch:
        """The global batch of `step` (from 0), over all micro-batches and processes."""


class StreamBatches:
    """Windows of `context` tokens over the text as one stream; each epoch cuts elsewhere and deals in another order."""

    def __init__(self, split: Split, context: int, batch: int, seed: int) -> None:
        self.split, self.context, self.batch, self.seed = split, context, batch, seed
        # Any offset below `context` leaves this many windows, each with one more token as the last label.
        self.windows = (split.tokens - context) // context
        if self.windows < 1:
            raise CorpusError(
                f"the training text has {split.tokens} tokens, too few for one context of {context} at every offset "
                f"({2 * context} are needed): give more text or lower model.context"
            )
        self.tokens_per_step = float(batch * context)
        self._epoch = -1
        self._order: Ids = np.empty(0, np.int64)
        self._offset = 0

    def at(self, step: int) -> Batch:
        """The global batch of `step`: (batch, context)."""
        windows = np.stack([self._window(position) for position in range(step * self.batch, (step + 1) * self.batch)])
        return Batch(windows[:, :-1], windows[:, 1:])

    def _window(self, position: int) -> Ids:
        epoch, index = divmod(position, self.windows)
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            self._epoch, self._offset = epoch, int(random.integers(self.context))
            self._order = random.permutation(self.windows)
        start = self._offset + int(self._order[index]) * self.context
        return self.split.window(start, self.context + 1).astype(np.int64)


class RowBatches:
    """Rows of a task, each for itself, padded on the right; the loss is on the answer only."""

    def __init__(self, split: Split, batch: int, pad: int, seed: int) -> None:
        if split.documents < 1:
            raise CorpusError("the task has no training rows: give it more text")
        self.split, self.batch, self.pad, self.seed = split, batch, pad, seed
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
        return pad_rows(self.split, self._batches[index], self.pad)

    def _deal(self, random: np.random.Generator) -> list[npt.NDArray[np.intp]]:
        """Batches of rows of similar length, in random order."""
        order = random.permutation(self.split.documents)
        pools = [order[start : start + self.batch * _POOL] for start in range(0, len(order), self.batch * _POOL)]
        rows = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        batches = [rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]
        return [batches[index] for index in random.permutation(len(batches))]


def pad_rows(split: Split, rows: npt.NDArray[np.intp], pad: int) -> Batch:
    """Rows (B) of a masked split as a batch; labels only where the mask says that a token is learned."""
    longest = max(len(split.document(int(row))) for row in rows) - 1
    width = -(-longest // _PAD_TO) * _PAD_TO
    tokens = np.full((len(rows), width), pad, np.int64)
    labels = np.full((len(rows), width), IGNORED, np.int64)
    for line, row in enumerate(rows):
        ids, mask = split.document(int(row)).astype(np.int64), split.mask(int(row))
        tokens[line, : len(ids) - 1] = ids[:-1]
        labels[line, : len(ids) - 1] = np.where(mask[1:] > 0, ids[1:], IGNORED)
    return Batch(tokens, labels)


@dataclass(frozen=True)
class HeldOut:
    """A fixed part of the validation split, the same at every measurement."""

    batches: tuple[Batch, ...]
    text_bytes: int
    """UTF-8 bytes of the text behind the labels; 0 where the loss is on answers only."""


def held_out_stream(split: Split, context: int, batch: int, tokens: int, control: frozenset[int]) -> HeldOut:
    """Whole documents, drawn once and for all, up to about `tokens`, as windows; control symbols are not counted."""
    chosen, total = [], 0
    for document in np.random.default_rng(0).permutation(split.documents):
        chosen.append(int(document))
        total += len(split.document(int(document)))
        if total >= tokens:
            break
    stream = np.concatenate([split.document(document) for document in chosen]).astype(np.int64)
    labels = np.where(np.isin(stream, list(control)), IGNORED, stream)[1:]
    windows = -(-len(labels) // context)
    padding = windows * context - len(labels)
    tokens_in = np.pad(stream[:-1], (0, padding)).reshape(windows, context)
    labels_in = np.pad(labels, (0, padding), constant_values=IGNORED).reshape(windows, context)
    batches = [Batch(tokens_in[at : at + batch], labels_in[at : at + batch]) for at in range(0, windows, batch)]
    return HeldOut(tuple(batches), sum(split.bytes(document) for document in chosen))


def held_out_rows(split: Split, batch: int, tokens: int, pad: int) -> HeldOut:
    """Rows of a task, drawn once and for all, up to about `tokens`, of similar length side by side."""
    lengths = np.array([len(split.document(row)) for row in range(split.documents)])
    order = np.random.default_rng(0).permutation(split.documents)
    order = order[: int(np.searchsorted(np.cumsum(lengths[order]), tokens)) + 1]
    order = order[np.argsort(lengths[order], kind="stable")]
    return HeldOut(tuple(pad_rows(split, order[at : at + batch], pad) for at in range(0, len(order), batch)), 0)
