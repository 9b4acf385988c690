"""Batches as tensors: what the model reads, what it should say, and how the tokens stand to each other."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptcore.model.layout import Layout, sight
from gptcore.tokens.objectives import Batch


class Inputs(NamedTuple):
    """Tokens (B, T), labels (B, T) and their layout."""

    tokens: Tensor
    labels: Tensor
    layout: Layout | None = None


def inputs(batch: Batch, device: torch.device, rows: slice = slice(None)) -> Inputs:
    """Some rows of a batch, on a device."""

    def moved(array: Any) -> Tensor | None:
        return None if array is None else torch.from_numpy(array[rows]).to(device, non_blocking=True)

    tokens, labels, places, spans, parts, exposed = (
        moved(array) for array in (batch.tokens, batch.labels, batch.places, batch.spans, batch.parts, batch.exposed)
    )
    assert tokens is not None
    assert labels is not None
    if places is None and parts is None and exposed is None:
        return Inputs(tokens, labels)
    mask = None if parts is None and exposed is None else sight(tokens.shape[1], parts, exposed, device)
    return Inputs(tokens, labels, Layout(places, spans, mask))
