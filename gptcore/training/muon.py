"""Muon: momentum whose update is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

As `torch.optim.Muon` with `adjust_lr_fn="original"`, but matrices of one shape go through Newton-Schulz together, and in the
type that the model computes in: torch's is always bfloat16, which a CPU without it emulates a hundred times more slowly.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_SMALLEST = 1e-7


class Muon(Optimizer):
    """For matrices of at least one row and column; `dtype` is what the iteration computes in."""

    def __init__(
        self, matrices: Iterable[Tensor], *, lr: float, weight_decay: float, momentum: float, dtype: torch.dtype
    ) -> None:  # fmt: skip
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None, "nobody needs one"
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                self._update(weights, group["lr"], group["weight_decay"], group["momentum"])

    def _update(self, weights: Sequence[Tensor], rate: float, decay: float, momentum: float) -> None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_lerp_(buffers, gradients, 1.0 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov's
        updates = orthogonal(torch.stack(list(ahead)).to(self._dtype)).to(weights[0].dtype)
        rows, columns = weights[0].shape
        torch._foreach_mul_(list(weights), 1.0 - rate * decay)
        torch._foreach_add_(list(weights), list(updates.unbind()), alpha=-rate * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, R, C) -> about U V^T of each, singular values between 0.7 and 1.2: five steps of a quintic Newton-Schulz."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(_SMALLEST)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    found: Tensor = x if wide is matrices else x.mT
    return found


def orthogonal_flops(rows: int, columns: int) -> int:
    """FLOPs of `orthogonal` for one matrix: however few tokens a step has, it takes as many."""
    short, long = sorted((rows, columns))
    return _ITERATIONS * (4 * short**2 * long + 2 * short**3)
