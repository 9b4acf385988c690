"""The model against equations written out in numpy by hand (DESIGN: causal mask inside the softmax, heads concatenated)."""

import math

import numpy as np
import pytest
import torch

from gptcore.config import ModelConfig
from gptcore.model import GPT
from gptcore.model.transformer import Attention, Block, FeedForward, Norm, SwiGLU, _RMSNorm, attend, rotary, rotate, sinusoids

MODERN = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, context=16)
GPT2 = ModelConfig(
    layers=2, width=32, heads=4, context=16, norm="layer", norm_epsilon=1e-5, positions="learned",
    activation="gelu_tanh", qk_norm=False, biases=True,
)  # fmt: skip

SMEARED = MODERN.model_copy(update={"embedding_norm": True, "smear": True, "value_embeddings": True})


@pytest.fixture(autouse=True)
def in_double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def array(tensor):
    return tensor.detach().numpy()


def random_weights(module):
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return module


# ------------------------------------------------------------------------------------------------ the equations --


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention_by_hand(q, k, v):
    """softmax(q k^T / sqrt(K) + M) v for one head; M is minus infinity above the diagonal."""
    length, size = q.shape
    mask = np.triu(np.full((length, length), -np.inf), 1)
    return softmax(q @ k.T / math.sqrt(size) + mask) @ v


