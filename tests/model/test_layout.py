"""What a token may see: documents apart, hidden spans after the text around them, everything at once."""

import numpy as np
import pytest
import torch

from gptcore.config import MaskingConfig, ModelConfig
from gptcore.inference.generate import generate
from gptcore.inference.rows import prefill
from gptcore.model import GPT
from gptcore.model.inputs import inputs
from gptcore.model.loss import token_losses
from gptcore.tokens.objectives import Causal, Excerpts, Masked, Prefix, Symbols, infilled, padded

UNKNOWN, BEGIN, END, PAD = range(4)
SYMBOLS = Symbols(mask=UNKNOWN, begin=BEGIN, end=END, pad=PAD, control=np.arange(7), vocabulary=50)
CPU = torch.device("cpu")
POSITIONS = ("rotary", "learned", "sinusoidal")


@pytest.fixture(autouse=True)
def in_double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model_of(objective="causal", positions="rotary", **settings):
    config = ModelConfig(
        layers=2, width=32, heads=4, kv_heads=2, context=24, objective=objective, positions=positions, **settings
    )
    model = GPT(config, 50).initialise(0).double().eval()
    model.compute_dtype = torch.float64
    return model.requires_grad_(False)


def text(length, seed=0):
    return np.random.default_rng(seed).integers(7, 50, length)


def hidden(model, batch):
    read = inputs(batch, CPU)
    return model.hidden(read.tokens, layout=read.layout)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_with_a_document_mask_each_document_is_read_as_if_it_stood_alone(objective, positions):
    model = model_of(objective, positions, document_mask=True)
    first, second = np.array([BEGIN, *text(9), END]), np.array([BEGIN, *text(7, 1), END])
    both = np.concatenate([first, second, [BEGIN]])[None]
    kind = Causal(24, SYMBOLS, True) if objective == "causal" else Masked(24, SYMBOLS, True, MaskingConfig(), 0)
    batch = kind.of_text(Excerpts(both, np.zeros(1, np.int64), np.zeros(1, np.int64)))
    together = hidden(model, batch)[0]
    alone = [model.hidden(torch.from_numpy(part)[None])[0] for part in np.split(batch.tokens[0], [len(first)])]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_masked_model_sees_what_comes_after_and_a_causal_one_does_not():
    tokens = torch.from_numpy(text(10))[None]
    other = tokens.clone()
    other[0, -1] = 8
    for objective, sees in (("masked", True), ("causal", False)):
        model = model_of(objective)
        changed = (model.hidden(tokens)[0, :-1] - model.hidden(other)[0, :-1]).abs().amax(-1) > 1e-9
        assert changed.all() if sees else not changed.any()


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_text_around_sees_all_of_itself_and_a_span_sees_it_and_what_stands_before(positions):
    model = model_of("prefix", positions)
    ids = text(12)
    batch = infilled(ids, [(7, 10), (2, 4)], SYMBOLS)  # 9 tokens around, then 4 and 3 of the spans
    before = hidden(model, batch)[0]

    def changed(at):
        tokens = batch.tokens.copy()
        tokens[0, at] = 7 if tokens[0, at] != 7 else 8
        return ((hidden(model, type(batch)(**{**vars(batch), "tokens": tokens}))[0] - before).abs().amax(-1) > 1e-9).tolist()

    assert changed(8) == [True] * 16  # the last of the text around: everybody sees it
    assert changed(10) == [False] * 10 + [True] * 6  # inside of the first span: only what follows


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_prefix_model_with_a_cache_answers_as_without(positions):
    model = model_of("prefix", positions)
    questions, answer = [text(9), text(5, 1)], text(6, 2)
    rows = [infilled(np.concatenate([q, answer]), [(len(q), len(q) + 6)], SYMBOLS) for q in questions]
    read = inputs(padded(rows, PAD), CPU)
    expected = model(read.tokens, layout=read.layout)
    cache, first = prefill(model, [[*q.tolist(), UNKNOWN, BEGIN] for q in questions])
    follow = model(torch.from_numpy(np.stack([answer[:-1]] * 2)), cache)
    for row, q in enumerate(questions):
        begin = len(q) + 1
        torch.testing.assert_close(first[row], expected[row, begin])
        torch.testing.assert_close(follow[row], expected[row, begin + 1 : begin + 6])
    start = len(questions[0]) + 2
    cache.rewind(start)
    torch.testing.assert_close(model(torch.from_numpy(np.stack([answer[:-1]] * 2)), cache), follow)


def test_a_prefix_model_goes_on_past_its_context_and_its_answer_does_not_depend_on_its_neighbours():
    model = model_of("prefix")
    prompts = [[*text(15).tolist(), UNKNOWN, BEGIN], [*text(4, 1).tolist(), UNKNOWN, BEGIN]]
    together = generate(model, prompts, max_new_tokens=40)
    assert [len(row) for row in together] == [40, 40]
    assert generate(model, prompts[0], max_new_tokens=40) == together[:1]


def test_the_loss_of_a_batch_is_that_of_its_rows():
    model = model_of("prefix")
    objective = Prefix(24, SYMBOLS, False, MaskingConfig(), 0)
    ids = np.stack([text(objective.reads + 1, seed) for seed in range(4)])
    batch = objective.of_text(Excerpts(ids, np.arange(4) * 20, np.zeros(4, np.int64)))
    read = inputs(batch, CPU)
    whole = token_losses(model, read.tokens, read.labels, read.layout)
    for row in range(4):
        one = inputs(batch, CPU, slice(row, row + 1))
        torch.testing.assert_close(token_losses(model, one.tokens, one.labels, one.layout), whole[row : row + 1])
