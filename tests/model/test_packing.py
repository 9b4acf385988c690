"""Packed weights: products equal those of the same weights unpacked, and a row is the same whatever stands beside it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.config import ModelConfig, preset
from gptcore.errors import ArtifactError
from gptcore.inference.generate import generate
from gptcore.model import GPT, save_model
from gptcore.model.folder import default_dtype, fastest_dtype, ready
from gptcore.model.quantisation import HalfLinear, Int8Linear, PackedInt8Linear, packs, quantise, rounded, weight_bytes

pytestmark = pytest.mark.skipif(not packs(), reason="this CPU has no products of packed weights")

SMALL = {"layers": 2, "width": 64, "heads": 4, "context": 32}
SHAPES = {
    "modern": ModelConfig(**SMALL, kv_heads=2),
    "untied": ModelConfig(**SMALL, tied=False, value_embeddings=True, smear=True),
    "gpt2": preset("gpt2").model_copy(update=SMALL),
    "bert": preset("bert-base").model_copy(update={**SMALL, "ffn_width": 96}),
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("bias", [None, random(48, seed=3)])
def test_a_product_of_halves_is_that_of_the_weights_rounded_to_float16(rows, bias):
    weight, x = random(48, 32), random(2, rows, 32, seed=1)
    expected = torch.nn.functional.linear(x, weight.half().float(), bias)
    torch.testing.assert_close(HalfLinear(weight, bias)(x), expected, rtol=1e-5, atol=1e-5)


def test_a_weight_beyond_float16_is_its_largest():
    weight = torch.full((8, 8), 1e6)
    assert HalfLinear(weight, None)(torch.eye(8)).unique().tolist() == [65504.0]


@given(rows=st.integers(1, 9), seed=st.integers(0, 99), size=st.sampled_from([1e-20, 1e-3, 1.0, 1e5]))
@settings(deadline=None)
def test_a_product_of_bytes_keeps_fourteen_bits_of_the_largest_activation(rows, seed, size):
    weight, bias, x = random(48, 32, seed=seed), size * random(48, seed=seed + 1), size * random(rows, 32, seed=seed + 2)
    whole, scale = rounded(weight)
    exact = Int8Linear(whole, scale, bias)(x.double())
    # Every activation is off by half a step of 1 / (63 * 126) of the largest, and the errors add up.
    step = x.abs().amax(-1, keepdim=True).double() / (63 * 126)
    bound = step / 2 * (whole.double() * scale.double()[:, None]).abs().sum(-1)
    off = (PackedInt8Linear(whole, scale, bias)(x) - exact).abs()
    assert torch.all(off <= bound + 1e-5 * exact.abs() + 1e-5 * size)


def test_a_row_of_bytes_is_the_same_bits_whatever_stands_beside_it():
    layer = PackedInt8Linear(*rounded(random(96, 64)), random(96, seed=1))
    x = random(40, 64, seed=2) * torch.logspace(-3, 3, 40)[:, None]
    together = layer(x)
    for row in range(40):
        assert torch.equal(layer(x[row : row + 1]), together[row : row + 1])


def test_a_row_of_zeros_becomes_the_bias():
    bias = random(8, seed=1)
    assert torch.equal(PackedInt8Linear(*rounded(random(8, 16)), bias)(torch.zeros(2, 16)), bias.expand(2, -1))


@pytest.mark.parametrize("kind", ["half", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_model_says_what_the_unpacked_one_does(shape, kind):
    whole, packed = (GPT(SHAPES[shape], 300, device="cpu").initialise(3).eval() for _ in range(2))
    if kind == "int8":
        whole, packed = quantise(whole), quantise(packed)
    size, packed = weight_bytes(whole), ready(packed, torch.float16)
    tokens = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(packed(tokens), whole(tokens), rtol=1e-2, atol=2e-3)
    assert packed.compute_dtype == torch.float32
    assert kind == "int8" or weight_bytes(packed) < 0.8 * size, "at this width norms and positions are not nothing"


def test_texts_of_a_model_in_eight_bits_do_not_depend_on_their_neighbours():
    model = ready(quantise(GPT(SHAPES["modern"], 300, device="cpu").initialise(3)), torch.float16)
    prompts = [[5, 7, 11], [4], [9, 9, 9, 9, 9, 2]]
    together = generate(model, prompts, max_new_tokens=12)
    assert together == [generate(model, prompt, max_new_tokens=12)[0] for prompt in prompts]


def test_packed_weights_are_not_saved(tiny, tmp_path):
    model = ready(GPT(SHAPES["gpt2"], 300, device="cpu").initialise(3), torch.float16)
    with pytest.raises(ArtifactError, match="cannot be saved"):
        save_model(tmp_path, model, tiny.tokenizer / "tokenizer")
    assert not list(tmp_path.iterdir())


def test_bytes_beside_bfloat16_give_bfloat16():
    model = ready(quantise(GPT(SHAPES["gpt2"], 300, device="cpu").initialise(3)), torch.bfloat16)
    assert model(torch.tensor([[5, 7]])).dtype == torch.bfloat16


def test_the_fastest_type_is_half_precision_only_for_weights_that_no_cache_holds():
    small, large = (GPT(SHAPES["modern"], vocabulary, device="cpu") for vocabulary in (300, 200_000))
    assert fastest_dtype(large) in (torch.float16, torch.bfloat16)
    assert fastest_dtype(small) == default_dtype(torch.device("cpu"))
    assert fastest_dtype(quantise(small)) in (torch.float16, torch.bfloat16)
