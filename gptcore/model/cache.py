"""What attention remembers of the tokens before, so that each is read once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptcore.config import ModelConfig
from gptcore.model.layout import Layout


class LayerCache:
    """Keys and values (B, G, room, K) of one layer, filled from the left."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.length = keys, values, 0

    def pick(self, rows: Tensor) -> None:
        """Keep the rows of these numbers, in their order."""
        self.keys, self.values = self.keys[rows], self.values[rows]

    def replace(self, rows: Tensor, fresh: "LayerCache") -> None:
        """Let the newest of `rows` be what `fresh` holds."""
        start = self.length - fresh.length
        self.keys[rows, :, start : self.length] = fresh.keys[:, :, : fresh.length]
        self.values[rows, :, start : self.length] = fresh.values[:, :, : fresh.length]

    def shift(self, count: int) -> None:
        """Forget the first `count` tokens."""
        for held in (self.keys, self.values):
            held[:, :, : self.length - count] = held[:, :, count : self.length].clone()
        self.length -= count

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, G, T, K) and return everything seen so far, (B, G, S, K)."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = k, v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Cache:
    """What attention remembers of the tokens before. Prompts of different lengths are padded on the left.

    With the prefix objective the last token of a prompt begins a span: it and all that follow stand at the place of the token
    before it, which hides them.
    """

    def __init__(
        self, config: ModelConfig, batch: int, room: int, padding: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch, config.key_value_heads, room, config.size_of_head)

        def empty() -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.layers = [LayerCache(empty(), empty()) for _ in range(config.layers)]
        self.tokens = torch.empty((batch, room), dtype=torch.int64, device=device)  # what was read so far
        self.padding = padding  # (B) of int64: how many tokens on the left are padding; None when there are none
        self.length = 0
        self.prompt: Tensor | None = None  # (B) of int64: where the prompts of a prefix model end
        self.infills = config.objective == "prefix"

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        self.length = length
        self.prompt = None if length == 0 or self.prompt is None else self.prompt.clamp_max(length)
        for layer in self.layers:
            layer.length = length

    def pick(self, rows: Sequence[int]) -> None:
        """Keep the rows of these numbers, in their order; one may come more than once."""
        index = torch.tensor(rows, device=self.tokens.device)
        for layer in self.layers:
            layer.pick(index)
        self.tokens = self.tokens[index]
        self.padding = None if self.padding is None else self.padding[index]
        self.prompt = None if self.prompt is None else self.prompt[index]

    def replace(self, rows: Sequence[int], fresh: "Cache") -> None:
        """Let `rows` remember what the rows of `fresh` do, and nothing else; `fresh` has no padding and no more tokens."""
        index, start = torch.tensor(rows, device=self.tokens.device), self.length - fresh.length
        for layer, other in zip(self.layers, fresh.layers, strict=True):
            layer.replace(index, other)
        self.tokens[index, start : self.length] = fresh.tokens[:, : fresh.length]
        self.padding = torch.zeros_like(self.tokens[:, 0]) if self.padding is None else self.padding.clone()
        self.padding[index] = start
        if self.prompt is not None and fresh.prompt is not None:
            self.prompt[index] = fresh.prompt + start

    def trim(self) -> None:
        """Forget the padding that all rows have."""
        count = 0 if self.padding is None else int(self.padding.min())
        if self.padding is not None and count:
            for layer in self.layers:
                layer.shift(count)
            self.tokens[:, : self.length - count] = self.tokens[:, count : self.length].clone()
            self.prompt = None if self.prompt is None else self.prompt - count
            self.length, self.padding = self.length - count, self.padding - count
        if self.padding is not None and not self.padding.any():
            self.padding = None

    def begin_span(self, prompt: int) -> None:
        """With the prefix objective: say that the prompts are so long, where that is not what is read first."""
        self.prompt = torch.full_like(self.tokens[:, 0], prompt)

    def layout(self, new: int) -> Layout:
        """Of the next `new` tokens; the first ones are the prompt."""
        device = self.layers[0].keys.device
        place = torch.arange(self.length, self.length + new, device=device)
        if self.infills and self.prompt is None:
            self.begin_span(new)
        mask, spans = self._mask(place), None
        if self.infills and self.prompt is not None:
            prompt = self.prompt.unsqueeze(-1)  # (B, 1)
            spans = (place - prompt + 2).clamp_min(0)  # (B, T)
            place = torch.minimum(place, prompt - 2)
        if self.padding is not None:
            place = (place - self.padding.unsqueeze(-1)).clamp_min(0)
        return Layout(place, spans, mask)

    def _mask(self, place: Tensor) -> Tensor | None:
        """True where tokens at `place` (T) may look, (B or 1, 1, T, S); None when the causal rule alone holds and S == T, or
        one token sees all before it."""
        whole = self.infills and self.length == 0
        if self.padding is None and not whole and (self.length == 0 or len(place) == 1):
            return None
        seen = torch.arange(self.length + len(place), device=place.device)
        mask = (seen <= place.unsqueeze(-1)).view(1, 1, len(place), -1)
        if whole and self.prompt is not None:
            mask = mask | (seen < self.prompt.view(-1, 1, 1, 1) - 1)
        if self.padding is None:
            return mask
        # A padding token looks at itself, so that no softmax is empty; nobody reads what comes out.
        return (mask & (seen >= self.padding.view(-1, 1, 1, 1))) | (seen == place.unsqueeze(-1))
