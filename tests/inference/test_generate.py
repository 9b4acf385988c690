"""Generation: what comes out does not depend on the cache, the neighbours or the padding, and follows the distribution."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode

from gptcore.config import ModelConfig
from gptcore.errors import GptcoreError
from gptcore.inference import Sampling, generate
from gptcore.inference.generate import stream
from gptcore.inference.rows import Rows
from gptcore.inference.sampling import draw, random_stream
from gptcore.model import GPT
from gptcore.model.folder import ready
from gptcore.model.quantisation import packs

CONTEXT = 24
SHAPES = {
    "modern": {},
    "gpt2": {"norm": "layer", "positions": "learned", "activation": "gelu_tanh", "qk_norm": False, "biases": True},
    "banded": {"windows": (None, 5)},
    "smeared": {"embedding_norm": True, "smear": True, "value_embeddings": True},
    "prefix": {"objective": "prefix"},
}


WEIGHTS = [torch.float32, *([torch.float16] if packs() else [])]
"""Whole, and packed in half precision, where the CPU has such products; activations and sums are float32 in both."""


def make_model(shape: str = "modern", dtype: torch.dtype = torch.float64, vocabulary: int = 40, **changes) -> GPT:
    settings = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": CONTEXT, **SHAPES[shape], **changes}
    model = GPT(ModelConfig(**settings), vocabulary).to(dtype)
    model.compute_dtype = dtype
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(weight.numel()))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def model() -> GPT:
    return make_model()


MASK, BEGIN = 0, 1
PROMPTS = ([3], [3, 14, 15, 9, 2], list(range(2, 14)), [7, 7], list(range(2, 36)))


def asked(shape, prompts):
    """Prompts as a model of this shape reads them."""
    return [[*prompt, MASK, BEGIN] for prompt in prompts] if shape == "prefix" else [list(prompt) for prompt in prompts]


def steps_by_hand(model, prompt, choose, count):
    """Without a cache, the whole window again for every token: ids, and the logits that each was chosen from."""
    text, window, seen = list(prompt), list(prompt[-CONTEXT:]), []
    for _ in range(count):
        if len(window) > CONTEXT:
            window = text[-(CONTEXT // 2) :]
        seen.append(model(torch.tensor([window]))[0, -1])
        token = choose(seen[-1])
        text.append(token)
        window.append(token)
    return text[len(prompt) :], torch.stack(seen)


def likeliest(logits):
    return int(logits.argmax())


# ------------------------------------------------------------------------------------------------- independence --


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "prefix"])
def test_greedy_text_is_that_of_the_uncached_model_past_the_context_too(shape):
    model = make_model(shape)
    expected = [steps_by_hand(model, prompt, likeliest, 60)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=60) == expected


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "repetition_penalty": 1.3, "seed": 5}])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_gets_the_same_text_whatever_stands_beside_it(shape, sampling):
    model = make_model(shape)
    prompts, settings = asked(shape, PROMPTS), Sampling(**sampling)

    def texts(numbers):
        rows = [[] for _ in range(2 * len(numbers))]
        chosen = [prompts[number] for number in numbers]
        for step in stream(model, chosen, settings, max_new_tokens=60, stop_ids=[11], numbers=numbers, samples=range(2)):
            for row, token, logprob in step:
                rows[row].append((token, round(logprob, 9)))
        return rows

    together = texts(range(len(prompts)))
    assert together == [text for number in range(len(prompts)) for text in texts([number])]
    assert texts([4, 1]) == together[8:] + together[2:4]
    assert not sampling or len({len(text) for text in together}) > 1, "some ended before others"


@pytest.mark.parametrize("weights", WEIGHTS)
def test_in_float32_texts_part_only_where_the_two_best_logits_are_as_good_as_equal(weights):
    model = ready(make_model(dtype=torch.float32), weights)
    for prompt, text in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=60), strict=True):
        alone = generate(model, prompt, max_new_tokens=60)[0]
        expected, logits = steps_by_hand(model, prompt, likeliest, 60)
        for other in (text, alone):
            at = next((place for place, pair in enumerate(zip(other, expected, strict=True)) if pair[0] != pair[1]), None)
            if at is not None:
                best, second = logits[at].topk(2).values
                assert best - second <= 1e-4


def test_a_sample_draws_from_a_stream_of_its_own():
    model = make_model()
    settings = Sampling(temperature=1.0, seed=3)

    def text(**choice):
        steps = stream(model, [[1, 2]], settings, max_new_tokens=12, **choice)
        rows = {}
        for drawn in itertools.chain.from_iterable(steps):
            rows.setdefault(drawn.row, []).append(drawn.token)
        return list(rows.values())

    three = text(samples=range(3))
    assert three == [text(samples=range(sample, sample + 1))[0] for sample in range(3)]
    assert len(set(map(tuple, [*three, *text(numbers=[1])]))) == 4


@pytest.mark.parametrize("weights", WEIGHTS)
def test_cached_logits_are_the_uncached_ones_in_float32(weights):
    model = ready(make_model(dtype=torch.float32, context=64), weights)
    rows = Rows(model, [[5, 6, 7], list(range(20))], 1, 40)
    texts = [[5, 6, 7], list(range(20))]
    for token in range(30):
        for row, text in enumerate(texts):
            torch.testing.assert_close(rows.logits[row], model(torch.tensor([text]))[0, -1], rtol=1e-5, atol=1e-5)
            rows.texts[row].append(token)
            text.append(token)
        rows.advance(())


# ---------------------------------------------------------------------------------------------------------- work --


def read_by(model, work):
    """The shapes of what went through the first block."""
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[:2])))
    work()
    hook.remove()
    return seen


def test_past_the_context_the_newest_half_is_encoded_once_and_the_other_rows_stay(model):
    # 2 tokens fill the context of 24 with the 22nd new one and then every 12th; 10 tokens 8 steps before that.
    seen = read_by(model, lambda: generate(model, [list(range(10)), [1, 2]], max_new_tokens=50))
    assert seen[0] == (2, 10)
    assert [shape for shape in seen[1:] if shape != (2, 1)] == [(1, 11)] * 6
    assert seen.count((2, 1)) == 49


def test_rows_that_ended_leave_the_batch(model):
    free = generate(model, [[1], [2], [3], [4]], max_new_tokens=40)
    stop = free[0][5]
    kept = [text[: text.index(stop)] if stop in text else text for text in free]
    texts = []
    seen = read_by(model, lambda: texts.extend(generate(model, [[1], [2], [3], [4]], max_new_tokens=40, stop_ids=[stop])))
    assert texts == kept
    assert len({len(text) for text in kept}) > 1
    assert seen[-1][0] < 4


def test_no_step_makes_a_tensor_that_grows_with_the_cache(model):
    long = make_model(dtype=torch.float32, context=2048)

    class Largest(TorchDispatchMode):
        """Bytes of the largest tensor that an operation made, views and writing in place left out."""

        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            given = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)}
            for made in torch.utils._pytree.tree_leaves(out):
                if torch.is_tensor(made) and made.untyped_storage().data_ptr() not in given:
                    self.bytes = max(self.bytes, made.untyped_storage().nbytes())
            return out

    for prompts, allowed in (([[1, 2]], 1), ([[1, 2], [3]], 2)):  # of int64 places for each token of the longest row
        rows = Rows(long, [[*prompt, *[5] * 1990] for prompt in prompts], 1, 10)
        for text in rows.texts:
            text.append(1)
        with Largest() as largest:
            rows.advance(())
        assert largest.bytes <= 8 * allowed * rows.cache.length
        assert largest.bytes < rows.cache.layers[0].keys[:1, :, : rows.cache.length].nbytes / 4


# ------------------------------------------------------------------------------------------------------ sampling --


def exact(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, text=()):
    """The distribution that the settings describe, by hand."""
    logits = np.array(logits, dtype=np.float64)
    for token in set(text):
        logits[token] *= 1 / repetition_penalty if logits[token] > 0 else repetition_penalty
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    # The smallest set of the likeliest whose share of what is left reaches top_p.
    reached = np.cumsum(p[order]) / p.sum()
    p[order[int(np.argmax(reached >= top_p - 1e-12)) + 1 :]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 1.0, "top_k": 4, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.3},
        {"temperature": 1.2, "top_k": 5, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.7},
    ],
)
def test_pairs_of_tokens_follow_the_exact_distribution_of_a_two_layer_model(settings):
    model, vocabulary, count, prompt = make_model(vocabulary=7), 7, 6000, [1, 2]
    expected = np.zeros((vocabulary, vocabulary))
    first = exact(model(torch.tensor([prompt]))[0, -1], text=prompt, **settings)
    for token in np.flatnonzero(first):
        text = [*prompt, int(token)]
        expected[token] = first[token] * exact(model(torch.tensor([text]))[0, -1], text=text, **settings)
    seen = np.zeros((vocabulary, vocabulary))
    drawn = list(stream(model, [prompt], Sampling(**settings), max_new_tokens=2, samples=range(count)))
    for one, two in zip(*drawn, strict=True):
        seen[one.token, two.token] += 1
    assert (seen[expected == 0] == 0).all()
    common = expected * count >= 5  # chi-square wants that many; the rest is one class
    rest = [(~common & (expected > 0))]
    observed = [*seen[common], *(seen[part].sum() for part in rest if expected[part].sum() * count >= 1)]
    wanted = [*expected[common], *(expected[part].sum() for part in rest if expected[part].sum() * count >= 1)]
    wanted = np.array(wanted) / np.sum(wanted)
    assert chisquare(observed, wanted * np.sum(observed)).pvalue > 1e-4


def test_the_penalty_of_repetition_is_that_of_transformers(model):
    from transformers import RepetitionPenaltyLogitsProcessor

    from gptcore.inference.sampling import penalised

    logits, texts = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)), [[1, 2, 2, 9], [3, 4, 5, 6]]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(texts), logits.clone())
    torch.testing.assert_close(penalised(logits, texts, 1.7), theirs, rtol=0, atol=0)


def test_logprobs_are_those_of_the_model_itself_whatever_it_draws_from(model):
    text, prompt = [], [4, 5, 6]
    sampling = Sampling(temperature=0.5, top_k=3, repetition_penalty=2.0)
    for (drawn,) in stream(model, [prompt], sampling, max_new_tokens=10):
        expected = model(torch.tensor([[*prompt, *text]]))[0, -1].log_softmax(-1)[drawn.token]
        assert drawn.logprob == pytest.approx(float(expected), abs=1e-9)
        text.append(drawn.token)


def test_equal_seeds_draw_equal_texts_and_others_do_not(model):
    settings = {"max_new_tokens": 20, "temperature": 1.0}
    one = generate(model, [1, 2], seed=1, **settings)
    assert one == generate(model, [1, 2], seed=1, **settings)
    assert one != generate(model, [1, 2], seed=2, **settings)


def test_a_temperature_near_zero_draws_the_likeliest(model):
    assert generate(model, [1, 2], max_new_tokens=20, temperature=1e-30) == generate(model, [1, 2], max_new_tokens=20)


# -------------------------------------------------------------------------------------------------- ends, errors --


def test_generation_ends_before_a_stop_id(model):
    free = generate(model, [1, 2], max_new_tokens=10)[0]
    stop = free[4]
    assert generate(model, [1, 2], max_new_tokens=10, stop_ids=[stop]) == [free[: free.index(stop)]]


@pytest.mark.parametrize("context", [1, 2, 3])
def test_a_context_of_a_few_tokens_is_enough(context):
    model = make_model(context=context)
    together = generate(model, [[1, 2, 3, 4, 5], [6]], max_new_tokens=20)
    assert together == [generate(model, prompt, max_new_tokens=20)[0] for prompt in ([1, 2, 3, 4, 5], [6])]


def test_an_empty_prompt_is_a_clear_error(model):
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(GptcoreError, match="the prompt is empty"):
            generate(model, prompts, max_new_tokens=3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -1.0}, "temperature is -1.0: .* greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0: .* greater than 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"seed": -5}, "seed is -5"),
        ({"stop": "x"}, "stop is 'x': .* not permitted"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_sentence(model, wrong, said):
    with pytest.raises(GptcoreError, match=said) as error:
        generate(model, [1], **{"max_new_tokens": 3, **wrong})
    assert "\n" not in str(error.value)


def test_a_token_that_the_model_does_not_know_is_named(model):
    with pytest.raises(GptcoreError, match="prompt 2 holds token 40, the model's vocabulary ends at 39"):
        generate(model, [[1], [40]], max_new_tokens=3)


def test_top_k_and_top_p_may_be_none(model):
    assert generate(model, [1], max_new_tokens=3, temperature=0.0, top_k=None, top_p=None, seed=0)


def test_a_temperature_that_no_float_holds_takes_the_likeliest():
    logits = torch.tensor([[0.5, 2.0, 1.9, -3.0]], dtype=torch.float32)
    drawn = [draw(logits, Sampling(temperature=1e-300, seed=seed), [random_stream(seed, 0, 0)]).item() for seed in range(20)]
    assert drawn == [1] * 20
