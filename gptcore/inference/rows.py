"""Texts that grow side by side in one cache, each as if it were alone."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gptcore.model import GPT, Cache


class Rows:
    """Prompts and what was appended to them, a row of the cache for each that goes on.

    Every row has a clock of its own: when what it remembers fills the context, the newest half of its text is encoded again
    and the other rows stay as they are. So what the model says to one does not depend on those beside it.
    """

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], copies: int, new: int) -> None:
        self.model, self.context = model, model.config.context
        # What is continued moves into the prefix when it is encoded again, and what asks for a span stays at its end.
        self._asking = list(prompts[0][-2:]) if model.config.objective == "prefix" else []
        texts = [list(prompt[: len(prompt) - len(self._asking)]) for prompt in prompts]
        read = [[*text[-(self.context - len(self._asking)) :], *self._asking] for text in texts]
        self.cache, logits = prefill(model, read, min(self.context, max(map(len, read)) + new))
        self.texts = [list(text) for text in texts for _ in range(copies)]
        """Every prompt `copies` times, and what followed; what asks for a span left out."""
        self.numbers = list(range(len(self.texts)))
        """Which of the texts each row is."""
        self._held = [len(ids) for ids in read for _ in range(copies)]
        self.logits = logits.repeat_interleave(copies, 0)  # (rows, V)
        """Of the token after each row's last."""
        if copies > 1:
            self.cache.pick([row for row in range(len(prompts)) for _ in range(copies)])

    @torch.no_grad()
    def advance(self, ended: Collection[int]) -> None:
        """Read the last token of every text but those that `ended`, which leave when half of the rows are such."""
        going = [row for row, number in enumerate(self.numbers) if number not in ended]
        newest = {}
        if self.cache.length == self.context or 2 * len(going) <= len(self.numbers):
            if len(going) < len(self.numbers):
                self._keep(going)
            newest = self._renew()
            self.cache.trim()
        tokens = [[newest.get(row, self.texts[number][-1])] for row, number in enumerate(self.numbers)]
        self.logits = self.model(torch.tensor(tokens, device=self.logits.device), self.cache)[:, -1]
        self._held = [held + 1 for held in self._held]

    def _keep(self, rows: list[int]) -> None:
        self.cache.pick(rows)
        self.numbers, self._held = [self.numbers[row] for row in rows], [self._held[row] for row in rows]

    def _renew(self) -> dict[int, int]:
        """Encode the newest half of every text that fills the context, but for its last token; returns that by row."""
        full = [row for row, held in enumerate(self._held) if held == self.context]
        half = max(1, self.context // 2)
        windows = {row: [*self.texts[self.numbers[row]][-half:], *self._asking] for row in full}
        if windows:
            self.cache.replace(full, _encoded(self.model, [window[:-1] for window in windows.values()]))
        for row, window in windows.items():
            self._held[row] = len(window) - 1
        return {row: window[-1] for row, window in windows.items()}


@torch.no_grad()
def prefill(model: GPT, texts: Sequence[Sequence[int]], room: int | None = None) -> tuple[Cache, Tensor]:
    """Encode prompts, padded on the left, into a fresh cache; returns it and the logits (B, V) after the last token.

    `room`: tokens that the cache will hold, at most the context; unset: as many.
    """
    device, longest = model.embedding.weight.device, max(len(text) for text in texts)
    padding = torch.tensor([longest - len(text) for text in texts], device=device)
    tokens = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts], device=device)
    cache = model.cache(len(texts), room or model.config.context, padding if bool(padding.any()) else None)
    hidden = model.hidden(tokens, cache)  # (B, T, D)
    return cache, model.logits(hidden[:, -1])


@torch.no_grad()
def _encoded(model: GPT, texts: Sequence[Sequence[int]]) -> Cache:
    """A cache of texts of equal length that go on with one token more, which begins the span of a prefix model."""
    length, device = len(texts[0]), model.embedding.weight.device
    cache = model.cache(len(texts), length)
    if length:
        cache.begin_span(length + 1)
        model.hidden(torch.tensor(texts, device=device), cache)
    return cache
