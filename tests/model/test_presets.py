"""Known shapes: their parameters are the counted ones, and what makes them different from each other does what it says."""

import math

import pytest
import torch
import torch.nn.functional as F

from gptcore.config import PRESETS, ModelConfig, preset
from gptcore.errors import SettingsError
from gptcore.model import GPT
from gptcore.model.transformer import Attention, Block, HeadTransform, attend, rotary, rotate

TINY = {"layers": 2, "width": 32, "heads": 4, "context": 24}


@pytest.fixture(autouse=True)
def in_double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def small(name, **changes):
    """The preset at a size that a test can afford; windows of 5 tokens."""
    shape = preset(name)
    windows = tuple(window and 5 for window in shape.windows)
    return shape.model_copy(update={**TINY, "head_size": None, "windows": windows, **changes})


def random_model(config, vocabulary=50):
    model = GPT(config, vocabulary).eval()
    model.compute_dtype = torch.float64
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


# -------------------------------------------------------------------------------------------------------- counts --


def parameters(config, vocabulary):
    return sum(weight.numel() for weight in GPT(config, vocabulary, device="meta").parameters())


@pytest.mark.parametrize(
    ("name", "vocabulary", "millions"),
    [
        ("gpt1", 40_478, 116.53),
        ("gpt2", 50_257, 124.44),
        ("gpt2-medium", 50_257, 354.82),
        ("gpt2-large", 50_257, 774.03),
        ("gpt2-xl", 50_257, 1557.61),
        ("gpt3-175b", 50_257, 174_604.26),
        ("gpt-neo-125m", 50_257, 125.20),
        ("gpt-neo-1.3b", 50_257, 1315.58),
        ("gpt-neo-2.7b", 50_257, 2651.31),
        ("gpt-neox-20b", 50_432, 20_554.57),
        ("bert-base", 30_522, 109.51),
        ("roberta-base", 50_265, 124.70),
    ],
)
def test_presets_have_the_counted_parameters_not_the_printed_ones(name, vocabulary, millions):
    assert round(parameters(preset(name), vocabulary) / 1e6, 2) == millions


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("modern-")])
def test_our_presets_are_named_after_their_parameters(name):
    size, unit = name.removeprefix("modern-")[:-1], name[-1]
    assert parameters(preset(name), 8192) == pytest.approx(int(size) * {"m": 1e6, "b": 1e9}[unit], rel=0.1)


def test_gpt3_has_heads_that_do_not_divide_its_printed_widths():
    assert (preset("gpt3-1.3b").size_of_head, preset("gpt3-13b").size_of_head) == (128, 128)
    assert preset("gpt3-1.3b").heads * 128 != preset("gpt3-1.3b").width


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_forward_and_backward_on_meta_tensors(name):
    config = preset(name)
    model = GPT(config, 1000, device="meta")
    loss = model(torch.zeros(1, min(config.context, 300), dtype=torch.long, device="meta")).sum()
    loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


# ----------------------------------------------------------------------------------------------- what they differ in --


