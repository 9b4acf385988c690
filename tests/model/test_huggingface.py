"""Models of transformers and ours: the same logits and gradients, and the same bits when they are exported again."""

import json
import pickle
import re
import shutil

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gptcore.config import ModelConfig, preset
from gptcore.errors import CorruptArtifactError, ModelFormatError
from gptcore.inference import generate
from gptcore.model import GPT
from gptcore.model.architectures import ARCHITECTURES, shortest_turn
from gptcore.model.huggingface import _fitting, export_model, import_model
from gptcore.model.layout import Layout

VOCABULARY, CONTEXT = 61, 24
GPT_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 1.5,
    "original_max_position_embeddings": 12,
}  # fmt: skip
"""Of these frequencies some are kept, some divided and some between."""
MODERN = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
SHAPES = {
    "openai-gpt": GPT_SIZES,
    "gpt2": {**GPT_SIZES, "n_inner": 80},
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 3, "num_heads": 4, "window_size": 5, "attention_layers": ["global", "local", "global"],
        "attention_types": [[["global", "local", "global"], 1]], "max_position_embeddings": CONTEXT,
    },
    "gpt_neox": {**SIZES, "max_position_embeddings": CONTEXT, "rotary_pct": 0.5},
    "bert": {**SIZES, "max_position_embeddings": CONTEXT},
    "roberta": {**SIZES, "max_position_embeddings": CONTEXT + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "llama": MODERN,
    "mistral": {**MODERN, "sliding_window": 5},
    "qwen2": {**MODERN, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {**MODERN, "head_dim": 10, "tie_word_embeddings": True},
}  # fmt: skip
VARIANTS = {
    **{kind: (kind, {}) for kind in SHAPES},
    "gpt2, a head of its own": ("gpt2", {"tie_word_embeddings": False}),
    "gpt_neox, attention without biases": ("gpt_neox", {"attention_bias": False}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, attention with biases": ("llama", {"attention_bias": True}),
    "llama, feed-forward with biases": ("llama", {"mlp_bias": True}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "llama, stretched": ("llama", {"head_dim": 24, "rope_parameters": LLAMA3}),
    "gpt_neox, stretched": ("gpt_neox", {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}),
    "mistral, large heads": ("mistral", {"sliding_window": 3, "head_dim": 12}),
    "qwen2, all see all": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen2, named blocks": ("qwen2", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3, biases and windows": (
        "qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
}  # fmt: skip
"""The same architectures with settings that add weights or change what a block sees."""


def random_model(kind, **changes):
    """A small model of transformers whose weights, biases and norms are all random."""
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, **ids, **{**SHAPES[kind], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, ARCHITECTURES[kind].name)(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def theirs(request):
    kind, changes = VARIANTS[request.param]
    return random_model(kind, **changes)


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def tokens(rows=3, length=17, seed=1):
    # Id 1 is the padding of RoBERTa, which counts places by it.
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------------- parity --


def test_an_imported_model_gives_the_logits_of_its_original(theirs, folder):
    ours, text = import_model(folder), tokens()
    torch.testing.assert_close(ours(text), theirs(text).logits, rtol=0, atol=1e-5)


def test_an_imported_model_gives_the_gradients_of_its_original(theirs, folder):
    ours, text = import_model(folder), tokens()
    random = torch.randn(3, 17, VOCABULARY, generator=torch.Generator().manual_seed(2)) / VOCABULARY
    theirs.zero_grad()
    (ours(text) * random).sum().backward()
    (theirs(text).logits * random).sum().backward()
    expected = import_model(theirs)
    for weight, other in zip(expected.parameters(), gradients_as_ours(theirs), strict=True):
        weight.grad = other
    for (name, weight), other in zip(ours.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def gradients_as_ours(theirs):
    """Gradients are laid out as the weights are: imported as if they were."""
    layout = import_model(theirs).config
    tied = {id(weight): weight for weight in theirs.parameters()}
    assert layout.width == 32
    state = {name: weight.grad for name, weight in theirs.named_parameters() if id(weight) in tied}

    class Gradients:
        config = theirs.config

        def state_dict(self):
            return state

    return [weight.detach() for weight in import_model(Gradients()).parameters()]


def test_a_text_after_padding_gives_the_logits_of_its_original(theirs, folder):
    ours, text = import_model(folder), tokens(rows=2)
    attention = torch.ones(2, 17, dtype=torch.int64)
    if ours.config.objective == "masked":
        text[1, 11:], attention[1, 11:], whole = 1, 0, slice(0, 11)
    else:
        text[1, :6], attention[1, :6], whole = 1, 0, slice(6, 17)
    places = (attention.cumsum(1) - 1).clamp_min(0)
    by_text = ours.config.objective == "masked" or ours.config.positions == "rotary"
    given = {} if by_text or ours.config.residual == "post" else {"position_ids": places}
    if theirs.config.model_type == "openai-gpt":
        given = {"position_ids": places}
    expected = theirs(text, attention_mask=attention, **given).logits
    # Whoever pads looks at itself, so that no softmax is empty.
    seen = attention.bool()[:, None, None] | torch.eye(17, dtype=torch.bool)
    if ours.config.objective != "masked":
        seen = seen & torch.ones(17, 17, dtype=torch.bool).tril()
    logits = ours(text, layout=Layout(places, None, seen))
    torch.testing.assert_close(logits[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1, whole], expected[1, whole], rtol=0, atol=1e-5)


def test_an_imported_model_continues_as_its_original(theirs, folder):
    """With the cache of either, past the windows."""
    ours, text = import_model(folder), tokens(rows=2, length=7)
    if ours.config.objective == "masked":
        pytest.skip("it continues nothing")
    room = CONTEXT - 7
    rule = {"max_new_tokens": room, "min_new_tokens": room, "do_sample": False, "eos_token_id": None}
    expected = theirs.generate(text, attention_mask=torch.ones_like(text), **rule)[:, 7:]
    assert generate(ours, text.tolist(), max_new_tokens=room) == expected.tolist()


def test_the_second_of_berts_two_texts_is_told_apart():
    theirs, text = random_model("bert"), tokens(rows=1)
    second = (torch.arange(17) > 8).long()[None]
    logits = import_model(theirs)(text, layout=Layout(segments=second))
    torch.testing.assert_close(logits, theirs(text, token_type_ids=second).logits, rtol=0, atol=1e-5)


def test_an_imported_model_exported_again_is_the_same_bits(theirs, folder, tmp_path):
    export_model(import_model(folder), tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = type(theirs).from_pretrained(tmp_path / "again")
    torch.testing.assert_close(loaded(tokens()).logits, theirs(tokens()).logits, rtol=0, atol=0)


def test_a_model_that_is_at_hand_is_imported_as_its_folder_is(theirs, folder):
    from_folder, at_hand = import_model(folder), import_model(theirs)
    assert from_folder.config == at_hand.config
    assert all(torch.equal(one, other) for one, other in zip(from_folder.parameters(), at_hand.parameters(), strict=True))


def test_weights_that_were_saved_without_a_head_and_under_old_names_are_found(tmp_path):
    gpt2, bert = random_model("gpt2"), random_model("bert")
    gpt2.save_pretrained(tmp_path / "gpt2")
    tensors = load_file(tmp_path / "gpt2" / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # the causal mask, which once was saved with the weights
    save_file(old, tmp_path / "gpt2" / "model.safetensors")
    torch.testing.assert_close(import_model(tmp_path / "gpt2")(tokens()), gpt2(tokens()).logits, rtol=0, atol=1e-5)
    bert.save_pretrained(tmp_path / "bert")
    tensors = load_file(tmp_path / "bert" / "model.safetensors")
    named = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for name, tensor in tensors.items():
        for new, before in named.items():
            name = name.replace(new, before)
        old[name] = tensor
    old["bert.pooler.dense.weight"] = torch.ones(32, 32)
    save_file(old, tmp_path / "bert" / "model.safetensors")
    torch.testing.assert_close(import_model(tmp_path / "bert")(tokens()), bert(tokens()).logits, rtol=0, atol=1e-5)


def test_weights_in_several_files_are_found_by_their_index(tmp_path):
    theirs = random_model("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(import_model(tmp_path)(tokens()), theirs(tokens()).logits, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------- our own models --


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (ModelConfig(layers=2, width=32, heads=4, kv_heads=2, context=CONTEXT), "qwen3"),
        (ModelConfig(layers=2, width=32, heads=4, context=CONTEXT, tied=False, embedding_norm=True), "qwen3"),
        (ModelConfig(layers=2, width=32, heads=4, context=CONTEXT, windows=(None, 8)), "qwen3"),
        (ModelConfig(layers=2, width=32, heads=4, context=CONTEXT, qk_norm=False), "llama"),
        (ModelConfig(layers=2, width=32, heads=4, context=CONTEXT, qk_norm=False, windows=(8,)), "mistral"),
        (ModelConfig(layers=2, width=32, heads=4, context=CONTEXT, qk_norm=False, qkv_biases=True), "qwen2"),
        (preset("gpt2").model_copy(update={"layers": 2, "width": 32, "heads": 4, "context": CONTEXT}), "gpt2"),
        (preset("gpt3-125m").model_copy(update={"layers": 2, "width": 32, "heads": 4, "windows": (None,)}), "gpt2"),
        (preset("bert-base").model_copy(update={"layers": 2, "width": 32, "heads": 4, "context": CONTEXT}), "bert"),
    ],
    ids=str,
)
def test_our_models_export_to_what_transformers_loads(config, kind, tmp_path):
    torch.manual_seed(0)
    ours = GPT(config, VOCABULARY).eval()
    for weight in ours.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    assert export_model(ours, tmp_path).kind == kind
    auto = transformers.AutoModelForMaskedLM if config.objective == "masked" else transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens()).logits, ours(tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"smear": True, "value_embeddings": True}, "does not have value_embeddings True, smear True"),
        ({"objective": "prefix"}, "does not have objective prefix"),
        ({"windows": (None, 8), "qk_norm": False}, r"does not have windows \(None, 8\)"),
        ({"windows": (4, 8)}, r"does not have windows \(4, 8\)"),
    ],
)
def test_a_model_that_no_architecture_holds_says_what_stands_in_the_way(changes, reason, tmp_path):
    config = ModelConfig(layers=2, width=32, heads=4, context=CONTEXT, **changes)
    with pytest.raises(ModelFormatError, match=f"the nearest, (qwen3|llama), {reason}"):
        export_model(GPT(config, VOCABULARY, device="cpu"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gpt1", "openai-gpt"), ("gpt2-xl", "gpt2"), ("gpt-neo-125m", "gpt_neo"), ("gpt-neox-20b", "gpt_neox"),
        ("bert-base", "bert"), ("roberta-base", "roberta"), ("modern-5m", "qwen3"), ("modern-1b", "qwen3"),
    ],
)  # fmt: skip
def test_presets_are_the_architectures_that_they_are_named_after(name, kind):
    assert _fitting(preset(name)).kind == kind


@given(turn=st.lists(st.sampled_from([None, 3, 5]), min_size=1, max_size=4), times=st.integers(1, 4))
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_the_shortest_turn_says_the_same_as_the_whole(turn, times):
    whole = tuple(turn * times)
    short = shortest_turn(whole)
    assert len(short) <= len(turn)
    assert tuple(short[block % len(short)] for block in range(len(whole))) == whole


# ------------------------------------------------------------------------------------------------------- bad input --


@pytest.fixture
def broken(tmp_path):
    random_model("gpt2").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder, error=ModelFormatError):
    with pytest.raises(error) as refused:
        import_model(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_pickle_is_refused_and_never_opened(broken, tmp_path):
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self):
            return (open, (str(opened), "w"))

    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "a pickle, which can execute code" in refusal(broken)
    (broken / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    assert "cannot be read as safetensors" in refusal(broken)
    assert not opened.exists()


def test_code_beside_the_model_is_not_looked_at(broken, tmp_path):
    opened = tmp_path / "opened"
    (broken / "modeling_own.py").write_text(f"open({str(opened)!r}, 'w')")
    change(broken, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    import_model(broken)
    assert not opened.exists()


def test_an_unknown_architecture_names_those_that_there_are(broken):
    change(broken, model_type="mamba")
    assert "the architecture 'mamba', which cannot be imported; there are: openai-gpt, gpt2" in refusal(broken)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("openai-gpt", {"tie_word_embeddings": False}),
        ("openai-gpt", {"layer_norm_epsilon": 0.1}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("gpt2", {"reorder_and_upcast_attn": True}),  # another order of the same products
        ("gpt2", {"activation_function": "relu", "n_inner": None}),
        ("gpt2", {"activation_function": "gelu"}),
        ("gpt2", {"activation_function": "gelu_fast"}),
        ("gpt2", {"activation_function": "gelu_pytorch_tanh"}),
        ("gpt2", {"layer_norm_epsilon": 0.1}),
        ("gpt2", {"summary_type": "last", "num_labels": 5}),  # of heads for other ends
        ("gpt_neo", {"tie_word_embeddings": False}),
        ("gpt_neo", {"intermediate_size": 40, "activation_function": "gelu", "layer_norm_epsilon": 0.1}),
        ("gpt_neo", {"window_size": 2, "attention_layers": ["local", "local", "global"]}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt_neox", {"tie_word_embeddings": True}),
        ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 100}),
        ("gpt_neox", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25}}),
        ("gpt_neox", {"hidden_act": "gelu_new", "layer_norm_eps": 0.1}),
        ("bert", {"hidden_act": "relu", "layer_norm_eps": 0.1}),
        ("bert", {"type_vocab_size": 3}),
        ("bert", {"chunk_size_feed_forward": 1}),  # the same, piece by piece
        ("roberta", {"type_vocab_size": 2}),
        ("llama", {"rms_norm_eps": 0.1, "head_dim": 6, "num_key_value_heads": 1}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
        ("llama", {"pretraining_tp": 2}),  # the same products in slices
        ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
        ("qwen2", {"head_dim": 12}),
        ("qwen3", {"tie_word_embeddings": False, "rms_norm_eps": 0.1}),
    ],
    ids=str,
)
def test_a_setting_is_taken_over_or_changes_nothing(kind, changes, tmp_path):
    theirs = random_model(kind, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = import_model(tmp_path / "theirs")
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, rtol=0, atol=1e-5)
    export_model(ours, tmp_path / "again")
    again = getattr(transformers, ARCHITECTURES[kind].name).from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(tokens()).logits, theirs(tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("openai-gpt", {"afn": "relu"}, "afn is 'relu': only 'gelu'"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False: only True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True: only False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True: only False"),
        ("gpt2", {"activation_function": "silu"}, "activation_function is 'silu': only gelu, gelu_new"),
        ("gpt2", {"activation_function": "quick_gelu"}, "activation_function is 'quick_gelu'"),
        ("gpt2", {"quantization_config": {"quant_method": "gptq"}}, "holds quantised weights"),
        ("gpt_neo", {"attention_layers": ["global"]}, "global: only one for each of 3 blocks, of global, local,"),
        ("gpt_neo", {"attention_layers": ["sparse"] * 3}, "attention are sparse, sparse, sparse"),
        ("gpt_neox", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ("gpt_neox", {"rope_parameters": {"rope_type": "yarn"}}, "of type 'yarn'"),
        ("bert", {"is_decoder": True}, "is_decoder is True: only False"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention is True: only False"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key': only 'absolute'"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings is False: only True"),
        ("roberta", {"hidden_act": "relu"}, "hidden_act is 'relu': only 'gelu'"),
        ("roberta", {"is_decoder": True}, "is_decoder is True: only False"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu'"),
        ("llama", {"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor is 0.5: only 1.0"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5: only 1.0"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types is ['full_attention', 'full_attention']: only None"),
        ("qwen2", {"layer_types": ["full_attention"]}, "only one for each of 3 blocks, of full_attention, sliding_attention,"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "attention are chunked_attention"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 2},
            "only one for each of 2 blocks, of full_attention, can be imported",
        ),
        ("qwen3", {"hidden_act": "relu"}, "hidden_act is 'relu': only 'silu'"),
    ],
    ids=str,
)
def test_a_setting_that_means_another_model_is_refused(kind, changes, sentence, tmp_path):
    random_model(kind).save_pretrained(tmp_path)
    change(tmp_path, **changes)
    assert sentence in refusal(tmp_path)


@pytest.mark.parametrize("name", ["GPT2ForSequenceClassification", "BertModel", "BertForSequenceClassification", "LlamaModel"])
def test_a_model_without_a_head_over_the_vocabulary_is_refused(name, tmp_path):
    kind = name.partition("For")[0].removesuffix("Model").lower()
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, pad_token_id=0, **SHAPES[kind])
    getattr(transformers, name)(config).save_pretrained(tmp_path)
    assert re.search("(score.weight|classifier.bias) is unknown|is missing", refusal(tmp_path, CorruptArtifactError))


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "proportional"])
def test_other_stretched_rotary_positions_are_refused(kind, tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    change(tmp_path, rope_parameters={"rope_type": kind, "factor": 4.0, "rope_theta": 1e4})
    assert f"rotary positions are of type {kind!r}: only default, linear, llama3 can be imported" in refusal(tmp_path)


def test_stretched_rotary_positions_that_make_no_sense_are_refused(tmp_path):
    random_model("llama", rope_parameters=LLAMA3).save_pretrained(tmp_path)
    change(tmp_path, rope_parameters={**LLAMA3, "low_freq_factor": 3.0})
    assert "low_freq_factor (3.0) is to be less than high_freq_factor (1.5)" in refusal(tmp_path)
    change(tmp_path, rope_parameters={name: value for name, value in LLAMA3.items() if name != "factor"})
    assert "its config.json has no factor, which llama needs" in refusal(tmp_path)
    change(tmp_path, rope_parameters={"full_attention": LLAMA3})
    assert "differ from block to block" in refusal(tmp_path)


def test_rotary_positions_are_the_same_as_transformers_4_writes_them(tmp_path):
    theirs = random_model("llama", rope_parameters=LLAMA3)
    theirs.save_pretrained(tmp_path)
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    change(tmp_path, rope_parameters=None, rope_theta=LLAMA3["rope_theta"], rope_scaling=scaling)
    torch.testing.assert_close(import_model(tmp_path)(tokens()), theirs(tokens()).logits, rtol=0, atol=1e-5)


def test_missing_and_unknown_and_misshapen_tensors_are_named(broken):
    rewrite(broken, lambda tensors: tensors.update(surprise=torch.ones(2)) or tensors.pop("transformer.ln_f.bias"))
    assert "transformer.ln_f.bias is missing; surprise is unknown" in refusal(broken, CorruptArtifactError)
    rewrite(broken, lambda tensors: tensors.pop("surprise") is None or tensors.update({"transformer.ln_f.bias": torch.ones(3)}))
    assert "norm.bias has shape (3,) instead of (32,)" in refusal(broken, CorruptArtifactError)


def test_weights_that_are_no_numbers_are_named(broken):
    rewrite(broken, lambda tensors: tensors["transformer.ln_f.bias"].__setitem__(1, float("nan")))
    assert "transformer.ln_f.bias holds what is no number" in refusal(broken, CorruptArtifactError)


def test_a_tied_head_that_is_another_matrix_is_refused(broken):
    rewrite(broken, lambda tensors: tensors.update({"lm_head.weight": torch.ones(VOCABULARY, 32)}))
    assert "lm_head.weight is another matrix" in refusal(broken, CorruptArtifactError)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no Hugging Face model folder: it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds no settings"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "its config.json has no n_layer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors: fetch the model again"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 40), "cannot be read as safetensors"),
        (lambda folder: change(folder, n_head=5), r"does not describe a gpt2 model"),
    ],
)
def test_a_broken_folder_says_what_is_wrong(broken, spoil, sentence):
    spoil(broken)
    assert sentence in refusal(broken)


def test_a_folder_that_is_not_there_says_so(tmp_path, broken):
    shutil.rmtree(broken)
    assert "it has no config.json" in refusal(broken)
