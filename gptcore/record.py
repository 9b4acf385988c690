"""The record of an artifact: the manifests of everything it was made of, which together are all the settings of its pipeline.

A manifest holds the settings of its stage and the digests of its inputs. So the manifests from a model down to its sources
say how to make it again; no settings file is needed, and none that has changed since can mislead.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gptcore.artifacts import Recipe, content_digest, read_manifest
from gptcore.config import PipelineConfig, parse_config
from gptcore.errors import ArtifactError

BASE = "base"
"""Stage of a pretrained model; as an input of one: the base that it was trained on from."""
START = "start"
"""Stage of a finished base, taken as it is, that a pipeline's base was trained on from."""
OLD = "old corpus"
"""Name of the input of a corpus that it adds to; no source can be called so."""

Manifest = Mapping[str, Any]
Find = Callable[[str], Path | None]
"""Digest of an artifact -> a folder that holds its `artifact.json` and, of a training, `report/resolved.json`."""


@dataclass(frozen=True)
class Record:
    """How an artifact was made."""

    target: str
    """Stage of the artifact."""
    folders: Mapping[str, Path]
    """Stage -> folder of its `artifact.json`."""
    manifests: Mapping[str, Manifest]
    """Stage -> `artifact.json`: the artifact, all it was made of, and its evaluation where there is one."""
    given: Mapping[str, Path] = field(default_factory=dict)
    """What it went on from, name -> folder: `base` and `old corpus` of a round of continual training, or `start`."""

    @cached_property
    def name(self) -> str:
        """Of the pipeline."""
        return str(self.manifests[self.target]["name"])

    @property
    def model(self) -> str | None:
        """Stage of the model that this is about: the target itself, or what the target is the evaluation of."""
        stages = [self.target, *(self.manifests[self.target]["inputs"] if self.target.startswith("evaluation-") else ())]
        return next((stage for stage in stages if is_training(stage)), None)

    @property
    def last(self) -> str:
        """Stage that is made of all others: the evaluation where there is one, else the target."""
        return next((stage for stage in self.manifests if stage.startswith("evaluation-")), self.target)

    @property
    def sources(self) -> set[str]:
        """Names of all sources."""
        return {name for manifest in self.manifests.values() for name in sources_of(manifest)}

    def evaluated_by(self) -> tuple[str, dict[str, str]] | None:
        """Stage and inputs of the evaluation that belongs to the model: on the test set of its own pipeline."""
        if self.model is None:
            return None
        task = self.model.removeprefix("finetune-")  # of the base: base
        texts = "corpus-all" if "corpus-all" in self.manifests else "corpus"
        test_set = texts if task == "base" else f"examples-{task}"
        beside = (START,) if task == BASE and START in self.manifests else ()
        return f"evaluation-{task}", {stage: self.manifests[stage]["digest"] for stage in (self.model, test_set, *beside)}

    def with_evaluation(self, folder: Path) -> "Record":
        """The same record with the evaluation whose manifest lies in `folder`."""
        manifest = read_manifest(folder)
        stage = str(manifest["stage"])
        return replace(self, folders={**self.folders, stage: folder}, manifests={**self.manifests, stage: manifest})

    def config(self) -> PipelineConfig:
        """The settings of the pipeline, as far as they made this artifact.

        Raises `SettingsError` when this version of gptcore does not know one of them.
        """
        values: dict[str, Any] = {"name": self.name, "tasks": list(self._tasks())}
        for stage in ("corpus", "corpus-new", "tokenizer", "shards", "shards-new"):
            if stage in self.manifests:
                values[stage.removesuffix("-new")] = dict(self.manifests[stage]["settings"])
        if "shards-new" in self.manifests:
            values["continual"] = {key: values["shards"].pop(key) for key in ("replay", "seed")}
        if "corpus" not in values:  # examples alone
            values["corpus"] = {"sources": [task["source"] for task in values["tasks"]]}
        values["split"] = next(m["settings"]["split"] for m in self.manifests.values() if "split" in m["settings"])
        values["corpus"].pop("split", None)
        base = self.manifests.get("base")
        values |= base["settings"] if base is not None else self._context()
        values["training"] = _training(base)
        for stage, manifest in self.manifests.items():
            if stage.startswith("evaluation-"):
                values["evaluation"] = manifest["settings"]
        return parse_config(values, f"the record of {self.name}, read by this version of gptcore")

    def _tasks(self) -> Iterator[dict[str, Any]]:
        """The tasks whose rows are part of it. One that it was not fine-tuned for has no training to speak of."""
        for stage, manifest in self.manifests.items():
            if stage.startswith("examples-"):
                settings = {key: value for key, value in manifest["settings"].items() if key != "split"}
                yield {**settings, "training": _training(self.manifests.get(stage.replace("examples-", "finetune-")))}

    def _context(self) -> dict[str, Any]:
        """Of a task's shards alone: the one setting of the model that they know."""
        shards = next((manifest for stage, manifest in self.manifests.items() if stage.startswith("shards-")), None)
        return {} if shards is None else {"model": shards["settings"]}


