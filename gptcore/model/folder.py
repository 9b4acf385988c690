"""A model folder: exactly one model.safetensors, its settings and its tokenizer. Opening one executes nothing from it."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcore.artifacts import write_json
from gptcore.config import ModelConfig
from gptcore.errors import ArtifactError, CorruptArtifactError
from gptcore.model.quantisation import INT8, Int8Embedding, PackedLinear, pack, packs, quantised_empty
from gptcore.model.transformer import GPT, Linear
from gptcore.tokens import Tokenizer

WEIGHTS = "model.safetensors"
SETTINGS = "model.json"
_CACHE = 32 << 20
"""Bytes of weights that a CPU's last cache may hold. Packed, they are used hardly faster from there: 0.82 times as fast with
0.1 M weights, 1.14 times with 5 M."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to use, and what it speaks."""

    model: GPT
    tokenizer: Tokenizer
    task: dict[str, Any] | None
    """What it was fine-tuned for (`task.json` of its examples); None for a base."""


def save_model(folder: Path, model: GPT, tokenizer_folder: Path, task: dict[str, Any] | None = None) -> None:
    """Write a model folder from a model, quantised or not, and the folder of its tokenizer.

    Raises `ArtifactError` for packed weights.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ArtifactError("weights packed for this machine's CPU cannot be saved: load the model in float32")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}, folder / WEIGHTS)
    shutil.copytree(tokenizer_folder, folder / "tokenizer", dirs_exist_ok=True)
    settings = {
        "model": model.config.model_dump(),
        "vocabulary": model.vocab_size,
        "tokenizer": Tokenizer.load(tokenizer_folder).digest,
        "task": task,
    }
    if isinstance(model.embedding, Int8Embedding):
        settings["quantised"] = INT8
    write_json(folder / SETTINGS, settings)


def load_model(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | Literal["fastest"] | None = None
) -> LoadedModel:
    """Open a model folder for inference on `device`.

    `dtype` is the type it computes in; unset, bfloat16 where the hardware has it and float32 elsewhere. With float16 it
    computes in float32, with weights in half precision (`pack`); CPUs only. `fastest`: see `fastest_dtype`. Raises
    `ArtifactError` when it is no model folder and `CorruptArtifactError` when its parts do not fit each other.
    """
    settings = read_settings(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    if tokenizer.digest != settings["tokenizer"]:
        raise CorruptArtifactError(f"{folder} holds another tokenizer than the one its model was trained with")
    model = GPT(ModelConfig(**settings["model"]), settings["vocabulary"], device="meta")
    model = quantised_empty(model, device) if settings.get("quantised") == INT8 else model.to_empty(device=device)
    load_weights(model, folder / WEIGHTS)
    dtype = fastest_dtype(model) if dtype == "fastest" else dtype or default_dtype(torch.device(device))
    return LoadedModel(ready(model, dtype), tokenizer, settings["task"])


def ready(model: GPT, dtype: torch.dtype) -> GPT:
    """The model made ready for inference, in place; `dtype` as in `load_model`."""
    model = model.eval().requires_grad_(False)
    model.compute_dtype = torch.float32 if dtype == torch.float16 else dtype
    in_bytes, device = isinstance(model.embedding, Int8Embedding), model.embedding.weight.device.type
    if dtype == torch.float16 or (in_bytes and dtype != torch.float32 and device == "cpu" and packs()):
        return pack(model)
    if dtype != torch.float32:
        # What training casts at every product is cast once; norms and embeddings keep their float32 weights.
        for module in model.modules():
            if isinstance(module, Linear):
                module.to(dtype)
    return model


def read_settings(folder: Path) -> dict[str, Any]:
    """`model.json` of a model folder. Raises `ArtifactError` or `CorruptArtifactError`."""
    try:
        settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        ModelConfig(**settings["model"])
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is not a model folder: it has no {SETTINGS}") from None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise CorruptArtifactError(f"{folder / SETTINGS} cannot be read: {str(error).splitlines()[0]}") from error
    return settings


def load_weights(model: GPT, file: Path) -> None:
    """Fill all weights from a safetensors file; missing, extra or differently shaped tensors are refused."""
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CorruptArtifactError(f"{file} cannot be read as safetensors: {error}") from error
    fill_weights(model, weights, file)


def fill_weights(model: GPT, weights: Mapping[str, Tensor], source: Path) -> None:
    """Fill all weights by name; missing, extra or differently shaped tensors are refused. `source`: where they are from."""
    wanted = dict(model.named_parameters())
    problems = [f"{name} is missing" for name in wanted.keys() - weights.keys()]
    problems += [f"{name} is unknown" for name in weights.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(weight.shape)}"
        for name, weight in wanted.items()
        if name in weights and weights[name].shape != weight.shape
    ]
    if problems:
        raise CorruptArtifactError(f"{source} does not fit the model's settings: " + "; ".join(sorted(problems)[:5]))
    for name, weight in wanted.items():
        weight.data.copy_(weights[name])


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, CPUs included; float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def fastest_dtype(model: GPT) -> torch.dtype:
    """What a model answers fastest with where it lies: `default_dtype`, but packed weights where that is float32, the CPU has
    products with such, and its cache cannot hold them as they are or they are in eight bits anyway."""
    table = model.embedding.weight
    packed = isinstance(model.embedding, Int8Embedding) or 4 * sum(weight.numel() for weight in model.parameters()) > _CACHE
    dtype = default_dtype(table.device)
    return torch.float16 if packed and dtype == torch.float32 and table.device.type == "cpu" and packs() else dtype


def pick_device(wanted: str) -> torch.device:
    """`auto` takes a card when there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ArtifactError("device is cuda, but torch sees no NVIDIA card on this machine; set device to auto or cpu")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu")
