"""Checkpoints: a folder published whole or not at all, every file with its sha256; safetensors and JSON only.

    checkpoints/step-000120/model.safetensors       float32 weights
                            optimizer.safetensors   state of both optimizers
                            average.safetensors     moving average of the weights, where there is one
                            checkpoint.json         step, metrics, digests, sha256 of the files; written last

A broken one is set aside as `step-000120.broken` and the one before is used. There is no RNG state to store: batches and
dropout are functions of (seed, step).
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcore.artifacts import publish, sha256_file, write_json
from gptcore.errors import CorruptArtifactError, TrainingError, disk_full_is_clear
from gptcore.model import GPT
from gptcore.model.folder import WEIGHTS, load_weights
from gptcore.training.average import Average
from gptcore.training.optimizers import Optimizers

MANIFEST = "checkpoint.json"
OPTIMIZER = "optimizer.safetensors"
AVERAGE = "average.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A stored state of a training run."""

    folder: Path
    step: int
    metrics: dict[str, float]
    identity: dict[str, str]
    """Digests of what it belongs to: shards, tokenizer, answers of resolved.json."""
    memory: dict[str, Any] = field(default_factory=dict)
    """What else the trainer wants to find again; JSON."""


@dataclass(frozen=True)
class State:
    """What a checkpoint holds, live: it is saved from and restored into these."""

    model: GPT
    optimizers: Optimizers
    average: Average | None = None


def save(folder: Path, step: int, state: State, identity: dict[str, str], memory: dict[str, Any] | None = None) -> Checkpoint:
    """Write the state after `step` steps under `folder`. Raises `DiskFullError`; older checkpoints stay untouched."""
    memory = memory or {}
    final = folder / f"step-{step:06d}"
    partial = folder / f"step-{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_full_is_clear(folder):
            partial.mkdir(parents=True)
            save_file({name: weight.data for name, weight in state.model.named_parameters()}, partial / WEIGHTS)
            save_file(state.optimizers.state(), partial / OPTIMIZER)
            if state.average is not None:
                save_file(state.average.state(), partial / AVERAGE)
            _write_manifest(partial, step, identity, memory)
            publish(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Checkpoint(final, step, {}, identity, memory)


def restore(folder: Path, state: State, identity: dict[str, str], say: Callable[[int, str], None]) -> Checkpoint | None:
    """Load the newest good checkpoint, if there is one; `say(step, sentence)` hears of every broken one.

    Raises `TrainingError` when a good checkpoint belongs to other shards, another tokenizer or other answers.
    """
    for path in reversed(_finished(folder)):
        try:
            checkpoint = verify(path)
            moments = load_file(path / OPTIMIZER)
            averages = load_file(path / AVERAGE) if state.average is not None else {}
        except (CorruptArtifactError, SafetensorError, FileNotFoundError) as error:
            say(_step_of(path), f"set a broken checkpoint aside as {_set_aside(path).name}: {error}")
            continue
        for key, digest in identity.items():
            if checkpoint.identity.get(key) != digest:
                raise TrainingError(
                    f"the checkpoint {path} belongs to another {key} than this run; "
                    f"delete the folder {folder.parent} to train from the start"
                )
        _fill(state, path, moments, averages)
        return checkpoint
    return None


def load(path: Path, state: State) -> None:
    """Take over what the good checkpoint at `path` holds. Raises `CorruptArtifactError`."""
    verify(path)
    _fill(state, path, load_file(path / OPTIMIZER), load_file(path / AVERAGE) if state.average is not None else {})


def _fill(state: State, path: Path, moments: dict[str, Tensor], averages: dict[str, Tensor]) -> None:
    load_weights(state.model, path / WEIGHTS)
    state.optimizers.load(moments)
    if state.average is not None:
        state.average.load(averages)


def set_aside_from(folder: Path, step: int) -> None:
    """Take the checkpoints of `step` steps and more out of the way."""
    for path in _finished(folder):
        if _step_of(path) >= step:
            _set_aside(path)


def _set_aside(path: Path) -> Path:
    broken = path.with_name(path.name + ".broken")
    shutil.rmtree(broken, ignore_errors=True)
    return path.rename(broken)


def verify(path: Path) -> Checkpoint:
    """Compare every file of a checkpoint with its sha256. Raises `CorruptArtifactError` naming the first wrong one."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
        checkpoint = Checkpoint(path, manifest["step"], manifest["metrics"], manifest["identity"], manifest.get("memory", {}))
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
    kept = best(folder)
    for path in _finished(folder)[:-keep]:
        if path != kept:
            shutil.rmtree(path)
    for stray in folder.glob("*.partial"):
        shutil.rmtree(stray, ignore_errors=True)


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, the oldest of equal ones; None when there is none at all."""
    measured = [(_metrics(path).get("valid/loss", float("inf")), path) for path in _finished(folder)]
    return min(measured, key=lambda pair: pair[0], default=(0.0, None))[1]


def _metrics(path: Path) -> dict[str, float]:
    try:
        metrics: dict[str, float] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError):
        return {}
    return metrics


def _write_manifest(folder: Path, step: int, identity: dict[str, str], memory: dict[str, Any]) -> None:
    files = {file.name: {"size": file.stat().st_size, "sha256": sha256_file(file)} for file in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"step": step, "metrics": {}, "identity": identity, "memory": memory, "files": files})


def _finished(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step-*") if path.suffix == "" and path.is_dir()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-").partition(".")[0])