def read_record(folder: Path, find: Find) -> Record:
    """The record of the artifact in `folder`; `find` leads from each input's digest to its manifest.

    Raises `ArtifactError` when a manifest cannot be found or is not the one that was published.
    """
    target = str(read_manifest(folder)["stage"])
    if target == START:
        raise ArtifactError(
            f"{folder} is a model as it was found, nothing was built: gptcore verify {folder} compares its files"
        )
    folders: dict[str, Path] = {}
    manifests: dict[str, Manifest] = {}
    given: dict[str, str] = {}
    """Digest -> name."""
    pending = [folder]
    while pending:
        folder = pending.pop()
        manifest = read_manifest(folder)
        stage = str(manifest["stage"])
        if stage in manifests:
            _check_same(manifests[stage], manifest)
            continue
        check_manifest(manifest, folder)
        folders[stage], manifests[stage] = folder, manifest
        if is_imported(manifest):
            if stage == target:
                raise ArtifactError(
                    f"{folder} was imported from {manifest['numbers']['imported_from']}, nothing was trained: gptcore verify "
                    f"{folder} compares its files"
                )
            given |= {manifest["digest"]: BASE, tokenizer_within(manifest): "tokenizer"}
            continue
        given |= {manifest["inputs"][name]: name for name in _gone_on_from(manifest)}
        # Models first: a base that was trained on from another says which tokenizer is not learned anew.
        for name, digest in sorted(manifest["inputs"].items(), key=lambda item: is_training(item[0])):
            if name not in sources_of(manifest) and digest not in given:
                pending.append(_found(name, digest, manifest, find))
    given |= {manifests[START]["digest"]: START} if START in manifests else {}
    began = {name: _given(name, digest, find) for digest, name in given.items() if name in (BASE, OLD, START)}
    return Record(target, folders, manifests, began)


def _gone_on_from(manifest: Manifest) -> tuple[str, ...]:
    """Those inputs of an artifact that earlier rounds of continual training, or another pipeline, made."""
    if manifest["stage"] == BASE:
        return (BASE, "tokenizer") if BASE in manifest["inputs"] else ("tokenizer",) if START in manifest["inputs"] else ()
    given = {START: ("model",), "shards-new": ("tokenizer",), "corpus-new": (OLD,), "corpus-all": (OLD,)}
    return given.get(manifest["stage"], ())


def _given(name: str, digest: str, find: Find) -> Path:
    folder = find(digest)
    if folder is None or not all((folder / file).is_file() for file in read_manifest(folder)["files"]):
        raise ArtifactError(
            f"it was trained on from the {name} {digest[:12]}, whose files are not in the store any more: bring them back "
            "from a backup, or train anew with gptcore run"
        )
    return folder


def _found(name: str, digest: str, of: Manifest, find: Find) -> Path:
    folder = find(digest)
    if folder is None:
        raise ArtifactError(
            f"the record is incomplete: {of['stage']} {of['name']} was made of {name} {digest[:12]}, whose {name} manifest is "
            "neither in the store nor in MLflow; bring its folder back into the store, or train anew with gptcore run"
        )
    return folder


def _check_same(one: Manifest, other: Manifest) -> None:
    if one["digest"] != other["digest"]:
        raise ArtifactError(
            f"the record leads to two different artifacts of the stage {one['stage']} ({one['digest'][:12]} and "
            f"{other['digest'][:12]}): it was made by more than one run of the pipeline, which cannot be rebuilt as one"
        )


def check_manifest(manifest: Manifest, folder: Path) -> None:
    """Raise `ArtifactError` unless fingerprint and digest follow from what the manifest itself says."""
    recipe = Recipe(*(manifest[key] for key in ("stage", "name", "version", "settings", "inputs")))
    digest = content_digest(manifest["files"])
    for what, said, follows in (
        ("settings or inputs", manifest["fingerprint"], recipe.fingerprint),
        ("list of files", manifest["digest"], digest),
    ):
        if said != follows:
            raise ArtifactError(
                f"the record {folder / 'artifact.json'} was changed after it was published: its {what} are not those of "
                f"{said[:12]}; put the original back, or train anew with gptcore run"
            )


def is_training(stage: str) -> bool:
    """Whether a stage trains a model."""
    return stage == BASE or stage.startswith("finetune-")


def is_imported(manifest: Manifest) -> bool:
    """Whether it is of a base that was imported and not trained."""
    return manifest["stage"] == BASE and "base" in manifest["settings"]


def tokenizer_within(manifest: Manifest) -> str:
    """The digest of the tokenizer that lies in the folder of a base."""
    return content_digest({name: file for name, file in manifest["files"].items() if name.startswith("model/tokenizer/")})


def sources_of(manifest: Manifest) -> list[str]:
    """Names of those inputs of an artifact that are sources."""
    settings = manifest["settings"]
    sources = [settings["source"]] if "source" in settings else settings.get("sources", ())
    return [str(source["name"]) for source in sources]


def _training(manifest: Manifest | None) -> dict[str, Any]:
    """The training of a manifest; without one, what nobody asks for. One checkpoint is enough to rebuild."""
    settings = {} if manifest is None else manifest["settings"]
    return {**settings.get("training", {"steps": 1}), "keep": 1}
