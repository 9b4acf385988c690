"""A finished base that another one is trained on from: known by its content, wherever it lies. Nothing of it is loaded here."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gptcore.artifacts import Numbers, content_digest, sha256_file
from gptcore.config import ModelConfig, PipelineConfig, TokenizerConfig, parse_config
from gptcore.corpus.sources.digests import file_digests
from gptcore.errors import ArtifactError, CorruptArtifactError, SettingsError

_TOKENIZER = ("tokenizer/tokenizer.json", "tokenizer/tokenizer.model")
_FILES = ("model.json", "model.safetensors", *_TOKENIZER)
"""All that a model folder is made of."""


@dataclass(frozen=True)
class FinishedBase:
    """The model folder of a base."""

    called: str
    """What a person calls it."""
    folder: Path
    model: ModelConfig
    vocabulary: int
    files: Mapping[str, str]
    """Name of each file below the folder -> its sha256."""

    @property
    def digest(self) -> str:
        """That of the artifact which a training published with this model, so that lineage goes on there."""
        return content_digest({f"model/{name}": {"sha256": digest} for name, digest in self.files.items()})

    @property
    def tokenizer(self) -> str:
        """The digest of its tokenizer's artifact."""
        return content_digest({name: {"sha256": self.files[name]} for name in _TOKENIZER})

    def settings(self, config: PipelineConfig) -> PipelineConfig:
        """`config` with the shape of this model. Raises `SettingsError` where it asks for another."""
        return with_shape(config, f"base.init_from: {self.called}", self.model, self.vocabulary)

    def copy(self, folder: Path) -> Numbers:
        """Fill `folder` with its files and return its numbers. Raises `CorruptArtifactError` where one changes meanwhile."""
        (folder / "tokenizer").mkdir()
        for name, digest in self.files.items():
            shutil.copyfile(self.folder / name, folder / name)
            if sha256_file(folder / name) != digest:
                raise CorruptArtifactError(f"{self.folder / name} changed while it was copied: run again")
        return {"from": self.called, "vocabulary": self.vocabulary}


def with_shape(config: PipelineConfig, where: str, model: ModelConfig, vocabulary: int) -> PipelineConfig:
    """`config` with the shape of a model that is there. Raises `SettingsError` where it asks for another; defaults ask for
    nothing."""
    shape, asked = model.model_dump(), config.model.model_dump() if config.model != ModelConfig() else {}
    other = [
        f"model.{key} {asked.get(key)}, not {shape.get(key)}"
        for key in asked and asked | shape
        if asked.get(key) != shape.get(key)
    ]
    if (pieces := config.tokenizer.vocabulary) not in (TokenizerConfig().vocabulary, vocabulary):
        other.append(f"tokenizer.vocabulary {pieces}, not {vocabulary}")
    if other:
        raise SettingsError(
            f"{where} keeps its shape and its tokenizer, the settings ask for {', '.join(other)}: take them out, or train from "
            "nothing"
        )
    return parse_config(config.model_dump(mode="json") | {"model": shape}, f"the settings with the shape of {where}")


def read_base(called: str, folder: Path, home: Path) -> FinishedBase:
    """The finished base in the model folder `folder`; sha256s are remembered in `<home>/cache`.

    Raises `ArtifactError` for settings that cannot be read, `SourceError` for another file, `SettingsError` for a model with a
    task.
    """
    try:
        settings = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        model, vocabulary, task = ModelConfig(**settings["model"]), int(settings["vocabulary"]), settings["task"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"base.init_from: {folder / 'model.json'} of {called} cannot be read ({str(error).splitlines()[0]}); "
            "name another model, or bring it back"
        ) from error
    if task is not None:
        raise SettingsError(
            f"base.init_from: {called} was fine-tuned for {task['name']} and is no base: name the one that it was made of, "
            f"which gptcore lineage {called} tells"
        )
    if settings.get("quantised"):
        raise SettingsError(
            f"base.init_from: {called} has weights in eight bits, which nothing can be learned with: name the model that it "
            "was made of"
        )
    files = file_digests({name: folder / name for name in _FILES}, home, f"base.init_from: {called}")
    return FinishedBase(called, folder, model, vocabulary, files)