def test_the_transformer_of_2017_is_torchs_post_norm_layer_with_a_causal_mask():
    config = small("transformer")
    block, layer = Block(config), torch.nn.TransformerEncoderLayer(32, 4, 128, 0.0, norm_first=False, batch_first=True)
    with torch.no_grad():
        attention, theirs = block.attention, layer.self_attn
        projections = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
        theirs.in_proj_weight.copy_(projections)
        theirs.in_proj_bias.copy_(torch.cat([attention.query.bias, attention.key.bias, attention.value.bias]))
        for ours, other in (
            (attention.output, theirs.out_proj), (block.ffn.up, layer.linear1), (block.ffn.down, layer.linear2),
            (block.attention_norm, layer.norm1), (block.ffn_norm, layer.norm2),
        ):  # fmt: skip
            other.weight.copy_(ours.weight)
            other.bias.copy_(ours.bias)
    x = torch.randn(2, 9, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    torch.testing.assert_close(block(x), layer(x, src_mask=mask, is_causal=True), rtol=0, atol=1e-12)


def test_parallel_parts_read_the_same_stream():
    block, x = Block(small("gpt-neox-20b")), torch.randn(1, 9, 32)
    expected = x + block.attention(block.attention_norm(x)) + block.ffn(block.ffn_norm(x))
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


def test_partial_rotary_positions_leave_the_rest_of_a_head_alone():
    rotation = rotary(torch.arange(3, 9), 4, 100.0)
    x = torch.randn(1, 2, 6, 16)
    turned = rotate(x, rotation)
    torch.testing.assert_close(turned[..., 4:], x[..., 4:], rtol=0, atol=0)
    torch.testing.assert_close(turned[..., :4], rotate(x[..., :4], rotation), rtol=0, atol=0)


@pytest.mark.parametrize("length", [9, 600])
def test_the_scale_of_attention_is_the_one_that_is_set(length):
    q, k, v = (torch.randn(1, 2, length, 8) for _ in range(3))
    torch.testing.assert_close(attend(q, k, v, scale=1.0), attend(q * math.sqrt(8), k, v), rtol=1e-9, atol=1e-9)


def test_gpt_neo_has_no_scale_and_no_biases_of_queries_keys_and_values():
    attention = Attention(small("gpt-neo-125m"))
    assert attention.scale == 1.0
    assert [name for name, _ in attention.named_parameters() if name.endswith("bias")] == ["output.bias"]


@pytest.mark.parametrize("name", ["gpt3-125m", "gpt-neo-125m"])
def test_a_token_reaches_no_further_than_the_windows_of_the_blocks_together(name):
    model = random_model(small(name, windows=(5,)))
    tokens = torch.randint(50, (1, 20))
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 50
    differ = (model(tokens) != model(changed)).any(-1)[0]
    # Two blocks, each of which sees itself and 4 before: 8 tokens further, and not one more.
    assert differ.nonzero().flatten().tolist() == list(range(4, 13))


def test_blocks_take_turns_in_how_far_they_see():
    assert [preset("gpt3-125m").window(block) for block in range(4)] == [None, 256, None, 256]


@pytest.mark.parametrize("name", ["gpt3-125m", "gpt-neox-20b", "gpt1", "transformer"])
def test_cached_and_padded_logits_are_those_of_the_whole_text(name):
    model = random_model(small(name))
    texts = [torch.randint(50, (17,)), torch.randint(50, (11,))]
    padded = torch.stack([texts[0], torch.cat((torch.zeros(6, dtype=torch.long), texts[1]))])
    cache = model.cache(2, 24, torch.tensor([0, 6]))
    pieces = [model(padded[:, :9], cache), model(padded[:, 9:10], cache), model(padded[:, 10:], cache)]
    cached = torch.cat(pieces, 1)
    torch.testing.assert_close(cached[0], model(texts[0][None])[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(cached[1, 6:], model(texts[1][None])[0], rtol=0, atol=1e-6)


def test_bert_norms_its_embeddings_and_has_a_layer_before_its_head():
    config = small("bert-base")
    model = random_model(config)
    tokens = torch.randint(50, (1, 7))
    entered, left = [], []
    model.blocks[0].register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    model.blocks[-1].register_forward_hook(lambda _, arguments, out: left.append(out))
    logits = model(tokens)
    x = model.embedding(tokens) + model.positions(torch.arange(7)) + model.segments.weight[0]
    norm = model.embedding_norm
    torch.testing.assert_close(entered[0], F.layer_norm(x, (32,), norm.weight, norm.bias, 1e-12), rtol=0, atol=1e-12)
    assert isinstance(model.transform, HeadTransform)
    dense, norm = model.transform.dense, model.transform.norm
    y = F.layer_norm(F.gelu(F.linear(left[0], dense.weight, dense.bias)), (32,), norm.weight, norm.bias, 1e-12)
    torch.testing.assert_close(logits, y @ model.embedding.weight.T + model.head_bias, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- bad settings --


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"windows": ()}, "windows is empty"),
        ({"windows": (4,), "objective": "masked"}, "windows look back only"),
        ({"positions": "learned", "smear": True}, "smear needs rotary positions"),
        ({"rotary_share": 0.4}, "turn pairs"),
    ],
)
def test_settings_that_do_not_fit_say_why(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelConfig(**TINY, **changes)


def test_an_unknown_preset_names_those_that_there_are():
    with pytest.raises(SettingsError, match=r"unknown preset 'gpt5'; there are: transformer, gpt1"):
        preset("gpt5")
