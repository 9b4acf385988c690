"""One optimizer step: forward, backward, update. The training loop and the benchmark run this same function."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gptcore.model import GPT
from gptcore.model.inputs import Inputs
from gptcore.model.layout import Layout
from gptcore.training.optimizers import Optimizers, clip, named_gradients
from gptcore.training.scaling import LossScale

LossFunction = Callable[[GPT, Tensor, Tensor, float, Layout | None], Tensor]
"""(model, tokens (B, T), labels (B, T), labels of the whole global batch, layout) -> this part's share of the mean loss, a
scalar."""
_BUCKET = 1 << 23
"""Numbers that go over the wire at once, 32 MB: so few exchanges that their start does not count, and no second gradient."""


def update(
    model: GPT, loss_function: LossFunction, optimizers: Optimizers, parts: Iterable[Inputs], count: float, *,
    share: float, clip_to: float, world: int = 1, scale: LossScale | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Learn from the micro-batches `parts`, which have `count` labels over all processes.

    `share`: of the peak learning rates; `clip_to`: largest norm of the gradient. Returns the mean loss in nats and the
    gradient's norm before it was clipped, both scalars on the device: nothing here waits for a card, but with a `scale`. With
    one, a step whose gradient overflows is skipped and its norm is 0; it is inf or nan once the scale ran out.
    """
    loss = torch.zeros((), device=model.embedding.weight.device)
    for tokens, labels, layout in parts:
        part = loss_function(model, tokens, labels, count, layout)
        (part if scale is None else part * scale.value).backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    gradients = list(named_gradients(model))
    if world > 1:
        add_up([*gradients, loss])
    if scale is not None:
        torch._foreach_mul_(gradients, 1.0 / scale.value)
    norm = clip(model, clip_to)
    if scale is not None:
        ran_out = scale.ran_out
        if not scale.fits(norm):
            optimizers.forget()
            return loss, norm if ran_out else torch.zeros_like(norm)
    optimizers.step(share)
    return loss, norm


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        for tensor, total in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(total.view_as(tensor))


def exchanged_at_once(tensors: Sequence[Tensor]) -> int:
    """Most bytes that `add_up` needs beside them."""
    return max(sum(tensor.nbytes for tensor in bucket) for bucket in _buckets(tensors))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(map(Tensor.numel, bucket)) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    yield bucket
