"""Checkpoints: a folder published whole or not at all, every file with its sha256; safetensors and JSON only.

    checkpoints/step-000120/model.safetensors       float32 weights
                            optimizer.safetensors   state of both optimizers
                            average.safetensors     moving average of the weights, where there is one
                            checkpoint.json         step, metrics, digests, sha256 of the files; written last

Of several processes each writes its share of every file, as `model-1-of-2.safetensors`, `model-2-of-2.safetensors`; however
many there are, any number of processes reads them.

A broken one is set aside as `step-000120.broken` and the one before is used. There is no RNG state to store: batches and
dropout are functions of (seed, step).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcore.artifacts import publish, sha256_file, write_json
from gptcore.errors import CorruptArtifactError, DiskFullError, TrainingError, disk_full, disk_full_is_clear
from gptcore.model import GPT
from gptcore.model.folder import fill_weights
from gptcore.training.average import Average
from gptcore.training.optimizers import Optimizers
from gptcore.training.ranks import Rank

MANIFEST = "checkpoint.json"
_MODEL, _OPTIMIZER, _AVERAGE = "model", "optimizer", "average"


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
    files: tuple[str, ...] = ()
    """Names of the safetensors files; known once they were read."""


@dataclass(frozen=True)
class State:
    """What a checkpoint holds, live: it is saved from and restored into these."""

    model: GPT
    optimizers: Optimizers
    average: Average | None = None

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Name of a file -> its tensors."""
        parts = {
            _MODEL: {name: weight.data for name, weight in self.model.named_parameters()},
            _OPTIMIZER: self.optimizers.state(),
        }
        return parts if self.average is None else parts | {_AVERAGE: self.average.state()}

    def fill(self, parts: Mapping[str, dict[str, Tensor]], source: Path) -> None:
        """Take over what `parts()` gave. Raises `CorruptArtifactError`."""
        fill_weights(self.model, parts[_MODEL], source)
        self.optimizers.load(parts[_OPTIMIZER])
        if self.average is not None:
            self.average.load(parts[_AVERAGE])


def save(
    folder: Path, step: int, state: State, identity: dict[str, str], memory: dict[str, Any] | None = None,
    rank: Rank = Rank(),  # noqa: B008  (frozen)
) -> Checkpoint:  # fmt: skip
    """Write the state after `step` steps under `folder`, every rank its share. Older checkpoints stay untouched.

    Raises `DiskFullError`, on all ranks, when there is no room for one of them.
    """
    memory = memory or {}
    final = folder / f"step-{step:06d}"
    partial = folder / f"step-{step:06d}.partial"
    with _together(rank, partial):
        if rank.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with _together(rank, partial):
        ending = "" if rank.world == 1 else f"-{rank.number + 1}-of-{rank.world}"
        for part, tensors in state.parts().items():
            save_file(share_of(tensors, rank), partial / f"{part}{ending}.safetensors")
    with _together(rank, partial):
        if rank.first:
            _write_manifest(partial, step, identity, memory)
            publish(partial, final)
    return Checkpoint(final, step, {}, identity, memory)


@contextmanager
def _together(rank: Rank, partial: Path) -> Iterator[None]:
    """All ranks have done what is inside, or it fails on all of them: nobody waits for one that is gone."""
    error: Exception | None = None
    try:
        with disk_full_is_clear(partial.parent):
            yield
    except Exception as caught:
        error = caught
    worst = rank.largest(0 if error is None else 2 if isinstance(error, DiskFullError) else 1)
    if not worst:
        return
    if rank.first:
        shutil.rmtree(partial, ignore_errors=True)
    raise error or (disk_full(partial.parent) if worst == 2 else RuntimeError("another process could not save its share"))


def share_of(tensors: Mapping[str, Tensor], rank: Rank) -> dict[str, Tensor]:
    """The tensors that this rank writes: in the order of their size each goes to whoever has the fewest bytes so far."""
    loads, share = [0] * rank.world, {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        lightest = loads.index(min(loads))
        loads[lightest] += tensors[name].nbytes
        if lightest == rank.number:
            share[name] = tensors[name]
    return share


def restore(folder: Path, state: State, identity: dict[str, str], say: Callable[[int, str], None]) -> Checkpoint | None:
    """Load the newest good checkpoint, if there is one; `say(step, sentence)` hears of every broken one.

    Raises `TrainingError` when a good checkpoint belongs to other shards, another tokenizer or other answers.
    """
    for path in reversed(_finished(folder)):
        try:
            checkpoint = verify(path)
            parts = {part: _read(checkpoint, part) for part in state.parts()}
        except (CorruptArtifactError, SafetensorError, FileNotFoundError) as error:
            say(_step_of(path), f"set a broken checkpoint aside as {_set_aside(path).name}: {error}")
            continue
        for key, digest in identity.items():
            if checkpoint.identity.get(key) != digest:
                raise TrainingError(
                    f"the checkpoint {path} belongs to another {key} than this run; "
                    f"delete the folder {folder.parent} to train from the start"
                )
        state.fill(parts, path)
        return checkpoint
    return None


def load(path: Path, state: State) -> None:
    """Take over what the good checkpoint at `path` holds. Raises `CorruptArtifactError`."""
    checkpoint = verify(path)
    state.fill({part: _read(checkpoint, part) for part in state.parts()}, path)


def extract_weights(checkpoint: Checkpoint, file: Path) -> None:
    """The weights as one safetensors file: a link where they are one already."""
    names = _files_of(checkpoint, _MODEL)
    if len(names) == 1:
        os.link(checkpoint.folder / names[0], file)
    else:
        save_file(_read(checkpoint, _MODEL), file)


def _read(checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    """The tensors of a part, of however many files."""
    tensors: dict[str, Tensor] = {}
    for name in _files_of(checkpoint, part):
        tensors |= load_file(checkpoint.folder / name)
    return tensors


def _files_of(checkpoint: Checkpoint, part: str) -> list[str]:
    names = [name for name in checkpoint.files if name.split(".")[0].split("-")[0] == part]
    if not names:
        raise CorruptArtifactError(f"{checkpoint.folder / MANIFEST} names no file of the {part}")
    return names


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
        facts = (manifest["step"], manifest["metrics"], manifest["identity"], manifest.get("memory", {}))
        checkpoint = Checkpoint(path, *facts, tuple(files))
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
