"""Where tokens stand and what each of them may see."""

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where tokens stand and what they may see, wherever that is not one text from left to right."""

    places: Tensor | None = None
    """Position of every token, (T) or (B, T); unset: 0, 1, …"""
    spans: Tensor | None = None
    """Prefix objective: position inside of a hidden span, from 1, and 0 around it, (B, T); unset: all 0."""
    mask: Tensor | None = None
    """True where a token may look, (B or 1, 1, T, S); unset: the rule of the model."""
    segments: Tensor | None = None
    """Which part of its text a token belongs to, (B, T); unset: all to the first."""


def sight(length: int, parts: Tensor | None, exposed: Tensor | None, device: torch.device) -> Tensor:
    """Mask (B, 1, T, T) of tokens that see what stands before them and what is `exposed` (B, T), of their own part (B, T)."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]  # (1, T, T)
    if exposed is not None:
        seen = seen | exposed[:, None]  # (B, T, T)
    if parts is not None:
        seen = seen & (parts[:, :, None] == parts[:, None])
    return seen[:, None]


def banded(mask: Tensor | None, new: int, before: int, window: int, device: torch.device) -> Tensor:
    """`mask`, or the causal one, without what lies `window` tokens or more behind: (B or 1, 1, T, S) or (T, S).

    T = `new`, S = `before` + T.
    """
    seen = torch.arange(before + new, device=device)  # (S)
    place = seen[before:].unsqueeze(-1)  # (T, 1)
    near = seen > place - window  # (T, S)
    return near & (seen <= place) if mask is None else near & mask
