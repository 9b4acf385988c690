"""Models of transformers <-> this model: the same numbers under other names, so that one exported again is the same bits.

A folder from outside is data. Its settings are JSON, its weights safetensors; a file that would have to be unpickled is
refused, and no code that lies beside is looked at.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcore.artifacts import write_json
from gptcore.config import ModelConfig
from gptcore.errors import CorruptArtifactError, ModelFormatError
from gptcore.model.architectures import ARCHITECTURES, Architecture, Weight, shortest_turn
from gptcore.model.folder import WEIGHTS, fill_weights
from gptcore.model.transformer import GPT

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_OLD_NAMES = ((re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"), (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"))
_NO_WEIGHTS = re.compile(
    r"\.attn(\.attention)?\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$|rotary_emb\.inv_freq$|position_ids$"
    r"|^cls\.predictions\.decoder\.|^lm_head\.decoder\.|^(bert|roberta)\.pooler\.|^cls\.seq_relationship\."
)
"""Masks and tables that older versions saved with the weights, second names of the same weights, and heads for other ends."""
_BESIDE_THE_SHAPE = {"dropout", "document_mask"}
"""What a model was trained with; it is the same model without."""


class TransformersModel(Protocol):
    """A model of transformers, as far as it is needed here."""

    config: Any

    def state_dict(self) -> Mapping[str, Tensor]:
        """Its weights by name."""


def import_model(source: Path | str | TransformersModel) -> GPT:
    """The model in a Hugging Face folder, or one of transformers, as one of ours; float32, on the CPU.

    Raises `ModelFormatError` for a folder without settings or safetensors, an architecture or a setting that this model does
    not have, and `CorruptArtifactError` for tensors that are missing, left over, of another shape or no numbers.
    """
    if isinstance(source, Path | str):
        where = str(source)
        theirs, tensors = read_settings(Path(source)), _read_tensors(Path(source))
    else:
        where, theirs, tensors = type(source).__name__, source.config.to_dict(), dict(source.state_dict())
    architecture = architecture_of(theirs, where)
    model = GPT(_settings(architecture, theirs, where), int(theirs["vocab_size"]), device="cpu")
    if broken := sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()):
        raise CorruptArtifactError(f"{where}: {', '.join(broken[:5])} holds what is no number: fetch the model again")
    fill_weights(model, _ours(architecture, model, tensors), Path(where))
    return model


def export_model(model: GPT, folder: Path, symbols: Mapping[str, int | None] | None = None) -> Architecture:
    """Write settings and weights into `folder`, as transformers loads them; returns the architecture that they are of.

    `symbols`: ids such as `eos_token_id`. A norm of the embedding, which none of them has, is worked into the table. Raises
    `ModelFormatError` when no architecture has what the model's settings ask for.
    """
    model = _without_embedding_norm(model)
    architecture = _fitting(model.config)
    theirs = architecture.write(model.config)
    settings = {
        "model_type": architecture.kind, "architectures": [architecture.name], "vocab_size": model.vocab_size,
        "dtype": "float32", "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **theirs, **(symbols or {}),
    }  # fmt: skip
    if architecture.kind == "roberta":
        settings["pad_token_id"] = theirs["pad_token_id"]  # where it counts places from
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_theirs(architecture, model))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "config.json", settings)
    if model.config.objective != "masked":
        ids = {name: settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    return architecture


def read_settings(folder: Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face folder. Raises `ModelFormatError`."""
    file = folder / "config.json"
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFormatError(f"{folder} is no Hugging Face model folder: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"{file} cannot be read ({str(error).splitlines()[0]}): fetch the model again") from error
    if not isinstance(theirs, dict):
        raise ModelFormatError(f"{file} holds no settings: fetch the model again")
    return theirs


def read_shape(folder: Path) -> tuple[ModelConfig, int]:
    """Our settings and the vocabulary of a Hugging Face folder, from its settings alone. Raises `ModelFormatError`."""
    theirs = read_settings(folder)
    model = _settings(architecture_of(theirs, str(folder)), theirs, str(folder))
    try:
        return model, int(theirs["vocab_size"])
    except (KeyError, TypeError, ValueError):
        raise ModelFormatError(f"{folder}: its config.json has no vocab_size: fetch the model again") from None


def architecture_of(theirs: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that settings name. Raises `ModelFormatError` for one that is unknown."""
    kind = theirs.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelFormatError(
            f"{where} is of the architecture {kind!r}, which cannot be imported; there are: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[kind]


# ------------------------------------------------------------------------------------------------------ settings --


def _settings(architecture: Architecture, theirs: Mapping[str, Any], where: str) -> ModelConfig:
    if theirs.get("quantization_config"):
        raise ModelFormatError(f"{where} holds quantised weights: fetch the model in float32, bfloat16 or float16")
    try:
        return ModelConfig(**architecture.read(theirs))
    except KeyError as error:
        raise ModelFormatError(f"{where}: its config.json has no {error.args[0]}, which {architecture.kind} needs") from error
    except (TypeError, ValueError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise ModelFormatError(f"{where}: its config.json does not describe a {architecture.kind} model ({reason})") from error


def _fitting(config: ModelConfig) -> Architecture:
    """The architecture that can hold a model of these settings."""
    nearest: tuple[int, str, list[str]] | None = None
    wanted = _resolved(config)
    for architecture in ARCHITECTURES.values():
        try:
            has = _resolved(ModelConfig(**architecture.read(architecture.write(config))))
        except (ModelFormatError, ValidationError):
            continue
        differ = [name for name, value in wanted.items() if has[name] != value]
        if not differ:
            return architecture
        if nearest is None or len(differ) < nearest[0]:
            nearest = len(differ), architecture.kind, [f"{name} {wanted[name]}" for name in differ]
    reason = f"; the nearest, {nearest[1]}, does not have {', '.join(nearest[2])}" if nearest else ""
    raise ModelFormatError(f"no architecture of transformers can hold this model{reason}")


def _resolved(config: ModelConfig) -> dict[str, Any]:
    """The settings that make the model, nothing left open."""
    explicit = {
        "kv_heads": config.key_value_heads, "head_size": config.size_of_head, "ffn_width": config.inner_width,
        "qkv_biases": config.biases_of_queries, "ffn_biases": config.biases_of_ffn, "rope_scaling": config.rope_scaling,
        "attention_scale": config.attention_scale or config.size_of_head**-0.5,
        "windows": shortest_turn(tuple(config.window(block) for block in range(config.layers))),
    }  # fmt: skip
    if config.positions != "rotary":
        explicit |= {"rope_theta": None, "rotary_share": None, "rope_scaling": None}
    return {name: value for name, value in {**config.model_dump(), **explicit}.items() if name not in _BESIDE_THE_SHAPE}


@torch.no_grad()
def _without_embedding_norm(model: GPT) -> GPT:
    """The same function with a table of normed embeddings, and the old one as its head."""
    config = model.config
    if model.embedding_norm is None or config.smear or config.positions != "rotary" or config.segments:
        return model
    plain = GPT(config.model_copy(update={"embedding_norm": False, "tied": False}), model.vocab_size, device="cpu")
    weights: dict[str, Tensor] = {
        name: weight for name, weight in model.named_parameters() if not name.startswith("embedding_norm")
    }
    weights |= {"embedding.weight": model.embedding_norm(model.embedding.weight), "head.weight": model.head_weight}
    fill_weights(plain, weights, Path("the model"))
    return plain.eval()


# ------------------------------------------------------------------------------------------------------- weights --


def _pairs(architecture: Architecture, model: GPT) -> Iterator[tuple[str, tuple[str, ...], Weight]]:
    """Their name, our names and how they are laid out, of every weight that this model has."""
    own = dict(model.named_parameters())
    for weight in architecture.weights:
        for block in range(model.config.layers) if "{}" in weight.theirs else (0,):
            for suffix in (".weight", ".bias", ""):
                names = tuple(name.format(block) + suffix for name in weight.ours)
                if names[0] in own:
                    # The bias of a head is a weight of its own with us, and `.bias` of the head with them.
                    yield weight.theirs.format(block) + suffix, names, weight


def _ours(architecture: Architecture, model: GPT, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names. Raises `CorruptArtifactError` for what is left over; what is missing is found later."""
    pairs = list(_pairs(architecture, model))
    wanted = {theirs for theirs, _, _ in pairs}
    given = {_full_name(name, architecture, wanted): tensor for name, tensor in tensors.items()}
    table = next(theirs for theirs, ours, _ in pairs if ours == ("embedding.weight",))
    if model.head is None:
        _drop_tied(given, given.get(table))
    extra = sorted(name for name in given.keys() - wanted if not _NO_WEIGHTS.search(name))
    missing = sorted(wanted - given.keys())
    if extra or missing:
        problems = [f"{name} is missing" for name in missing[:5]] + [f"{name} is unknown" for name in extra[:5]]
        raise CorruptArtifactError(f"the weights are not those of a {architecture.kind} model: {'; '.join(problems)}")
    found: dict[str, Tensor] = {}
    for theirs, ours, weight in pairs:
        found.update(zip(ours, _split(given[theirs].float(), weight, len(ours), model.config), strict=True))
    return found


def _full_name(name: str, architecture: Architecture, wanted: set[str]) -> str:
    for old, new in _OLD_NAMES:
        name = old.sub(new, name)
    if name == "lm_head.weight" and "embed_out.weight" in wanted:
        return "embed_out.weight"  # GPT-NeoX in memory and in its file
    return architecture.prefix + name if name not in wanted and architecture.prefix + name in wanted else name


def _drop_tied(given: dict[str, Tensor], table: Tensor | None) -> None:
    """A head that is the embedding may be saved a second time; one that says so and is another is a broken file."""
    for name in ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight", "lm_head.decoder.weight"):
        head = given.pop(name, None)
        if head is not None and table is not None and not torch.equal(head, table):
            raise CorruptArtifactError(f"the settings say that head and embedding are one, but {name} is another matrix")


def _theirs(architecture: Architecture, model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under their names."""
    own = dict(model.named_parameters())
    for theirs, ours, weight in _pairs(architecture, model):
        parts = [own[name].detach().float().cpu() for name in ours]
        yield theirs, _join(parts, weight, model.config).contiguous()


def _split(tensor: Tensor, weight: Weight, parts: int, config: ModelConfig) -> list[Tensor]:
    """Their tensor as ours."""
    if weight.layout == "heads":
        return [
            part.flatten(0, 1) for part in tensor.view(config.heads, parts, config.size_of_head, *tensor.shape[1:]).unbind(1)
        ]
    if weight.layout == "transposed" and tensor.dim() == 2:
        tensor = tensor.t()
    return list(tensor.chunk(parts)) if parts > 1 else [tensor]


def _join(parts: list[Tensor], weight: Weight, config: ModelConfig) -> Tensor:
    """Our tensors as theirs; the other way round of `_split`."""
    if weight.layout == "heads":
        return torch.stack([part.view(config.heads, config.size_of_head, *part.shape[1:]) for part in parts], 1).flatten(0, 2)
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.t() if weight.layout == "transposed" and whole.dim() == 2 else whole


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors. Raises `ModelFormatError` when there are none."""
    files = [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    try:
        if index.exists():
            # Names only: a path in the index could lead out of the folder.
            names = {Path(str(name)).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
            files = [folder / name for name in sorted(names)]
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except FileNotFoundError as error:
        pickle = next((name for name in _PICKLES if (folder / name).exists()), None)
        if pickle is not None:
            raise ModelFormatError(
                f"{folder} holds its weights in {pickle}, a pickle, which can execute code when it is opened: "
                "fetch the model as safetensors"
            ) from None
        raise ModelFormatError(f"{folder} has no {Path(error.filename or WEIGHTS).name}: fetch the model again") from None
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise ModelFormatError(
            f"the weights in {folder} cannot be read as safetensors ({str(error).splitlines()[0]}): fetch the model again"
        ) from error
