"""How architectures of transformers call the settings and the weights of this model. Data, and one small function each way.

An architecture says what a model is: `read` makes our settings of its own, `write` its own of ours. One can hold a model if
reading what was written gives the settings back, so nothing else has to say which fits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gptcore.config import ModelConfig
from gptcore.errors import ModelFormatError

Theirs = Mapping[str, Any]
"""Settings as `config.json` of a Hugging Face folder has them."""
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_STRETCHED: Mapping[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip
"""Types of rotary positions and their settings."""
_THEIR_ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


class Weight(NamedTuple):
    """Where a weight and its bias stand, on both sides; `{}` is the number of the block."""

    theirs: str
    ours: tuple[str, ...]
    """More than one where they have one matrix for several."""
    layout: Literal["same", "transposed", "heads"] = "same"
    """`transposed`: (in, out), the parts side by side. `heads`: (head, part, size of a head, in)."""


@dataclass(frozen=True)
class Architecture:
    """A family of models in transformers."""

    kind: str
    """`model_type` in its settings."""
    name: str
    """The class that loads it."""
    prefix: str
    """What stands before every weight but the head's, or before none of them in a file that was saved without a head."""
    read: Callable[[Theirs], dict[str, Any]]
    """Their settings -> ours. Raises `ModelFormatError` for what this model does not have."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """Our settings -> theirs, whether or not they fit."""
    weights: tuple[Weight, ...]


def _only(theirs: Theirs, **wanted: Any) -> None:
    """Refuse settings that mean another model. One that is not there has the value that is wanted."""
    for name, value in wanted.items():
        if theirs.get(name, value) != value:
            raise ModelFormatError(
                f"the model's setting {name} is {theirs[name]!r}: only {value!r} can be imported, anything else is another "
                "architecture"
            )


def _activation(theirs: Theirs, name: str) -> str:
    given = theirs.get(name)
    if given not in _ACTIVATIONS:
        raise ModelFormatError(f"the model's setting {name} is {given!r}: only {', '.join(_ACTIVATIONS)} can be imported")
    return _ACTIVATIONS[given]


def _rope(theirs: Theirs) -> Theirs:
    """What the rotary positions are, whether it stands by itself (transformers 4) or together (5)."""
    given = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if any(isinstance(each, Mapping) for each in given.values()):
        raise ModelFormatError("the model's rotary positions differ from block to block: only one kind for all can be imported")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _STRETCHED:
        raise ModelFormatError(
            f"the model's rotary positions are of type {kind!r}: only {', '.join(_STRETCHED)} can be imported"
        )
    theta = given.get("rope_theta", theirs.get("rope_theta", theirs.get("rotary_emb_base", 10_000.0)))
    share = given.get("partial_rotary_factor", theirs.get("partial_rotary_factor", theirs.get("rotary_pct", 1.0)))
    found = {"rope_theta": theta, "rotary_share": share}
    if kind == "default":
        return found
    original = theirs.get("original_max_position_embeddings", theirs["max_position_embeddings"])
    values = {"original_max_position_embeddings": original, **given}
    return {**found, "rope_scaling": {"rope_type": kind, **{name: values[name] for name in _STRETCHED[kind]}}}


def _write_rope(ours: ModelConfig) -> dict[str, Any]:
    scaling = ours.rope_scaling.model_dump(exclude_none=True) if ours.rope_scaling else {"rope_type": "default"}
    return {"rope_theta": ours.rope_theta, **scaling}


def _kinds(given: Sequence[str], layers: int, *known: str) -> Sequence[str]:
    """What sort of attention each block has, checked."""
    if len(given) != layers or set(given) - set(known):
        wanted = f"one for each of {layers} blocks, of {', '.join(known)}"
        raise ModelFormatError(f"the model's kinds of attention are {', '.join(given)}: only {wanted}, can be imported")
    return given


def shortest_turn(windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The fewest windows that, taken in turn, are these: (None, 5, None, 5) -> (None, 5)."""
    return next(
        windows[:size] for size in range(1, len(windows) + 1)
        if all(window == windows[block % size] for block, window in enumerate(windows))
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- GPT-1 and GPT-2 --


def _read_gpt(theirs: Theirs, activation: str, residual: str) -> dict[str, Any]:
    _only(theirs, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return {
        "layers": theirs["n_layer"], "width": theirs["n_embd"], "heads": theirs["n_head"], "context": theirs["n_positions"],
        "ffn_width": theirs.get("n_inner"), "norm": "layer", "norm_epsilon": theirs.get("layer_norm_epsilon", 1e-5),
        "positions": "learned", "activation": activation, "qk_norm": False, "biases": True, "residual": residual,
        "tied": theirs.get("tie_word_embeddings", True),
    }  # fmt: skip


def _read_gpt1(theirs: Theirs) -> dict[str, Any]:
    _only(theirs, afn="gelu")  # where "gelu" is the tanh form
    return _read_gpt(theirs, "gelu_tanh", "post")


def _read_gpt2(theirs: Theirs) -> dict[str, Any]:
    return _read_gpt(theirs, _activation({"activation_function": "gelu_new", **theirs}, "activation_function"), "pre")


def _write_gpt(ours: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": ours.layers, "n_embd": ours.width, "n_head": ours.heads, "n_positions": ours.context,
        "layer_norm_epsilon": ours.norm_epsilon, "resid_pdrop": ours.dropout, "embd_pdrop": ours.dropout, "attn_pdrop": 0.0,
        "tie_word_embeddings": ours.tied,
    }  # fmt: skip


def _write_gpt2(ours: ModelConfig) -> dict[str, Any]:
    return {
        **_write_gpt(ours), "n_inner": ours.inner_width, "activation_function": _THEIR_ACTIVATION.get(ours.activation),
    }  # fmt: skip


_QKV = tuple(f"blocks.{{}}.attention.{part}" for part in ("query", "key", "value"))


def _gpt_weights(embedding: str, positions: str) -> tuple[Weight, ...]:
    return (
        Weight(f"transformer.{embedding}", ("embedding",)),
        Weight(f"transformer.{positions}", ("positions",)),
        Weight("transformer.h.{}.ln_1", ("blocks.{}.attention_norm",)),
        Weight("transformer.h.{}.attn.c_attn", _QKV, "transposed"),
        Weight("transformer.h.{}.attn.c_proj", ("blocks.{}.attention.output",), "transposed"),
        Weight("transformer.h.{}.ln_2", ("blocks.{}.ffn_norm",)),
        Weight("transformer.h.{}.mlp.c_fc", ("blocks.{}.ffn.up",), "transposed"),
        Weight("transformer.h.{}.mlp.c_proj", ("blocks.{}.ffn.down",), "transposed"),
        Weight("transformer.ln_f", ("norm",)),
        Weight("lm_head", ("head",)),
    )


GPT1 = Architecture(
    "openai-gpt", "OpenAIGPTLMHeadModel", "transformer.", _read_gpt1, lambda ours: {**_write_gpt(ours), "afn": "gelu"},
    _gpt_weights("tokens_embed", "positions_embed"),
)  # fmt: skip
GPT2 = Architecture("gpt2", "GPT2LMHeadModel", "transformer.", _read_gpt2, _write_gpt2, _gpt_weights("wte", "wpe"))


# --------------------------------------------------------------------------------------------- GPT-Neo and GPT-NeoX --


def _read_neo(theirs: Theirs) -> dict[str, Any]:
    types = theirs.get("attention_types", [[["global", "local"], 12]])
    kinds = theirs.get("attention_layers") or [kind for turn, times in types for _ in range(times) for kind in turn]
    kinds = _kinds(kinds, theirs["num_layers"], "global", "local")
    windows = tuple(theirs.get("window_size", 256) if kind == "local" else None for kind in kinds)
    return {
        "layers": theirs["num_layers"], "width": theirs["hidden_size"], "heads": theirs["num_heads"],
        "context": theirs["max_position_embeddings"], "ffn_width": theirs.get("intermediate_size"),
        "windows": shortest_turn(windows), "norm": "layer", "norm_epsilon": theirs.get("layer_norm_epsilon", 1e-5),
        "positions": "learned", "activation": _activation({"activation_function": "gelu_new", **theirs}, "activation_function"),
        "tied": theirs.get("tie_word_embeddings", True),
        "qk_norm": False, "attention_scale": 1.0, "biases": True, "qkv_biases": False,
    }  # fmt: skip


def _write_neo(ours: ModelConfig) -> dict[str, Any]:
    windows = [ours.window(block) for block in range(ours.layers)]
    kinds = ["global" if window is None else "local" for window in windows]
    return {
        "num_layers": ours.layers, "hidden_size": ours.width, "num_heads": ours.heads, "max_position_embeddings": ours.context,
        "intermediate_size": ours.inner_width, "window_size": next(filter(None, windows), 256), "attention_layers": kinds,
        "attention_types": [[kinds, 1]], "layer_norm_epsilon": ours.norm_epsilon, "tie_word_embeddings": ours.tied,
        "activation_function": _THEIR_ACTIVATION.get(ours.activation), "resid_dropout": ours.dropout,
        "embed_dropout": ours.dropout, "attention_dropout": 0.0,
    }  # fmt: skip


NEO = Architecture(
    "gpt_neo", "GPTNeoForCausalLM", "transformer.", _read_neo, _write_neo,
    (
        Weight("transformer.wte", ("embedding",)),
        Weight("transformer.wpe", ("positions",)),
        Weight("transformer.h.{}.ln_1", ("blocks.{}.attention_norm",)),
        Weight("transformer.h.{}.attn.attention.q_proj", ("blocks.{}.attention.query",)),
        Weight("transformer.h.{}.attn.attention.k_proj", ("blocks.{}.attention.key",)),
        Weight("transformer.h.{}.attn.attention.v_proj", ("blocks.{}.attention.value",)),
        Weight("transformer.h.{}.attn.attention.out_proj", ("blocks.{}.attention.output",)),
        Weight("transformer.h.{}.ln_2", ("blocks.{}.ffn_norm",)),
        Weight("transformer.h.{}.mlp.c_fc", ("blocks.{}.ffn.up",)),
        Weight("transformer.h.{}.mlp.c_proj", ("blocks.{}.ffn.down",)),
        Weight("transformer.ln_f", ("norm",)),
        Weight("lm_head", ("head",)),
    ),
)  # fmt: skip


def _read_neox(theirs: Theirs) -> dict[str, Any]:
    return {
        **_rope({"rotary_pct": 0.25, **theirs}), **_biases(theirs.get("attention_bias", True), True),
        "layers": theirs["num_hidden_layers"], "width": theirs["hidden_size"],
        "heads": theirs["num_attention_heads"], "context": theirs["max_position_embeddings"],
        "ffn_width": theirs["intermediate_size"], "norm": "layer", "norm_epsilon": theirs.get("layer_norm_eps", 1e-5),
        "activation": _activation({"hidden_act": "gelu", **theirs}, "hidden_act"), "qk_norm": False,
        "tied": theirs.get("tie_word_embeddings", False),
        "residual": "parallel" if theirs.get("use_parallel_residual", True) else "pre",
    }  # fmt: skip


def _write_neox(ours: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": ours.layers, "hidden_size": ours.width, "num_attention_heads": ours.heads,
        "max_position_embeddings": ours.context, "intermediate_size": ours.inner_width, "layer_norm_eps": ours.norm_epsilon,
        "hidden_act": _THEIR_ACTIVATION.get(ours.activation), "tie_word_embeddings": ours.tied,
        "attention_bias": ours.biases,
        "use_parallel_residual": ours.residual == "parallel", "hidden_dropout": ours.dropout, "attention_dropout": 0.0,
        "rope_parameters": {**_write_rope(ours), "partial_rotary_factor": ours.rotary_share},
    }  # fmt: skip


NEOX = Architecture(
    "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.", _read_neox, _write_neox,
    (
        Weight("gpt_neox.embed_in", ("embedding",)),
        Weight("gpt_neox.layers.{}.input_layernorm", ("blocks.{}.attention_norm",)),
        Weight("gpt_neox.layers.{}.attention.query_key_value", _QKV, "heads"),
        Weight("gpt_neox.layers.{}.attention.dense", ("blocks.{}.attention.output",)),
        Weight("gpt_neox.layers.{}.post_attention_layernorm", ("blocks.{}.ffn_norm",)),
        Weight("gpt_neox.layers.{}.mlp.dense_h_to_4h", ("blocks.{}.ffn.up",)),
        Weight("gpt_neox.layers.{}.mlp.dense_4h_to_h", ("blocks.{}.ffn.down",)),
        Weight("gpt_neox.final_layer_norm", ("norm",)),
        Weight("embed_out", ("head",)),
    ),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- BERT and RoBERTa --


def _read_bert(theirs: Theirs) -> dict[str, Any]:
    _only(
        theirs, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute", tie_word_embeddings=True,
    )  # fmt: skip
    return {
        "layers": theirs["num_hidden_layers"], "width": theirs["hidden_size"], "heads": theirs["num_attention_heads"],
        "ffn_width": theirs["intermediate_size"], "context": theirs["max_position_embeddings"],
        "segments": theirs["type_vocab_size"], "objective": "masked", "residual": "post", "norm": "layer",
        "norm_epsilon": theirs.get("layer_norm_eps", 1e-12), "positions": "learned",
        "activation": _activation({"hidden_act": "gelu", **theirs}, "hidden_act"), "qk_norm": False, "biases": True,
        "embedding_norm": True, "head_transform": True, "head_bias": True,
    }  # fmt: skip


def _read_roberta(theirs: Theirs) -> dict[str, Any]:
    _only(theirs, hidden_act="gelu")  # whatever it says, its head computes with that
    offset = theirs.get("pad_token_id", 1) + 1
    return {
        **_read_bert(theirs), "context": theirs["max_position_embeddings"] - offset, "position_offset": offset,
    }  # fmt: skip


def _write_bert(ours: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": ours.layers, "hidden_size": ours.width, "num_attention_heads": ours.heads,
        "intermediate_size": ours.inner_width, "max_position_embeddings": ours.context + ours.position_offset,
        "type_vocab_size": ours.segments, "layer_norm_eps": ours.norm_epsilon,
        "hidden_act": _THEIR_ACTIVATION.get(ours.activation), "hidden_dropout_prob": ours.dropout,
        "attention_probs_dropout_prob": 0.0, "tie_word_embeddings": ours.tied,
    }  # fmt: skip


def _bert_weights(prefix: str, transform: tuple[str, str], bias: str) -> tuple[Weight, ...]:
    layer = f"{prefix}encoder.layer.{{}}."
    return (
        Weight(f"{prefix}embeddings.word_embeddings", ("embedding",)),
        Weight(f"{prefix}embeddings.position_embeddings", ("positions",)),
        Weight(f"{prefix}embeddings.token_type_embeddings", ("segments",)),
        Weight(f"{prefix}embeddings.LayerNorm", ("embedding_norm",)),
        Weight(f"{layer}attention.self.query", ("blocks.{}.attention.query",)),
        Weight(f"{layer}attention.self.key", ("blocks.{}.attention.key",)),
        Weight(f"{layer}attention.self.value", ("blocks.{}.attention.value",)),
        Weight(f"{layer}attention.output.dense", ("blocks.{}.attention.output",)),
        Weight(f"{layer}attention.output.LayerNorm", ("blocks.{}.attention_norm",)),
        Weight(f"{layer}intermediate.dense", ("blocks.{}.ffn.up",)),
        Weight(f"{layer}output.dense", ("blocks.{}.ffn.down",)),
        Weight(f"{layer}output.LayerNorm", ("blocks.{}.ffn_norm",)),
        Weight(transform[0], ("transform.dense",)),
        Weight(transform[1], ("transform.norm",)),
        Weight(bias, ("head_bias",)),
    )


BERT = Architecture(
    "bert", "BertForMaskedLM", "bert.", _read_bert, _write_bert,
    _bert_weights("bert.", ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"), "cls.predictions.bias"),
)  # fmt: skip
ROBERTA = Architecture(
    "roberta", "RobertaForMaskedLM", "roberta.", _read_roberta,
    lambda ours: {**_write_bert(ours), "pad_token_id": ours.position_offset - 1},
    _bert_weights("roberta.", ("lm_head.dense", "lm_head.layer_norm"), "lm_head.bias"),
)  # fmt: skip


# ---------------------------------------------------------------------------------------- Llama, Mistral and Qwen --


def _read_llama(theirs: Theirs) -> dict[str, Any]:
    return {**_read_modern(theirs), **_biases(theirs.get("attention_bias", False), theirs.get("mlp_bias", False))}


def _read_mistral(theirs: Theirs) -> dict[str, Any]:
    _only(theirs, layer_types=None)  # transformers has other classes for those whose blocks differ
    return {**_read_modern({"num_key_value_heads": 8, **theirs}), "windows": (theirs.get("sliding_window", 4096),)}


def _read_qwen2(theirs: Theirs) -> dict[str, Any]:
    return {**_read_modern({"num_key_value_heads": 32, **theirs}), "windows": _read_windows(theirs), "qkv_biases": True}


def _read_qwen3(theirs: Theirs) -> dict[str, Any]:
    return {
        **_read_modern({"num_key_value_heads": 32, "head_dim": 128, **theirs}),
        **_biases(theirs.get("attention_bias", False), False), "windows": _read_windows(theirs), "qk_norm": True,
    }  # fmt: skip


def _read_modern(theirs: Theirs) -> dict[str, Any]:
    """What all of them have."""
    rope = _rope(theirs)
    _only({**theirs, "partial_rotary_factor": rope["rotary_share"]}, hidden_act="silu", partial_rotary_factor=1.0)
    return {
        **rope, "layers": theirs["num_hidden_layers"], "width": theirs["hidden_size"],
        "heads": theirs["num_attention_heads"], "kv_heads": theirs.get("num_key_value_heads"),
        "head_size": theirs.get("head_dim"), "ffn_width": theirs["intermediate_size"],
        "context": theirs["max_position_embeddings"], "norm_epsilon": theirs.get("rms_norm_eps", 1e-6), "qk_norm": False,
        "tied": theirs.get("tie_word_embeddings", False),
    }  # fmt: skip


def _biases(attention: bool, ffn: bool) -> dict[str, Any]:
    return {"biases": attention} if attention == ffn else {"biases": attention, "ffn_biases": ffn}


def _read_windows(theirs: Theirs) -> tuple[int | None, ...]:
    """Of Qwen's blocks, which it names one by one or by the number of those that see all."""
    window = theirs.get("sliding_window", 4096) if theirs.get("use_sliding_window") else None
    layers, whole = theirs["num_hidden_layers"], theirs.get("max_window_layers", 28)
    kinds = theirs.get("layer_types") or [_SLIDING if block >= whole else _FULL for block in range(layers)]
    kinds = _kinds(kinds, layers, _FULL, *([_SLIDING] if window else []))
    return shortest_turn(tuple(window if kind == _SLIDING else None for kind in kinds))


def _write_modern(ours: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": ours.layers, "hidden_size": ours.width, "num_attention_heads": ours.heads,
        "num_key_value_heads": ours.key_value_heads, "head_dim": ours.size_of_head, "intermediate_size": ours.inner_width,
        "max_position_embeddings": ours.context, "rms_norm_eps": ours.norm_epsilon, "tie_word_embeddings": ours.tied,
        "hidden_act": "silu", "attention_dropout": 0.0,
        "rope_parameters": _write_rope(ours),
        # Where transformers 4 looks for it.
        "rope_theta": ours.rope_theta, **({"rope_scaling": _write_rope(ours)} if ours.rope_scaling else {}),
    }  # fmt: skip


def _write_llama(ours: ModelConfig) -> dict[str, Any]:
    return {**_write_modern(ours), "attention_bias": ours.biases, "mlp_bias": ours.biases_of_ffn}


def _write_mistral(ours: ModelConfig) -> dict[str, Any]:
    return {**_write_modern(ours), "sliding_window": ours.window(0)}


def _write_qwen2(ours: ModelConfig) -> dict[str, Any]:
    windows = [ours.window(block) for block in range(ours.layers)]
    window = next(filter(None, windows), None)
    return {
        **_write_modern(ours), "use_sliding_window": window is not None, "sliding_window": window,
        "max_window_layers": windows.index(window) if window else ours.layers,
        "layer_types": [_SLIDING if each else _FULL for each in windows],
    }  # fmt: skip


def _write_qwen3(ours: ModelConfig) -> dict[str, Any]:
    return {**_write_qwen2(ours), "attention_bias": ours.biases}


_FULL, _SLIDING = "full_attention", "sliding_attention"
_LLAMA_WEIGHTS = (
    Weight("model.embed_tokens", ("embedding",)),
    Weight("model.layers.{}.input_layernorm", ("blocks.{}.attention_norm",)),
    Weight("model.layers.{}.self_attn.q_proj", ("blocks.{}.attention.query",)),
    Weight("model.layers.{}.self_attn.k_proj", ("blocks.{}.attention.key",)),
    Weight("model.layers.{}.self_attn.v_proj", ("blocks.{}.attention.value",)),
    Weight("model.layers.{}.self_attn.q_norm", ("blocks.{}.attention.query_norm",)),
    Weight("model.layers.{}.self_attn.k_norm", ("blocks.{}.attention.key_norm",)),
    Weight("model.layers.{}.self_attn.o_proj", ("blocks.{}.attention.output",)),
    Weight("model.layers.{}.post_attention_layernorm", ("blocks.{}.ffn_norm",)),
    Weight("model.layers.{}.mlp.gate_proj", ("blocks.{}.ffn.gate",)),
    Weight("model.layers.{}.mlp.up_proj", ("blocks.{}.ffn.up",)),
    Weight("model.layers.{}.mlp.down_proj", ("blocks.{}.ffn.down",)),
    Weight("model.norm", ("norm",)),
    Weight("lm_head", ("head",)),
)
LLAMA = Architecture("llama", "LlamaForCausalLM", "model.", _read_llama, _write_llama, _LLAMA_WEIGHTS)
MISTRAL = Architecture("mistral", "MistralForCausalLM", "model.", _read_mistral, _write_mistral, _LLAMA_WEIGHTS)
QWEN2 = Architecture("qwen2", "Qwen2ForCausalLM", "model.", _read_qwen2, _write_qwen2, _LLAMA_WEIGHTS)
QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM", "model.", _read_qwen3, _write_qwen3, _LLAMA_WEIGHTS)

ARCHITECTURES = {each.kind: each for each in (GPT1, GPT2, NEO, NEOX, BERT, ROBERTA, LLAMA, MISTRAL, QWEN2, QWEN3)}
