"""Every token of a text is scored once, with what its model may see of the text, whatever it was trained to predict."""

import numpy as np
import pytest
import torch

from gptcore.evaluation.likelihood import stream_nats
from gptcore.model import GPT
from gptcore.tokens.objectives import Symbols

UNKNOWN, BEGIN, END, PAD = range(4)
SYMBOLS = Symbols(mask=UNKNOWN, begin=BEGIN, end=END, pad=PAD, control=np.arange(7), vocabulary=50)


@pytest.fixture
def model_of(tiny):
    def make(objective, **settings):
        model = GPT(tiny.model(context=16, objective=objective, **settings), 50).initialise(1).eval()
        return model.requires_grad_(False)

    return make


def documents(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return np.concatenate([[BEGIN, *random.integers(7, 50, length), END] for length in lengths])


@pytest.mark.parametrize("objective", ["causal", "prefix"])
@pytest.mark.parametrize("lengths", [(1,), (12,), (13,), (14,), (40,), (100,), (5, 30, 3)])
def test_the_scores_of_a_model_that_knows_nothing_are_the_logarithm_of_its_vocabulary(model_of, objective, lengths):
    model, stream = model_of(objective), documents(*lengths)
    model.embedding.weight.data.zero_()
    assert stream_nats(model, stream, SYMBOLS, batch=2) == pytest.approx(np.log(50) * (np.arange(len(stream)) > 0), abs=1e-5)


def test_a_prefix_model_scores_each_half_context_from_the_text_before_it(model_of):
    model, stream = model_of("prefix"), documents(38)
    nats = stream_nats(model, stream, SYMBOLS, batch=3)
    # The second window: 15 tokens up to the 23rd, of which the last 8 are the span.
    seen, span = stream[8:15], stream[15:23]
    tokens = torch.tensor([[*seen, UNKNOWN, BEGIN, *span[:-1]]])
    from gptcore.model.layout import Layout, sight

    around = torch.arange(16)[None] < 8
    places = torch.tensor([[*range(8), *[7] * 8]])
    layout = Layout(places, (torch.arange(16)[None] - 7).clamp_min(0), sight(16, None, around, torch.device("cpu")))
    logits = model(tokens, layout=layout)[0, 8:].double()
    expected = -logits.log_softmax(-1)[torch.arange(8), torch.from_numpy(span)]
    assert nats[15:23] == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_masked_model_scores_every_word_once_hidden_with_every_seventh(model_of):
    model, stream = model_of("masked"), documents(4, 20)
    nats = stream_nats(model, stream, SYMBOLS, batch=1)
    expected = np.zeros(len(stream))
    for at in range(len(stream)):
        if stream[at] in SYMBOLS.control:
            continue
        start = at // 16 * 16
        window = stream[start : start + 16].copy()
        hidden = [i for i in range(len(window)) if (start + i - at) % 7 == 0 and window[i] not in SYMBOLS.control]
        window[hidden] = UNKNOWN
        logits = model(torch.from_numpy(window)[None])[0, at - start].double()
        expected[at] = -logits.log_softmax(-1)[stream[at]]
    assert nats == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("objective", ["causal", "prefix", "masked"])
def test_with_a_document_mask_a_document_costs_what_it_costs_alone(model_of, objective):
    model = model_of(objective, document_mask=True)
    first, second = documents(6), documents(5, seed=1)
    both = stream_nats(model, np.concatenate([first, second]), SYMBOLS)
    alone = [stream_nats(model, part, SYMBOLS) for part in (first, second)]
    if objective == "masked":
        assert (both > 0).sum() == 11  # which tokens are hidden together depends on where they stand
        alone[1], both = np.empty(0), both[: len(first)]
    elif objective == "causal":
        both[len(first)] = 0.0  # that a document begins is predicted from the one before
    assert both == pytest.approx(np.concatenate(alone), abs=1e-5)
