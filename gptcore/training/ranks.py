"""One process among the trainers, and the few things that they tell each other beside gradients."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Rank:
    """This process among the trainers."""

    number: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """The first one writes what there is once."""
        return self.number == 0

    def wait(self) -> None:
        """Return when all of them are here."""
        if self.world > 1:
            dist.barrier()

    def any(self, here: bool) -> bool:
        """Whether it holds on any rank, so that all of them do the same."""
        return self.largest(float(here)) > 0.0

    def largest(self, here: float) -> float:
        """The largest of all ranks' numbers."""
        if self.world == 1:
            return here
        shared = self._number(here)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return float(shared)

    def same(self, value: float) -> float:
        """The first rank's number, on all ranks: they must decide alike."""
        if self.world == 1:
            return value
        shared = self._number(value)
        dist.broadcast(shared, 0)
        return float(shared)

    def _number(self, value: float) -> Tensor:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return torch.tensor(value, dtype=torch.float64, device=device)
