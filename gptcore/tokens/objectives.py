"""What is learned from a text: its next tokens, hidden tokens, or hidden spans. Excerpts of ids in, batches out; numpy only.

    text     the cat sat on the mat
    causal   the cat sat on the mat            → cat sat on the mat …
    masked   the ? sat on the mat              →     cat
    prefix   the ? on the mat  | [ cat sat     →               cat sat ]      what stands before | sees all of itself

What hides a token is the control symbol for what has no piece, which no text ever yields. What is hidden is a function of
(seed, epoch, place in the text), so a resumed run hides the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gptcore.config import MaskingConfig, ModelConfig
from gptcore.errors import TokenizerError
from gptcore.tokens.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

IGNORED = -100
"""Label of what is not learned from (torch's default)."""
NO_MASK = -1
PAD_TO = 16
"""Rows of a task are padded to a multiple of this, so that few shapes occur."""
_KEPT, _RANDOM = 0.1, 0.1
"""Shares of the hidden tokens that stay what they are, or become any other (Devlin et al. 2019, section 3.1)."""
_SPAN = 3.0
"""Mean length of the short spans (Du et al. 2022, section 2.1)."""


@dataclass(frozen=True)
class Batch:
    """Tokens (B, T) and what is learned at each of them (B, T), both int64; labels are IGNORED where nothing is learned.

    The rest says how the tokens stand to each other, where that is not one text from left to right.
    """

    tokens: Ids
    labels: Ids
    places: Ids | None = None
    """Position of every token (B, T); unset: 0, 1, …"""
    spans: Ids | None = None
    """Position inside of a hidden span, from 1, and 0 around it (B, T)."""
    parts: Ids | None = None
    """Number of the part, such as a document, that each token belongs to and sees alone (B, T)."""
    exposed: Flags | None = None
    """Tokens that all of their part see, also those before them (B, T)."""

    @property
    def learned(self) -> int:
        """Number of labels."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class Excerpts:
    """Pieces of a text that was cut, and where they come from."""

    ids: Ids
    """(B, reads + 1): the last of each is only predicted."""
    starts: Ids
    """Place of the first token in the text (B)."""
    epochs: Ids
    """How often the text was read before (B)."""


class Objective(Protocol):
    """How windows and rows become batches."""

    @property
    def reads(self) -> int:
        """Tokens of text in a row of a batch."""

    @property
    def symbols(self) -> "Symbols":
        """The tokenizer's."""

    def of_text(self, excerpts: Excerpts) -> Batch:
        """What is learned from windows of a text."""

    def of_rows(self, rows: Sequence[tuple[Ids, Flags]]) -> Batch:
        """What is learned from a task's rows, each ids and which of them are the answer; padded on the right."""


def objective(model: ModelConfig, masking: MaskingConfig, symbols: "Symbols", seed: int) -> Objective:
    """The objective of a model's settings. Raises `TokenizerError` where it lacks what hides tokens."""
    if model.objective != "causal" and symbols.mask == NO_MASK:
        raise TokenizerError(
            f"the {model.objective} objective hides tokens, but this tokenizer has no symbol that does: "
            "set model.objective to causal"
        )
    if model.objective == "masked":
        return Masked(model.context, symbols, model.document_mask, masking, seed)
    if model.objective == "prefix":
        return Prefix(model.context, symbols, model.document_mask, masking, seed)
    return Causal(model.context, symbols, model.document_mask)


def blank(objective: Objective, rows: int) -> Batch:
    """What is made of windows of a text that is zeros, (rows, context): for its shapes."""
    zeros = np.zeros((rows, objective.reads + 1), np.int64)
    return objective.of_text(Excerpts(zeros, zeros[:, 0], zeros[:, 0]))


@dataclass(frozen=True)
class Symbols:
    """Ids that an objective writes itself or leaves alone."""

    mask: int
    """NO_MASK where the tokenizer has none, which only the causal objective does without."""
    begin: int
    end: int
    pad: int
    control: Ids
    """All of the control symbols."""
    vocabulary: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Symbols":
        """Those of a tokenizer."""
        control = np.array(sorted(tokenizer.control_ids), np.int64)
        mask = tokenizer.mask_id if tokenizer.has_mask else NO_MASK
        return cls(mask, tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id, control, tokenizer.vocabulary)


def documents(ids: Ids, begin: int) -> tuple[Ids, Ids]:
    """Number of the document of every token of windows (B, T), and the token's place in it, as far as the window shows it."""
    begins = ids == begin
    place = np.arange(ids.shape[1])
    return begins.cumsum(1), place - np.maximum.accumulate(np.where(begins, place, 0), 1)


@dataclass(frozen=True)
class Causal:
    """Every token from those before it."""

    reads: int
    symbols: Symbols
    document_mask: bool = False

    def of_text(self, excerpts: Excerpts) -> Batch:
        """(B, reads)."""
        tokens = excerpts.ids[:, :-1]
        parts, places = documents(tokens, self.symbols.begin) if self.document_mask else (None, None)
        return Batch(tokens, excerpts.ids[:, 1:], places=places, parts=parts)

    def of_rows(self, rows: Sequence[tuple[Ids, Flags]]) -> Batch:
        """(B, longest row)."""
        made = [Batch(ids[None, :-1], np.where(answer[1:], ids[1:], IGNORED)[None]) for ids, answer in rows]
        return padded(made, self.symbols.pad)


@dataclass(frozen=True)
class Masked:
    """Hidden tokens from all around them: of ten that are to be learned eight are hidden, one is replaced, one stays."""

    reads: int
    symbols: Symbols
    document_mask: bool
    masking: MaskingConfig
    seed: int

    def of_text(self, excerpts: Excerpts) -> Batch:
        """(B, reads)."""
        text, symbols = excerpts.ids[:, :-1], self.symbols
        epochs = excerpts.epochs if self.masking.anew else np.zeros_like(excerpts.epochs)
        place = excerpts.starts[:, None] + np.arange(text.shape[1])
        chance, fate, other = (_chances(self.seed, salt, epochs[:, None], place) for salt in range(3))
        chance = np.where(np.isin(text, symbols.control), 2.0, chance)
        # Where chance hides nothing of a window its likeliest token is learned, so that no batch is without a label.
        least = chance.min(1, keepdims=True)
        learned = (chance < np.maximum(self.masking.share, np.nextafter(least, 3.0))) & (chance < 1.0)
        pieces = np.setdiff1d(np.arange(symbols.vocabulary), symbols.control)
        tokens = np.where(learned & (fate >= _KEPT), symbols.mask, text)
        tokens = np.where(learned & (fate >= 1.0 - _RANDOM), pieces[(other * len(pieces)).astype(np.int64)], tokens)
        parts, places = documents(tokens, symbols.begin) if self.document_mask else (None, None)
        exposed = None if parts is None else np.ones(text.shape, np.bool_)
        return Batch(tokens, np.where(learned, text, IGNORED), places, parts=parts, exposed=exposed)

    def of_rows(self, rows: Sequence[tuple[Ids, Flags]]) -> Batch:  # noqa: ARG002  (the protocol's)
        """Never asked for: the settings refuse tasks of such a model."""
        raise AssertionError("a masked model answers no tasks")


@dataclass(frozen=True)
class Prefix:
    """Hidden spans, one token after the other, from the text around them (GLM, Du et al. 2022).

    In a share of the rows many short spans are hidden, in the others one long one at the end, between half of the text and all
    of it: from the first a model learns to understand, from the second to continue.
    """

    context: int
    symbols: Symbols
    document_mask: bool
    masking: MaskingConfig
    seed: int

    @property
    def reads(self) -> int:
        """Every short span costs a token that hides it and one that begins it; there is room for one at least."""
        return max(1, min(self.context - 2, math.floor(self.context / (1.0 + 2.0 * self.masking.share / _SPAN))))

    def of_text(self, excerpts: Excerpts) -> Batch:
        """(B, context)."""
        text = excerpts.ids[:, :-1]
        parts, places = documents(text, self.symbols.begin)
        rows = []
        for row, (start, epoch) in enumerate(zip(excerpts.starts, excerpts.epochs, strict=True)):
            random = np.random.default_rng([self.seed, int(epoch) if self.masking.anew else 0, int(start)])
            spans = self._short(random) if random.random() < self.masking.short else self._long(random)
            if self.document_mask:
                spans = [_within(parts[row], *span) for span in spans]
                rows.append(infilled(text[row], spans, self.symbols, places[row], parts[row]))
            else:
                rows.append(infilled(text[row], spans, self.symbols))
        return padded(rows, self.symbols.pad, self.context)

    def _short(self, random: np.random.Generator) -> list[tuple[int, int]]:
        """Spans of about three tokens, never side by side, in random order; together the share that is hidden."""
        length = self.reads
        most = max(1, min((self.context - length) // 2, (length + 1) // 2))
        sizes = np.maximum(1, random.poisson(_SPAN, most))
        hidden = np.minimum(sizes.cumsum(), max(1, round(self.masking.share * length)))
        sizes = np.diff(hidden, prepend=0)
        sizes = sizes[sizes > 0]
        free = length - int(sizes.sum()) - (len(sizes) - 1)
        before = np.sort(random.integers(0, free + 1, len(sizes)))
        starts = before + np.concatenate([[0], (sizes[:-1] + 1).cumsum()])
        spans = [(int(start), int(start + size)) for start, size in zip(starts, sizes, strict=True)]
        return [spans[index] for index in random.permutation(len(spans))]

    def _long(self, random: np.random.Generator) -> list[tuple[int, int]]:
        """One span from somewhere in the first half to the end."""
        return [(int(random.integers(0, self.reads // 2 + 1)), self.reads)]

    def of_rows(self, rows: Sequence[tuple[Ids, Flags]]) -> Batch:
        """The answer is the one span, at the end of the question."""
        made = [infilled(ids, [(int(answer.argmax()), len(ids))], self.symbols) for ids, answer in rows]
        return padded(made, self.symbols.pad)


def _within(parts: Ids, start: int, end: int) -> tuple[int, int]:
    """A span, cut where the part (N) that it begins in ends."""
    return start, start + int((parts[start:end] == parts[start]).sum())


def infilled(
    text: Ids, spans: Sequence[tuple[int, int]], symbols: Symbols, places: Ids | None = None, parts: Ids | None = None
) -> Batch:
    """A row (1, T): `text` (N) with every span (from, to) hidden by one token, then the spans in their order, each after BEGIN.

    A span's tokens stand at the place of what hides it and are told apart by their place inside. The last one predicts END,
    except where the text itself ends. `places` and `parts` are those of the text; unset, it is one document.
    """
    places = np.arange(len(text)) if places is None else places
    hidden, first = np.zeros((2, len(text)), np.bool_)
    for start, end in spans:
        hidden[start:end], first[start] = True, True
    around = np.flatnonzero(~hidden | first)
    tokens, labels = [np.where(first, symbols.mask, text)[around]], [np.full(len(around), IGNORED)]
    origin, inside = [around], [np.zeros(len(around), np.int64)]  # whose place and part a token has; its place in a span
    for start, end in spans:
        wanted = text[start:end] if end == len(text) else np.append(text[start:end], symbols.end)
        tokens.append(np.concatenate([[symbols.begin], wanted[:-1]]))
        labels.append(wanted)
        origin.append(np.full(len(wanted), start))
        inside.append(1 + np.arange(len(wanted)))
    at = np.concatenate(origin)
    return Batch(
        np.concatenate(tokens)[None], np.concatenate(labels)[None], places[at][None], np.concatenate(inside)[None],
        None if parts is None else parts[at][None], (np.arange(len(at)) < len(around))[None],
    )  # fmt: skip


def padded(rows: Sequence[Batch], pad: int, width: int | None = None) -> Batch:
    """Rows (1, T) below each other, padded on the right to `width` or to the longest; nobody sees the padding."""
    width = width or -(-max(row.tokens.shape[1] for row in rows) // PAD_TO) * PAD_TO

    def below(name: str, filler: int) -> Any:
        arrays = [getattr(row, name) for row in rows]
        if arrays[0] is None:
            return None
        return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=filler) for a in arrays])

    fillers = {"tokens": pad, "labels": IGNORED, "places": 0, "spans": 0, "parts": -1, "exposed": False}
    return Batch(**{name: below(name, filler) for name, filler in fillers.items()})


def _chances(seed: int, salt: int, epoch: Ids, place: Ids) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for every token, from its epoch and place: SplitMix64 (Steele et al. 2014) of all that tells it."""
    state = np.zeros(np.broadcast_shapes(epoch.shape, place.shape), np.uint64)
    for part in (seed, salt, epoch, place):
        state = state + np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53
