"""A model of transformers, in a folder or on the hub, as a base of ours: known by its content, wherever it lies."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from gptcore.artifacts import Numbers, content_digest
from gptcore.config import ModelConfig, PipelineConfig
from gptcore.corpus.sources.digests import file_digests
from gptcore.errors import ModelFormatError
from gptcore.model.folder import save_model
from gptcore.model.huggingface import import_model, read_shape
from gptcore.start import with_shape
from gptcore.tokens import import_tokenizer

_SUFFIXES = (".json", ".safetensors", ".txt", ".model")
"""Of all that a model is made of; nothing else is fetched, above all no code and no pickle."""


@dataclass(frozen=True)
class Original:
    """A model that is to be imported."""

    called: str
    """What a person calls it."""
    folder: Path
    model: ModelConfig
    vocabulary: int
    """Rows of its table."""
    files: Mapping[str, str]
    """Name of each file -> its sha256."""

    @property
    def digest(self) -> str:
        """Of all its files."""
        return content_digest({name: {"sha256": digest} for name, digest in self.files.items()})

    def settings(self, config: PipelineConfig) -> PipelineConfig:
        """`config` with the shape of this model. Raises `SettingsError` where it asks for another."""
        return with_shape(config, f"base.import: {self.called}", self.model, self.vocabulary)

    def convert(self, folder: Path) -> Numbers:
        """Write it into `folder/model` as one of ours; returns its numbers. Raises `ModelFormatError` where it is none."""
        model = import_model(self.folder)
        with TemporaryDirectory(dir=folder) as partial:
            tokenizer = import_tokenizer(self.folder, Path(partial))
            assert tokenizer.vocabulary == self.vocabulary, "it has as many ids as the table has rows, or is refused"
            save_model(folder / "model", model, Path(partial))
        parameters = sum(weight.numel() for weight in model.parameters())
        return {"imported_from": self.called, "parameters": parameters, "vocabulary": self.vocabulary}


def find_original(called: str, home: Path) -> Original:
    """The model that a person names: a local folder, or a name of the hub, which is fetched.

    sha256s are remembered in `<home>/cache`. Raises `ModelFormatError` when it is not there, cannot be fetched or is of an
    architecture that cannot be imported.
    """
    folder = Path(called).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or called.startswith((".", "~")) or called.count("/") > 1 or folder.exists():
            raise ModelFormatError(f"there is no folder {called} with a model to import")
        folder = _fetch(called)
    model, vocabulary = read_shape(folder)
    names = sorted(path.name for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    files = file_digests({name: folder / name for name in names}, home, f"importing {called}")
    return Original(called, folder.absolute(), model, vocabulary, files)


def name_of(called: str) -> str:
    """A name for a pipeline: the last part of the model's own, in small letters."""
    return re.sub(r"[^a-z0-9]+", "-", Path(called).name.lower()).strip("-")[:64] or "imported"


def _fetch(called: str) -> Path:
    """The folder of a model of the hub, its files fetched where they are not there yet."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(called, allow_patterns=[f"*{suffix}" for suffix in _SUFFIXES], etag_timeout=10))
    except Exception as error:
        why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ModelFormatError(
            f"the model {called} is no local folder and cannot be fetched from the hub ({why.rstrip('.')}): check its name and "
            "the connection, or name a folder that holds config.json and model.safetensors"
        ) from error
