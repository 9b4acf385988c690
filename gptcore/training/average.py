"""An exponential moving average of the weights: often a little better than the last ones, at the cost of one copy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gptcore.errors import CorruptArtifactError
from gptcore.model import GPT


class Average:
    """Follows the weights of a model."""

    def __init__(self, model: GPT, decay: float) -> None:
        self.model, self.decay = model, decay
        self.reset()

    def reset(self) -> None:
        """Begin with the weights as they are."""
        self.weights = [weight.detach().clone() for weight in self.model.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after step number `step` (from 0); the first steps count for more."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.weights, list(self.model.parameters()), 1.0 - decay)

    @contextmanager
    def used(self) -> Iterator[None]:
        """The model has the averaged weights inside of the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, Tensor]:
        """Parameter -> its average."""
        return dict(zip((name for name, _ in self.model.named_parameters()), self.weights, strict=True))

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state()` gave. Raises `CorruptArtifactError`."""
        names = [name for name, _ in self.model.named_parameters()]
        if set(names) != set(state):
            raise CorruptArtifactError("the checkpoint's averaged weights are those of another model")
        for weight, name in zip(self.weights, names, strict=True):
            weight.copy_(state[name])

    def _swap(self) -> None:
        for index, weight in enumerate(self.model.parameters()):
            weight.data, self.weights[index] = self.weights[index], weight.data
