"""Cross-entropy of the next token and what people call it: nats, perplexity, bits per byte.

Labels are made by whoever makes the batch, with the tokens shifted once where the next one is learned; -100 (IGNORED) marks
what is not learned from.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore.model.layout import Layout
from gptcore.model.transformer import GPT
from gptcore.tokens.objectives import IGNORED

LOGITS_AT_ONCE = 1 << 22
"""Logits that are held at once, 16 MB in float32: about as much as the caches of a CPU hold."""


def mean_loss(
    model: GPT, tokens: Tensor, labels: Tensor, count: Tensor | float, layout: Layout | None = None, *,
    smoothing: float = 0.0, z: float = 0.0,
) -> Tensor:  # fmt: skip
    """Sum of the losses of tokens (B, T) divided by `count`, a scalar in nats, float32.

    `count` is the number of labels in the whole global batch, so that gradients of micro-batches and processes simply add up.
    `smoothing`: share of the target that is spread over the whole vocabulary (Szegedy et al. 2016); `z`: weight of the squared
    log of the softmax's denominator (Chowdhery et al. 2022, section 5).
    """
    hidden, labels = model.hidden(tokens, layout=layout).flatten(0, 1), labels.flatten()
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        # Of a task's row only the answer is learned: the rest need not go through the head. A card would have to wait here.
        learned = (labels != IGNORED).nonzero().squeeze(1)
        if len(learned) < len(labels):
            hidden, labels = hidden[learned], labels[learned]
    head = model.head_weight, model.head_bias
    losses: Tensor = _ChunkedCrossEntropy.apply(hidden, *head, labels, smoothing, z)  # type: ignore[no-untyped-call]
    return losses / count


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The head and its cross-entropy, a few rows at a time: all logits (N, V) are never there at once.

    The gradient of a row follows from its own logits, so it is taken on the way forward and nothing is computed twice. The
    softmax is float32 whatever the activations are.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float, z: float
    ) -> Tensor:
        """Hidden states (N, D), head (V, D), its bias (V), labels (N) -> sum of the losses, a float32 scalar."""
        weight = head.to(hidden.dtype)
        learned = (labels != IGNORED).to(torch.float32)  # (N)
        wanted = labels.clamp_min(0)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_head = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        rows = max(1, LOGITS_AT_ONCE // head.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight).float()  # (R, V)
            if bias is not None:
                logits += bias
            denominator = logits.logsumexp(-1)  # (R), the log of it
            nats = denominator - (1.0 - smoothing) * logits.gather(1, wanted[part, None]).squeeze(1)
            if smoothing:
                nats -= smoothing * logits.mean(-1)
            if z:
                nats += z * denominator.square()
            loss += (nats * learned[part]).sum()
            gradient = (logits - denominator[:, None]).exp_()  # the softmax; d denominator / d logits
            if z:
                gradient *= (1.0 + 2.0 * z * denominator)[:, None]
            if smoothing:
                gradient -= smoothing / logits.shape[1]
            gradient.scatter_add_(1, wanted[part, None], torch.full_like(gradient[:, :1], smoothing - 1.0))
            gradient *= learned[part, None]
            if to_bias is not None:
                to_bias += gradient.sum(0)
            gradient = gradient.to(hidden.dtype)
            if to_hidden is not None:
                torch.mm(gradient, weight, out=to_hidden[part])
            if to_head is not None and hidden.dtype == to_head.dtype:
                to_head.addmm_(gradient.t(), hidden[part])  # without a second matrix of that size
            elif to_head is not None:
                to_head += gradient.t() @ hidden[part]
            del logits, gradient  # before the next ones are made
        ctx.save_for_backward(to_hidden, to_head, to_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        """All gradients were taken on the way forward. They are scaled in place: the head's is as large as the head."""
        to_hidden, to_head, to_bias = (None if part is None else part.mul_(gradient) for part in ctx.saved_tensors)
        return to_hidden, to_head, to_bias, None, None, None


def token_losses(model: GPT, tokens: Tensor, labels: Tensor, layout: Layout | None = None) -> Tensor:
    """Cross-entropy (B, T) in nats, float32; 0 where the label is IGNORED. For measuring: it has no gradient."""
    return head_losses(model, model.hidden(tokens, layout=layout), labels)


@torch.no_grad()
def head_losses(model: GPT, hidden: Tensor, labels: Tensor) -> Tensor:
    """The same from hidden states (B, T, D), a few rows at a time."""
    rows = max(1, LOGITS_AT_ONCE // model.vocab_size)
    parts = zip(torch.split(hidden.flatten(0, 1), rows), torch.split(labels.flatten(), rows), strict=True)
    losses = [
        F.cross_entropy(model.logits(part).float(), wanted, ignore_index=IGNORED, reduction="none") for part, wanted in parts
    ]
    return torch.cat(losses).view(labels.shape)


def perplexity(nats_per_token: float) -> float:
    """exp of the mean loss."""
    return math.exp(min(nats_per_token, 700.0))


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Loss of a text in bits, over the UTF-8 bytes it is long: comparable between tokenizers."""
    return nats / math.log(2) / text_bytes
