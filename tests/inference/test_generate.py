"""Generation: what comes out does not depend on the cache, the neighbours or the padding; sampling follows the distribution."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from gptcore.config import ModelConfig
from gptcore.errors import GptcoreError
from gptcore.inference import generate
from gptcore.inference.generate import choose
from gptcore.model import GPT


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(ModelConfig(layers=2, width=32, heads=4, kv_heads=2, context=24), 40).initialise(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(weight.numel()))
    return model.eval().requires_grad_(False)


def greedy_by_hand(model, prompt, count):
    """Without a cache: the whole text again for every token."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


def test_greedy_text_is_that_of_the_uncached_model(model):
    for prompt in ([1], [3, 1, 4, 1, 5], list(range(12))):
        assert generate(model, prompt, max_new_tokens=10) == [greedy_by_hand(model, prompt, 10)]


def test_a_prompt_gets_the_same_text_whatever_stands_beside_it(model):
    prompts = [[1, 2, 3], [7], list(range(10))]
    together = generate(model, prompts, max_new_tokens=8)
    assert together == [generate(model, prompt, max_new_tokens=8)[0] for prompt in prompts]


def test_past_the_context_the_newest_half_is_kept(model):
    prompt = list(range(10))
    text = list(prompt)
    window = list(prompt)
    for _ in range(40):
        if len(window) > 24:
            window = text[-12:]
        token = int(model(torch.tensor([window]))[0, -1].argmax())
        text.append(token)
        window.append(token)
    assert generate(model, prompt, max_new_tokens=40) == [text[10:]]


def test_a_prompt_longer_than_the_context_is_continued(model):
    assert len(generate(model, [5] * 100, max_new_tokens=30)[0]) == 30


def test_generation_ends_before_a_stop_id(model):
    free = generate(model, [1, 2], max_new_tokens=10)[0]
    stop = free[4]
    assert generate(model, [1, 2], max_new_tokens=10, stop_ids=[stop]) == [free[: free.index(stop)]]


def test_an_empty_prompt_is_a_clear_error(model):
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(GptcoreError, match="the prompt is empty"):
            generate(model, prompts, max_new_tokens=3)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, None), (0.7, 3, None), (1.3, None, 0.6), (1.0, 4, 0.8)]
)
def test_draws_follow_the_exact_distribution(temperature, top_k, top_p):
    logits = np.array([1.0, -0.5, 2.0, 0.3, -1.0, 1.5])
    p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    if top_p:
        # The smallest set of the likeliest whose share of what is left reaches top_p.
        reached = np.cumsum(p[order]) / p.sum()
        p[order[int(np.argmax(reached >= top_p - 1e-12)) + 1 :]] = 0
    p /= p.sum()
    count = 20_000
    randoms = [torch.Generator().manual_seed(7)] * count
    drawn = choose(torch.tensor(logits).float().repeat(count, 1), temperature, top_k, top_p, randoms).numpy()
    seen = np.bincount(drawn, minlength=6)
    assert (seen[p == 0] == 0).all()
    assert chisquare(seen[p > 0], p[p > 0] * count).pvalue > 1e-4


def test_equal_seeds_draw_equal_texts_and_others_do_not(model):
    settings = {"max_new_tokens": 20, "temperature": 1.0}
    one = generate(model, [1, 2], seed=1, **settings)
    assert one == generate(model, [1, 2], seed=1, **settings)
    assert one != generate(model, [1, 2], seed=2, **settings)
