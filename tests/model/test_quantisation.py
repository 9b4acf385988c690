"""Eight bits a weight: how far it is from the model that it was made of, and that the bytes are what they are."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.config import ModelConfig, preset
from gptcore.errors import CorruptArtifactError
from gptcore.model import GPT, load_model, save_model
from gptcore.model.quantisation import Int8Linear, quantise, rounded, weight_bytes

SHAPES = {
    "modern": ModelConfig(layers=2, width=64, heads=4, context=32),
    "untied": ModelConfig(layers=2, width=64, heads=4, context=32, tied=False),
    "gpt2": preset("gpt2").model_copy(update={"layers": 2, "width": 64, "heads": 4, "context": 32}),
}


@pytest.fixture(params=SHAPES)
def model(request):
    return GPT(SHAPES[request.param], 300, device="cpu").initialise(3).eval()


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 99), size=st.sampled_from([1e-30, 1e-3, 1.0, 1e5])
)
@settings(deadline=None)
def test_no_weight_is_off_by_more_than_half_a_step_of_its_row(rows, columns, seed, size):
    weight = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    whole, scale = rounded(weight)
    assert torch.all((whole.float() * scale[:, None] - weight).abs() <= scale[:, None] * 0.500001)
    assert whole.dtype == torch.int8
    assert whole.abs().max() == 127


def test_a_row_of_zeros_stays_one():
    whole, scale = rounded(torch.zeros(2, 4))
    assert torch.equal(whole.float() * scale[:, None], torch.zeros(2, 4))


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_rounded_weights(rows, dtype):
    weight, bias, x = torch.randn(48, 32), torch.randn(48), torch.randn(2, rows, 32)
    layer = Int8Linear(*rounded(weight), bias)
    expected = x @ (layer.weight.float() * layer.scale[:, None]).T + bias
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(layer(x.to(dtype)).float(), expected, rtol=0, atol=tolerance)


def test_a_quantised_model_is_nearly_the_one_that_it_was_made_of_and_a_quarter_of_its_size(model):
    tokens = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))
    before, size = model(tokens), weight_bytes(model)
    after = quantise(model)(tokens)
    assert weight_bytes(model) < 0.33 * size, "at this width norms, biases and positions are not nothing"
    loss, other = (torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()) for logits in (before, after))
    assert other.item() == pytest.approx(loss.item(), rel=2e-3)


def test_a_tied_head_and_its_table_are_the_same_bytes():
    model = quantise(GPT(SHAPES["modern"], 300, device="cpu").initialise(3))
    assert model.head.weight is model.embedding.weight
    tokens = torch.tensor([[5, 7]])
    torch.testing.assert_close(model.embedding(tokens)[0, 0], model.head.weight[5].float() * model.head.scale[5])


def test_a_quantised_folder_opens_as_it_was_saved(model, tiny, tmp_path):
    torch.manual_seed(0)
    vocabulary = json.loads((tiny.tokenizer / "tokenizer" / "tokenizer.json").read_text())["vocabulary"]
    whole = GPT(model.config, vocabulary, device="cpu").initialise(3).eval()
    save_model(tmp_path / "whole", whole, tiny.tokenizer / "tokenizer")
    save_model(tmp_path / "int8", quantise(whole), tiny.tokenizer / "tokenizer")
    opened = load_model(tmp_path / "int8", dtype=torch.float32).model
    tokens = torch.randint(vocabulary, (2, 20))
    torch.testing.assert_close(opened(tokens), whole(tokens), rtol=0, atol=0)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("int8", "whole")]
    assert sizes[0] < 0.33 * sizes[1]
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path / "int8" / "model.safetensors")
    with pytest.raises(CorruptArtifactError, match="does not fit"):
        load_model(tmp_path / "int8")
