"""Known shapes, as data. Counted parameters stand where they differ from the paper's."""

from typing import Any

from gptcore.config.model import ModelConfig
from gptcore.errors import SettingsError

_GPT2 = {
    "norm": "layer", "norm_epsilon": 1e-5, "positions": "learned", "activation": "gelu_tanh", "qk_norm": False, "biases": True,
}  # fmt: skip
# Brown et al. 2020: "alternating dense and locally banded sparse attention". How wide the band is was never published; 256 is
# an assumption, after GPT-Neo, which was made in its likeness.
_GPT3 = {**_GPT2, "context": 2048, "windows": (None, 256)}
_NEO = {**_GPT3, "qkv_biases": False, "attention_scale": 1.0}
_BERT = {
    **_GPT2, "context": 512, "objective": "masked", "residual": "post", "activation": "gelu", "embedding_norm": True,
    "head_transform": True, "head_bias": True,
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # Vaswani et al. 2017, the decoder of the base model without its attention to an encoder. It has no longest text.
    "transformer": {
        **_GPT2, "layers": 6, "width": 512, "heads": 8, "context": 512, "residual": "post", "positions": "sinusoidal",
        "activation": "relu",
    },
    # Radford et al. 2018. Counted: 116.5 M.
    "gpt1": {**_GPT2, "layers": 12, "width": 768, "heads": 12, "context": 512, "residual": "post"},
    # Radford et al. 2019. The paper prints 117 M, 345 M, 762 M and 1,542 M; counted: 124.44, 354.8, 774.0 and 1,557.6 M.
    "gpt2": {**_GPT2, "layers": 12, "width": 768, "heads": 12, "context": 1024},
    "gpt2-medium": {**_GPT2, "layers": 24, "width": 1024, "heads": 16, "context": 1024},
    "gpt2-large": {**_GPT2, "layers": 36, "width": 1280, "heads": 20, "context": 1024},
    "gpt2-xl": {**_GPT2, "layers": 48, "width": 1600, "heads": 25, "context": 1024},
    # Brown et al. 2020, table 2.1. Heads of 1.3b and 13b do not divide the width that is printed; their size is. 175b: 174.6 B.
    "gpt3-125m": {**_GPT3, "layers": 12, "width": 768, "heads": 12},
    "gpt3-350m": {**_GPT3, "layers": 24, "width": 1024, "heads": 16},
    "gpt3-760m": {**_GPT3, "layers": 24, "width": 1536, "heads": 16},
    "gpt3-1.3b": {**_GPT3, "layers": 24, "width": 2048, "heads": 24, "head_size": 128},
    "gpt3-2.7b": {**_GPT3, "layers": 32, "width": 2560, "heads": 32},
    "gpt3-6.7b": {**_GPT3, "layers": 32, "width": 4096, "heads": 32},
    "gpt3-13b": {**_GPT3, "layers": 40, "width": 5140, "heads": 40, "head_size": 128},
    "gpt3-175b": {**_GPT3, "layers": 96, "width": 12288, "heads": 96},
    # Black et al. 2021: no scale in attention, no biases of its queries, keys and values.
    "gpt-neo-125m": {**_NEO, "layers": 12, "width": 768, "heads": 12},
    "gpt-neo-350m": {**_NEO, "layers": 24, "width": 1024, "heads": 16},
    "gpt-neo-1.3b": {**_NEO, "layers": 24, "width": 2048, "heads": 16},
    "gpt-neo-2.7b": {**_NEO, "layers": 32, "width": 2560, "heads": 20},
    # Black et al. 2022.
    "gpt-neox-20b": {
        **_GPT2, "layers": 44, "width": 6144, "heads": 64, "context": 2048, "residual": "parallel", "positions": "rotary",
        "rotary_share": 0.25, "tied": False,
    },
    # Devlin et al. 2019 and Liu et al. 2019, with the head that fills in what is hidden.
    "bert-base": {**_BERT, "layers": 12, "width": 768, "heads": 12, "segments": 2, "norm_epsilon": 1e-12},
    "roberta-base": {**_BERT, "layers": 12, "width": 768, "heads": 12, "segments": 1, "position_offset": 2},
    # Du et al. 2022, the base model.
    "glm": {**_GPT2, "layers": 12, "width": 768, "heads": 12, "context": 512, "objective": "prefix"},
    # Ours, in the Qwen3 layout; named after the parameters with a vocabulary of 8,192.
    "modern-5m": {"layers": 4, "width": 256, "heads": 4, "context": 256},
    "modern-14m": {"layers": 6, "width": 384, "heads": 6, "context": 256},
    "modern-33m": {"layers": 8, "width": 576, "heads": 9, "kv_heads": 3, "context": 512},
    "modern-107m": {"layers": 16, "width": 768, "heads": 12, "kv_heads": 4, "context": 1024, "rope_theta": 100_000.0},
    "modern-290m": {"layers": 24, "width": 1024, "heads": 16, "kv_heads": 8, "context": 2048, "rope_theta": 100_000.0},
    "modern-1b": {"layers": 22, "width": 2048, "heads": 16, "kv_heads": 4, "context": 2048, "rope_theta": 1_000_000.0},
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """The settings of a known shape. Raises `SettingsError` for an unknown name."""
    if name not in PRESETS:
        raise SettingsError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
    return ModelConfig(**PRESETS[name])
