"""The chunked cross-entropy is torch's, value and gradient, and never holds all logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.config import ModelConfig
from gptcore.model import GPT
from gptcore.model import loss as module
from gptcore.model.loss import IGNORED, mean_loss, token_losses

VOCABULARY = 61


def model(**changes) -> GPT:
    return GPT(ModelConfig(**{"layers": 1, "width": 16, "heads": 2, "context": 12, **changes}), VOCABULARY).initialise(1)


def batch(seed: int, ignored: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (3, 12), generator=generator)
    labels = torch.randint(VOCABULARY, (3, 12), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = IGNORED
    return tokens, labels


def plainly(gpt: GPT, tokens, labels, count: float, smoothing: float, z: float) -> torch.Tensor:
    """As torch has it, over all logits."""
    logits = gpt(tokens).flatten(0, 1)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    return (loss + z * (logits.logsumexp(-1).square() * (labels.flatten() != IGNORED)).sum()) / count


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 1000), st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 1e-2]),
    st.sampled_from([1, 7, 36, 1000]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_values_and_gradients_are_those_of_torch_however_it_is_cut(seed, ignored, smoothing, z, rows, tied, bias):
    gpt, (tokens, labels) = model(tied=tied, head_bias=bias), batch(seed, ignored)
    if bias:
        torch.nn.init.normal_(gpt.head_bias)
    wanted = plainly(gpt, tokens, labels, 36.0, smoothing, z)
    wanted.backward()
    expected = [weight.grad.clone() for weight in gpt.parameters()]
    gpt.zero_grad()
    before, module.LOGITS_AT_ONCE = module.LOGITS_AT_ONCE, rows * VOCABULARY
    try:
        found = mean_loss(gpt, tokens, labels, 36.0, smoothing=smoothing, z=z)
        found.backward()
    finally:
        module.LOGITS_AT_ONCE = before
    torch.testing.assert_close(found, wanted)
    for weight, gradient in zip(gpt.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-4)


def test_measured_losses_are_those_of_torch():
    gpt, (tokens, labels) = model(), batch(0, 0.3)
    expected = F.cross_entropy(gpt(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(token_losses(gpt, tokens, labels).flatten(), expected.detach())
    assert token_losses(gpt, tokens, labels)[labels == IGNORED].abs().sum() == 0


@pytest.mark.parametrize("vocabulary", [50_257])
def test_logits_of_a_large_vocabulary_are_never_there_at_once(vocabulary, monkeypatch):
    gpt = GPT(ModelConfig(layers=1, width=8, heads=1, context=256), vocabulary).initialise(0)
    largest = 0
    plain = F.linear

    def watched(*arguments):
        nonlocal largest
        made = plain(*arguments)
        largest = max(largest, made.numel())
        return made

    monkeypatch.setattr(F, "linear", watched)
    tokens = torch.zeros(4, 256, dtype=torch.long)
    mean_loss(gpt, tokens, tokens, 1024.0).backward()
    assert largest <= module.LOGITS_AT_ONCE < 1024 * vocabulary / 10


def test_bfloat16_activations_keep_a_float32_softmax():
    gpt, (tokens, labels) = model(), batch(3, 0.0)
    exact = mean_loss(gpt, tokens, labels, 36.0)
    gpt.compute_dtype = torch.bfloat16
    rough = mean_loss(gpt, tokens, labels, 36.0)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=1e-2)