def rms(x, weight, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def layer(x, weight, bias, epsilon):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * weight + bias


def turned(x, theta):
    """Each pair (i, i + K/2) of (T, K) as a complex number, multiplied by exp(i place theta^(-2i/K))."""
    length, size = x.shape
    pair = x[:, : size // 2] + 1j * x[:, size // 2 :]
    pair = pair * np.exp(1j * np.arange(length)[:, None] * theta ** (-np.arange(0, size, 2) / size))
    return np.concatenate((pair.real, pair.imag), -1)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def multi_head_by_hand(module, x, theta=None):
    """Heads side by side: each reads its columns of the projections; outputs are concatenated, then projected."""
    w = {name: array(weight) for name, weight in module.named_parameters()}

    def project(name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    q, k, v, size = project("query"), project("key"), project("value"), module.size
    outs = []
    for head in range(module.heads):
        group = head // (module.heads // module.groups)
        qh, kh, vh = (part[:, i * size : (i + 1) * size] for part, i in ((q, head), (k, group), (v, group)))
        if "query_norm.weight" in w:
            qh, kh = rms(qh, w["query_norm.weight"], 1e-6), rms(kh, w["key_norm.weight"], 1e-6)
        if theta is not None:
            qh, kh = turned(qh, theta), turned(kh, theta)
        outs.append(attention_by_hand(qh, kh, vh))
    return np.concatenate(outs, -1) @ w["output.weight"].T + w.get("output.bias", 0.0)


# ------------------------------------------------------------------------------------------------------- blocks --


@pytest.mark.parametrize("length", [1, 7, 600])  # above 512 tokens the fused kernel takes over
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_softmax_of_scaled_products_with_the_mask_inside(length, groups):
    q, k, v = torch.randn(2, 4, length, 8), torch.randn(2, groups, length, 8), torch.randn(2, groups, length, 8)
    out = attend(q, k, v)
    for batch in range(2):
        for head in range(4):
            group = head // (4 // groups)
            by_hand = attention_by_hand(array(q[batch, head]), array(k[batch, group]), array(v[batch, group]))
            np.testing.assert_allclose(array(out[batch, head]), by_hand, atol=1e-12)


def test_heads_are_concatenated_and_projected_with_groups_norms_and_rotation():
    module, x = random_weights(Attention(MODERN)), torch.randn(1, 9, 32)
    rotation = rotary(torch.arange(9), MODERN.size_of_head, MODERN.rope_theta)
    by_hand = multi_head_by_hand(module, array(x[0]), MODERN.rope_theta)
    np.testing.assert_allclose(array(module(x, rotation)[0]), by_hand, atol=1e-6)  # angles are float32


def test_heads_are_concatenated_and_projected_with_biases():
    module, x = random_weights(Attention(GPT2)), torch.randn(1, 9, 32)
    np.testing.assert_allclose(array(module(x)[0]), multi_head_by_hand(module, array(x[0])), atol=1e-12)


@pytest.mark.parametrize(("activation", "by_hand"), [("gelu_tanh", gelu_tanh), ("relu", lambda x: np.maximum(x, 0.0))])
def test_feed_forward_is_w2_phi_of_w1_x_plus_b1_plus_b2(activation, by_hand):
    module = random_weights(FeedForward(GPT2.model_copy(update={"activation": activation})))
    x = torch.randn(5, 32)
    w = {name: array(weight) for name, weight in module.named_parameters()}
    expected = by_hand(array(x) @ w["up.weight"].T + w["up.bias"]) @ w["down.weight"].T + w["down.bias"]
    np.testing.assert_allclose(array(module(x)), expected, atol=1e-12)


def test_swiglu_multiplies_the_gate_into_the_other_projection():
    module, x = random_weights(SwiGLU(MODERN)), torch.randn(5, 32)
    w = {name: array(weight) for name, weight in module.named_parameters()}
    gate = array(x) @ w["gate.weight"].T
    expected = (gate / (1 + np.exp(-gate)) * (array(x) @ w["up.weight"].T)) @ w["down.weight"].T
    np.testing.assert_allclose(array(module(x)), expected, atol=1e-12)


def test_norms_follow_their_papers():
    x = torch.randn(5, 32)
    module = random_weights(Norm(MODERN, 32))
    np.testing.assert_allclose(array(module(x)), rms(array(x), array(module.weight), 1e-6), atol=1e-12)
    module = random_weights(Norm(GPT2, 32))
    expected = layer(array(x), array(module.weight), array(module.bias), 1e-5)
    np.testing.assert_allclose(array(module(x)), expected, atol=1e-12)


def test_a_block_has_a_norm_and_a_residual_around_both_parts():
    block, x = random_weights(Block(GPT2)), torch.randn(1, 9, 32)
    w = {name: array(weight) for name, weight in block.named_parameters()}
    y = array(x[0])
    y = y + multi_head_by_hand(block.attention, layer(y, w["attention_norm.weight"], w["attention_norm.bias"], 1e-5))
    inner = layer(y, w["ffn_norm.weight"], w["ffn_norm.bias"], 1e-5) @ w["ffn.up.weight"].T + w["ffn.up.bias"]
    y = y + gelu_tanh(inner) @ w["ffn.down.weight"].T + w["ffn.down.bias"]
    np.testing.assert_allclose(array(block(x)[0]), y, atol=1e-12)


def test_sinusoids_use_the_width_and_an_index_per_pair():
    table = array(sinusoids(torch.arange(5), 8))
    for place in range(5):
        for pair in range(4):
            angle = place / 10_000 ** (2 * pair / 8)
            np.testing.assert_allclose(table[place, 2 * pair], math.sin(angle), atol=1e-6)
            np.testing.assert_allclose(table[place, 2 * pair + 1], math.cos(angle), atol=1e-6)


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i, j):
        a, b = rotary(torch.tensor([i]), 8, 100.0), rotary(torch.tensor([j]), 8, 100.0)
        return float((rotate(q, a) * rotate(k, b)).sum())

    assert score(3, 1) == pytest.approx(score(13, 11), abs=1e-6)
    assert score(3, 1) != pytest.approx(score(4, 1), abs=1e-3)


def test_embeddings_are_normed_and_smeared_over_the_next_token():
    model = random_weights(GPT(SMEARED, 50))
    model.compute_dtype = torch.float64
    entered = []
    model.blocks[0].register_forward_pre_hook(lambda _, arguments: entered.append(array(arguments[0])))
    model(torch.tensor([[7, 3, 3]]))
    x = rms(array(model.embedding.weight)[[7, 3, 3]], array(model.embedding_norm.weight), 1e-6)
    gate = 1 / (1 + np.exp(-x @ array(model.smear.weight)[0]))
    np.testing.assert_allclose(entered[0][0], [x[0], x[1] + gate[1] * x[0], x[2] + gate[2] * x[1]], rtol=1e-9)


def test_the_values_that_attention_reads_are_those_of_the_stream_and_of_the_token():
    attention = random_weights(Attention(MODERN))
    x, value = torch.randn(1, 5, 32), torch.randn(1, 5, 16)
    inner = []
    attention.output.register_forward_pre_hook(lambda _, arguments: inner.append(arguments[0]))
    attention(x, value=value)
    attention.value.register_forward_hook(lambda _, arguments, out: out + value)
    attention(x)
    torch.testing.assert_close(inner[0], inner[1])


# ---------------------------------------------------------------------------------------------------- the whole --


@pytest.mark.parametrize("config", [MODERN, GPT2, GPT2.model_copy(update={"positions": "sinusoidal"}), SMEARED])
def test_no_token_sees_the_future(config):
    model = random_weights(GPT(config, 50)).eval()
    model.compute_dtype = torch.float64
    tokens = torch.randint(50, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[0, :7], after[0, :7], rtol=0, atol=0)
    assert not torch.allclose(before[0, 7:], after[0, 7:])


@pytest.mark.parametrize("config", [MODERN, GPT2, SMEARED])
def test_cached_and_padded_logits_are_those_of_the_whole_text(config):
    model = random_weights(GPT(config, 50)).eval()
    model.compute_dtype = torch.float64
    texts = [torch.randint(50, (11,)), torch.randint(50, (6,))]
    padded = torch.stack([texts[0], torch.cat((torch.zeros(5, dtype=torch.long), texts[1]))])
    cache = model.cache(2, 16, torch.tensor([0, 5]))
    pieces = [model(padded[:, :7], cache), model(padded[:, 7:8], cache), model(padded[:, 8:], cache)]
    cached = torch.cat(pieces, 1)
    torch.testing.assert_close(cached[0], model(texts[0][None])[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(cached[1, 5:], model(texts[1][None])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [MODERN, SMEARED])
def test_a_cache_that_was_rewound_has_forgotten_what_came_after(config):
    model = random_weights(GPT(config, 50)).eval()
    model.compute_dtype = torch.float64
    text, other = torch.randint(50, (1, 9)), torch.randint(50, (1, 4))
    cache = model.cache(1, 16)
    model(text, cache)
    cache.rewind(6)
    torch.testing.assert_close(model(other, cache), model(torch.cat((text[:, :6], other), 1))[:, 6:], rtol=0, atol=1e-6)


def test_equal_seeds_give_equal_weights_and_others_do_not():
    one, same, other = (GPT(MODERN, 50).initialise(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


def test_an_untrained_model_is_as_surprised_as_a_uniform_guess():
    torch.set_default_dtype(torch.float32)
    for config in (MODERN, GPT2):
        logits = GPT(config, 50).initialise(0)(torch.randint(50, (2, 16)))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(50, (32,)))
        assert loss.item() == pytest.approx(math.log(50), abs=0.3)


def test_the_gradient_of_the_norm_is_the_numerical_one():
    x, weight = torch.randn(3, 4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: _RMSNorm.apply(x, weight, 1e-6), (x, weight))
