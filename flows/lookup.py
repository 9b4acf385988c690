"""From what a person types to a folder: a registry name, an artifact, a checkpoint, the name of a stage."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptcore.artifacts import MANIFEST, load_artifact, read_manifest, sha256_file, verify, write_json
from gptcore.errors import ArtifactError, ModelNotFoundError
from gptcore.lineage import Lineage

Registry = Callable[[], Any]
"""Opens the registry; only called when a name needs it, since MLflow takes a second to import."""


def model_folder(what: str, home: Path, registry: Registry) -> Path:
    """The model folder behind `what`. Raises `ModelNotFoundError`; nothing that lies there is executed."""
    path = Path(what).expanduser()
    if path.is_dir():
        for folder in (path, path / "model"):
            if (folder / "model.json").is_file():
                for place in (folder, folder.parent):
                    if (place / MANIFEST).is_file():
                        verify(place)
                return folder.absolute()
        if (path / "checkpoint.json").is_file():
            return _from_checkpoint(path.absolute(), home)
        if (path / "config.json").is_file():
            raise ModelNotFoundError(f"{what} is a model of transformers: `gptcore import {what}` makes a base of it")
        raise ModelNotFoundError(f"{what} is neither a model folder, nor an artifact with a model, nor a checkpoint")
    if path.exists() or what.startswith((".", "/")):
        raise ModelNotFoundError(f"{what} is no folder; give a model's name, an artifact's or a checkpoint's folder")
    if artifact := _newest(what, home):
        return model_folder(str(artifact), home, registry)
    resolved: Path = registry().resolve(what)
    return resolved


def find_artifact(what: str, home: Path, registry: Registry) -> Path:
    """The artifact's folder behind a path, the name of a stage (its newest artifact) or a model. Raises `ArtifactError`."""
    path = Path(what)
    if path.is_dir():
        for folder in (path, path.parent):
            if (folder / MANIFEST).is_file():
                return folder.absolute()
        raise ArtifactError(f"{what} is not a finished artifact: it has no {MANIFEST}")
    if artifact := _newest(what, home):
        return artifact
    folder = model_folder(what, home, registry).parent
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{what} lies in MLflow only, not in the store of {home}; it was checked when it was fetched")
    return folder


def registered(what: str, home: Path, registry: Registry) -> Any:
    """The registered version behind a model's name, an artifact or the name of a stage. Raises `ModelNotFoundError`."""
    if not Path(what).expanduser().is_dir() and _newest(what, home) is None:
        return registry().find(what)
    with contextlib.suppress(ArtifactError):
        digest = read_manifest(find_artifact(str(Path(what).expanduser()), home, registry))["digest"]
        for version in registry().all_versions():
            if version.digest == digest:
                return version
    raise ModelNotFoundError(f"{what} is not registered, so MLflow has no run of it; name a registered model: gptcore models")


def _newest(stage: str, home: Path) -> Path | None:
    """The artifact of a stage that was built last."""
    manifests = list((home / "store" / stage).glob(f"*/*/{MANIFEST}")) if stage and "/" not in stage else []
    return max(manifests, key=lambda file: str(read_manifest(file.parent)["built_at"])).parent if manifests else None


def describe(what: str, home: Path, registry: Registry) -> dict[str, Any]:
    """Facts of an artifact or a registered version, as plain values."""
    facts: dict[str, Any] = {}
    if not Path(what).is_dir() and not (home / "store" / what).is_dir():
        facts = registry().find(what).as_row()
    try:
        path = find_artifact(what, home, registry)
    except ArtifactError:
        if not facts:
            raise
        return facts
    artifact, manifest = load_artifact(path), read_manifest(path)
    keys = (
        "stage",
        "name",
        "fingerprint",
        "digest",
        "built_at",
        "seconds",
        "git_commit",
        "numbers",
        "settings",
        "inputs",
    )
    facts |= {key: manifest[key] for key in keys if key not in facts}
    facts["path"] = str(artifact.path)
    facts["files"] = {name: entry["size"] for name, entry in manifest["files"].items()}
    return facts


def lineage(what: str, home: Path, registry: Registry) -> dict[str, Any]:
    """What `what` was made of, and every artifact and registered version that depends on it, as plain values.

    `what` is a model, an artifact, the name of a stage or of a source, or the id of a document. Raises `ArtifactError`.
    """
    known = Lineage(home / "store")
    answer: dict[str, Any] = {"what": what}
    if not (home / "store" / what).is_dir() and (readers := known.of_source(what)):
        start = {node.inputs[what] for node in readers}
        answer |= {"is": "source", "read_by": [node.as_row() for node in readers]}
        used_by = known.dependents(start)
    elif not Path(what).exists() and (holders := known.of_document(what)):
        answer |= {"is": "document", "stands_in": [node.as_row() for node in holders]}
        used_by = [*holders, *known.dependents({node.digest for node in holders})]
    else:
        node = known.node(str(read_manifest(find_artifact(what, home, registry))["digest"]))
        answer |= {"is": "artifact", **known.tree(node)}
        used_by = known.dependents({node.digest})
    digests = {node.digest for node in used_by} | {answer.get("digest")}
    versions = [version for version in registry().all_versions() if version.digest in digests]
    answer["used_by"] = [node.as_row() for node in used_by]
    answer["versions"] = [{"name": v.name, "version": v.version, "aliases": list(v.aliases)} for v in versions]
    return answer


def _from_checkpoint(checkpoint: Path, home: Path) -> Path:
    """A model folder made of a checkpoint's weights and of its run's settings and tokenizer."""
    job_file = checkpoint.parent.parent / "job.json"
    if not job_file.is_file():
        raise ModelNotFoundError(f"{checkpoint} lies outside its run folder, whose job.json says what model it is")
    job: dict[str, Any] = json.loads(job_file.read_text(encoding="utf-8"))
    folder = home / "cache" / "checkpoints" / sha256_file(checkpoint / "checkpoint.json")[:16]  # it holds those of all files
    if not (folder / "model.json").is_file():
        from gptcore.training.checkpoint import extract_weights  # loads torch
        from gptcore.training.checkpoint import verify as verify_checkpoint

        found = verify_checkpoint(checkpoint)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(job["tokenizer"], folder / "tokenizer")
        extract_weights(found, folder / "model.safetensors")
        tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
        write_json(
            folder / "model.json",
            {
                "model": job["model"], "vocabulary": tokenizer["vocabulary"], "tokenizer": found.identity["tokenizer"],
                "task": job["task"],
            },
        )  # fmt: skip
    return folder
