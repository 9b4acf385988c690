"""Checkpoints: a folder published whole or not at all, every file with its sha256; safetensors and JSON only.

    checkpoints/step-000120/model.safetensors       float32 weights
                            optimizer.safetensors   state of both optimizers
                            checkpoint.json         step, metrics, digests, size and sha256 of the files; written last

A broken one is set aside as `step-000120.broken` and the one before is used. There is no RNG state to store: batches and
dropout are functions of (seed, step).
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gptcore.artifacts import publish, sha256_file, write_json
from gptcore.errors import CorruptArtifactError, TrainingError, disk_full_is_clear
from gptcore.model import GPT
from gptcore.model.folder import WEIGHTS, load_weights
from gptcore.training.optimizers import Optimizers

MANIFEST = "checkpoint.json"
OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A stored state of a training run."""

    folder: Path
    step: int
    metrics: dict[str, float]
    identity: dict[str, str]
    """Digests of what it belongs to: shards, tokenizer, answers of resolved.json."""


def save(folder: Path, step: int, model: GPT, optimizers: Optimizers, identity: dict[str, str]) -> Checkpoint:
    """Write the state after `step` steps under `folder`. Raises `DiskFullError`; older checkpoints stay untouched."""
    final = folder / f"step-{step:06d}"
    partial = folder / f"step-{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_full_is_clear(folder):
            partial.mkdir(parents=True)
            save_file({name: weight.data for name, weight in model.named_parameters()}, partial / WEIGHTS)
            save_file(optimizers.state(), partial / OPTIMIZER)
            _write_manifest(partial, step, identity)
            publish(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Checkpoint(final, step, {}, identity)


def restore(
    folder: Path, model: GPT, optimizers: Optimizers, identity: dict[str, str], say: Callable[[int, str], None]
) -> Checkpoint | None:
    """Load the newest good checkpoint, if there is one; `say(step, sentence)` hears of every broken one.

    Raises `TrainingError` when a good checkpoint belongs to other shards, another tokenizer or other answers.
    """
    for path in reversed(_finished(folder)):
        try:
            checkpoint = verify(path)
            state = load_file(path / OPTIMIZER)
        except (CorruptArtifactError, SafetensorError) as error:
            broken = path.with_name(path.name + ".broken")
            shutil.rmtree(broken, ignore_errors=True)
            path.rename(broken)
            say(_step_of(path), f"set a broken checkpoint aside as {broken.name}: {error}")
            continue
        for key, digest in identity.items():
            if checkpoint.identity.get(key) != digest:
                raise TrainingError(
                    f"the checkpoint {path} belongs to another {key} than this run; "
                    f"delete the folder {folder.parent} to train from the start"
                )
        load_weights(model, path / WEIGHTS)
        optimizers.load(state)
        return checkpoint
    return None


def verify(path: Path) -> Checkpoint:
    """Compare every file of a checkpoint with its sha256. Raises `CorruptArtifactError` naming the first wrong one."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
        checkpoint = Checkpoint(path, manifest["step"], manifest["metrics"], manifest["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtifactError(f"{path / MANIFEST} cannot be read: {error}") from error
    for name, entry in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["size"] or sha256_file(file) != entry["sha256"]:
            raise CorruptArtifactError(f"{file} is not the file that was saved")
    return checkpoint


def note_metrics(checkpoint: Checkpoint, metrics: dict[str, float]) -> None:
    """Add what was measured after the save, so that the best one is known."""
    manifest = json.loads((checkpoint.folder / MANIFEST).read_text(encoding="utf-8"))
    write_json(checkpoint.folder / MANIFEST, {**manifest, "metrics": {**manifest["metrics"], **metrics}})


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` and the one with the lowest validation loss."""
    finished = _finished(folder)
    measured = [(_metrics(path).get("valid/loss", float("inf")), path) for path in finished]
    best = min(measured, key=lambda pair: pair[0], default=(0.0, None))[1]
    for path in finished[:-keep]:
        if path != best:
            shutil.rmtree(path)
    for stray in folder.glob("*.partial"):
        shutil.rmtree(stray, ignore_errors=True)


def _metrics(path: Path) -> dict[str, float]:
    try:
        metrics: dict[str, float] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError):
        return {}
    return metrics


def _write_manifest(folder: Path, step: int, identity: dict[str, str]) -> None:
    files = {file.name: {"size": file.stat().st_size, "sha256": sha256_file(file)} for file in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"step": step, "metrics": {}, "identity": identity, "files": files})


def _finished(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step-*") if path.suffix == "" and path.is_dir()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-").partition(".")[0])
