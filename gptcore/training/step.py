"""One optimizer step: forward, backward, update. The training loop and the benchmark run this same function."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from gptcore.model import GPT
from gptcore.model.inputs import Inputs
from gptcore.model.transformer import Layout
from gptcore.training.optimizers import Optimizers, clip, named_gradients

LossFunction = Callable[[GPT, Tensor, Tensor, float, Layout | None], Tensor]
"""(model, tokens (B, T), labels (B, T), labels of the whole global batch, layout) -> this part's share of the mean loss, a
scalar."""


def update(
    model: GPT, loss_function: LossFunction, optimizers: Optimizers, parts: Iterable[Inputs], count: float, *,
    share: float, clip_to: float, world: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Learn from the micro-batches `parts`, which have `count` labels over all processes.

    `share`: of the peak learning rates; `clip_to`: largest norm of the gradient. Returns the mean loss in nats and the
    gradient's norm before it was clipped, both scalars on the device: nothing here waits for a card.
    """
    loss = torch.zeros((), device=model.embedding.weight.device)
    for tokens, labels, layout in parts:
        part = loss_function(model, tokens, labels, count, layout)
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    if world > 1:
        for tensor in (*named_gradients(model), loss):
            dist.all_reduce(tensor)
    norm = clip(model, clip_to)
    optimizers.step(share)
    return loss, norm
