"""Cross-entropy of the next token and what people call it: nats, perplexity, bits per byte.

Labels are the tokens shifted once, by whoever makes the batch; -100 (IGNORED) marks what is not learned from.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from gptcore.model.transformer import GPT

IGNORED = -100


def mean_loss(model: GPT, tokens: Tensor, labels: Tensor, count: Tensor | float) -> Tensor:
    """Sum of the losses of tokens (B, T) divided by `count`, a scalar in nats.

    `count` is the number of labels in the whole global batch, so that gradients of micro-batches and processes simply add up.
    """
    # In the model's own type: the softmax sums in float32 inside, and a float32 copy of all logits costs a tenth of the step.
    losses = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.float().sum() / count


def token_losses(model: GPT, tokens: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (B, T) in nats, float32; 0 where the label is IGNORED."""
    logits = model(tokens).float()  # (B, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels.shape)


def perplexity(nats_per_token: float) -> float:
    """exp of the mean loss."""
    return math.exp(min(nats_per_token, 700.0))


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Loss of a text in bits, over the UTF-8 bytes it is long: comparable between tokenizers."""
    return nats / math.log(2) / text_bytes
