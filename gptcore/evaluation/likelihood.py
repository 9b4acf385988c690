"""What every token of a text costs a model, whatever it was trained to predict.

causal   windows that advance by half a context: a token is scored with at least half a context before it
prefix   the same, where the half before it is seen whole and the other half is the hidden span
masked   windows side by side, read several times; each time every seventh token is hidden and scored, until all were
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from gptcore.model import GPT
from gptcore.model.inputs import inputs
from gptcore.model.loss import head_losses
from gptcore.tokens.objectives import IGNORED, Batch, Ids, Symbols, documents, infilled, padded

Nats = NDArray[np.float64]
_PASSES = 7
"""Of a masked model: so about as many tokens are hidden at once as in training."""


@torch.inference_mode()
def stream_nats(model: GPT, stream: Ids, symbols: Symbols, batch: int = 32) -> Nats:
    """Cross-entropy in nats of every token of a stream (N,) -> (N,); 0 where nothing is said about one, such as the first."""
    score = {"causal": _causal, "prefix": _prefix, "masked": _masked}[model.config.objective]
    return score(model, stream, symbols, batch)


# -------------------------------------------------------------------------------------------------------- causal --


def _causal(model: GPT, stream: Ids, symbols: Symbols, batch: int) -> Nats:
    nats = np.zeros(len(stream), dtype=np.float64)
    context, last = model.config.context, len(stream) - 1
    begin = min(context, last)
    if begin > 0:
        nats[1 : begin + 1] = _window_nats(model, stream, symbols, [0], begin, begin)[0]
    step = max(1, context // 2)
    # Window k scores the tokens after `begins[k] + context - step`; the last one is moved back to end with the stream.
    ends = [*range(begin + step, last, step), last] if last > begin else []
    for at in range(0, len(ends), batch):
        these = ends[at : at + batch]
        losses = _window_nats(model, stream, symbols, [end - context for end in these], context, step)
        for end, row in zip(these, losses, strict=True):
            fresh = min(step, end - begin)
            nats[end - fresh + 1 : end + 1] = row[-fresh:]
            begin = end
    return nats


def _window_nats(model: GPT, stream: Ids, symbols: Symbols, starts: list[int], length: int, scored: int) -> Nats:
    """Nats (B, scored) of the last `scored` labels of windows that read `length` tokens; only these reach the head."""
    cut = np.stack([stream[start : start + length + 1] for start in starts])
    window = Batch(cut[:, :-1], cut[:, 1:])
    if model.config.document_mask:
        parts, places = documents(window.tokens, symbols.begin)
        window = replace(window, parts=parts, places=places)
    return _losses(model, window, scored)


# -------------------------------------------------------------------------------------------------------- prefix --


def _prefix(model: GPT, stream: Ids, symbols: Symbols, batch: int) -> Nats:
    nats = np.zeros(len(stream), dtype=np.float64)
    windows = list(_windows(stream, symbols, model.config.context, model.config.document_mask))
    for at in range(0, len(windows), batch):
        these = windows[at : at + batch]
        rows = [infilled(stream[start:end], [(begin - start, end - start)], symbols) for start, begin, end in these]
        losses = _losses(model, padded(rows, symbols.pad), 0)
        for (_, begin, end), row, made in zip(these, losses, rows, strict=True):
            width = made.labels.shape[1]
            nats[begin:end] = row[width - (end - begin) : width]
    return nats


def _windows(stream: Ids, symbols: Symbols, context: int, document_mask: bool) -> Iterator[tuple[int, int, int]]:
    """Start, first hidden token and end of windows; together they hide all but the first token of each text."""
    borders = [0, len(stream)]
    if document_mask:
        borders = sorted({*borders, *np.flatnonzero(stream == symbols.begin).tolist()})
    room = context - 1  # what hides the span takes a place of its own, and the last token is only predicted
    for first, last in itertools.pairwise(borders):
        begin = first + 1
        while begin < last:
            end = min(last, first + room if begin == first + 1 else begin + max(1, context // 2))
            yield max(first, end - room), begin, end
            begin = end


# -------------------------------------------------------------------------------------------------------- masked --


def _masked(model: GPT, stream: Ids, symbols: Symbols, batch: int) -> Nats:
    nats = np.zeros(len(stream), dtype=np.float64)
    context = model.config.context
    place = np.arange(len(stream))
    open_to_all = ~np.isin(stream, symbols.control)
    for turn in range(_PASSES):
        hidden = open_to_all & (place % _PASSES == turn)
        tokens, labels = np.where(hidden, symbols.mask, stream), np.where(hidden, stream, IGNORED)
        for at in range(0, len(stream), context * batch):
            rows = [
                _around(tokens[start : start + context], labels[start : start + context], symbols, model.config.document_mask)
                for start in range(at, min(len(stream), at + context * batch), context)
            ]
            losses = _losses(model, padded(rows, symbols.pad), 0)
            for start, row in zip(range(at, len(stream), context), losses, strict=False):
                end = min(len(stream), start + context)
                nats[start:end] += row[: end - start]
    return nats


def _around(tokens: Ids, labels: Ids, symbols: Symbols, document_mask: bool) -> Batch:
    """A row (1, T) that padding must not be seen from."""
    tokens, labels = tokens[None], labels[None]
    parts, places = documents(tokens, symbols.begin)
    if not document_mask:
        parts, places = np.zeros_like(parts), np.arange(tokens.shape[1])[None]
    return Batch(tokens, labels, places, parts=parts, exposed=np.ones(tokens.shape, np.bool_))


def _losses(model: GPT, batch: Batch, scored: int) -> Nats:
    """Nats (B, scored or T) of the last labels of a batch."""
    read = inputs(batch, model.embedding.weight.device)
    hidden = model.hidden(read.tokens, layout=read.layout)[:, -scored:]  # (B, S, D)
    return head_losses(model, hidden, read.labels[:, -scored:]).double().cpu().numpy()
