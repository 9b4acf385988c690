"""`gptcore reproduce`: is a model what its record says? Build it again from that record alone, in a scratch store, and compare.

record ─▶ what changed since? ─┬─▶ a source, a damaged file: stop
                               └─▶ build again ─▶ digest by digest, number by number ─▶ one sentence
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flows.changes import Change, recorded_answers, what_changed
from flows.lookup import Registry, find_artifact
from flows.operations.server import set_default_environment
from flows.rounds import chain_of
from gptcore.artifacts import Artifact, Store, read_manifest
from gptcore.errors import ArtifactError, CorruptArtifactError
from gptcore.record import BASE, START, Record, read_record
from gptcore.room import check_room
from gptcore.scratch import scratch_folder
from tasks.records import Records
from tasks.run import Run, Watcher

_WEIGHTS = "model/model.safetensors"
_CHECKPOINTS = 8
"""Room for the checkpoints of a training, in times its weights: two and one being written, each with its optimizer."""


@dataclass(frozen=True)
class StageRow:
    """A stage as it was recorded and as it came out again."""

    stage: str
    recorded: str
    """Digest."""
    rebuilt: str
    differs: str = ""
    """What differs first; empty when the digests are equal."""


@dataclass(frozen=True)
class MetricRow:
    """A number of the evaluation as it was recorded and as it came out again, with its 95 % interval and its baseline."""

    metric: str
    recorded: float
    rebuilt: float
    low: float
    high: float
    baseline: str | None = None
    baseline_value: float | None = None


@dataclass(frozen=True)
class Reproduction:
    """What came of it."""

    what: str
    record: Record
    changes: list[Change]
    stages: list[StageRow] = field(default_factory=list)
    """Empty when nothing was rebuilt."""
    metrics: list[MetricRow] = field(default_factory=list)
    seconds: float = 0.0
    scratch: Path | None = None
    """Home of what was rebuilt, when it is kept."""

    @property
    def stopped(self) -> bool:
        """Whether something makes an equal result impossible."""
        return any(change.weight == "stops" for change in self.changes)

    @property
    def equal(self) -> bool:
        """Whether every stage came out with the recorded digest, and nothing that was published has changed since."""
        return bool(self.stages) and not self.stopped and all(row.recorded == row.rebuilt for row in self.stages)

    @property
    def verdict(self) -> str:
        """All of it in one sentence."""
        because = "; ".join(change.what for change in self.changes if change.weight != "note")
        if not self.stages:
            if self.stopped:
                return f"not rebuilt: {because} (--anyway rebuilds regardless)"
            return (
                f"not rebuilt; equal bits are not to be expected: {because}" if because else "not rebuilt; nothing has changed"
            )
        different = [row for row in self.stages if row.recorded != row.rebuilt]
        if not different and self.stopped:
            return f"the record gives the recorded digests, bit by bit, but {because}"
        if not different:
            told = f"bit-equal: {_stages(len(self.stages))} of {self.what} came out as recorded{self._from}"
            return f"{told}, although {because}" if because else told
        first = f"the first stage that differs is {different[0].stage} ({different[0].differs})"
        if self.metrics and all(row.low <= row.recorded <= row.high for row in self.metrics):
            told = f"same numbers within the interval, not the same bits: {first}"
        else:
            told = f"differs: {first}"
        return f"{told}; not expected to be equal because {because}" if because else told

    @property
    def went_on_from(self) -> dict[str, str]:
        """What was there already and is not made again, name -> digest."""
        return {name: str(read_manifest(folder)["digest"]) for name, folder in self.record.given.items()}

    @property
    def _from(self) -> str:
        went = self.went_on_from
        if START in went:
            return f", from the start {went[START][:12]} on"
        return f", from the base {went[BASE][:12]} and its text on" if went else ""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        target = self.record.manifests[self.record.target]
        return {
            "what": self.what, "stage": self.record.target, "name": self.record.name, "digest": target["digest"],
            "built_at": target["built_at"], "went_on_from": self.went_on_from, "equal": self.equal, "verdict": self.verdict,
            "changed": [asdict(change) for change in self.changes], "stages": [asdict(row) for row in self.stages],
            "metrics": [asdict(row) for row in self.metrics], "seconds": round(self.seconds, 1),
            "scratch": str(self.scratch) if self.scratch else None,
        }  # fmt: skip


def reproduce(
    what: str, store: Store, registry: Registry, watcher: Watcher, *,
    anyway: bool = False, check: bool = False, keep: bool = False,
) -> Reproduction:  # fmt: skip
    """Build `what` again from its record and compare. `check`: only tell what changed; `anyway`: build although it did.

    Neither store nor registry are written to. Raises `ArtifactError` when a part of the record is missing.
    """
    set_default_environment()
    version = _version(what, store.home, registry)
    record = find_record(what, version, store.home, registry)
    watcher.say(f"{what} is {record.target} of {record.name}, {record.manifests[record.target]['digest'][:12]}")
    config = record.config()
    answers, missing = recorded_answers(record)
    changes = [*_served(version, registry), *what_changed(record, config, store), *missing]
    found = Reproduction(what, record, changes)
    if check or (found.stopped and not anyway):
        return found
    for change in changes:  # before the long work: a person may decide that it is not worth it
        watcher.say(f"  changed since: {change.what}")
    _check_room(record, store.home)
    started = time.monotonic()
    with scratch_folder(store.home, "reproduce", keep=keep) as scratch:
        run = Run(Store(scratch), watcher, answers=answers)
        chain_of(record, run, config).noun(record.last)
        stages = [_compare(record, artifact) for artifact in run.artifacts.values()]
        metrics = _numbers(record, run.artifacts)
    return Reproduction(what, record, changes, stages, metrics, time.monotonic() - started, scratch if keep else None)


def _stages(count: int) -> str:
    return "the one stage" if count == 1 else f"all {count} stages"


# ------------------------------------------------------------------------------------------------------- record --


def _version(what: str, home: Path, registry: Registry) -> Any:
    """The registered version that a person named; None for an artifact's path and the name of a stage."""
    return None if Path(what).is_dir() or (home / "store" / what).is_dir() else registry().find(what)


def find_record(what: str, version: Any, home: Path, registry: Registry) -> Record:
    """The record of a registered version, or of an artifact or a stage's newest one, with its evaluation where there is one."""
    records = Records(home)
    folder = find_artifact(what, home, registry) if version is None else records.find(version.digest)
    if folder is None:
        raise ArtifactError(
            f"the record of {what} is neither in the store of {home} nor in MLflow: it cannot be rebuilt; "
            "train it anew with gptcore run"
        )
    record = read_record(folder, records.find)
    evaluated = record.evaluated_by()
    if evaluated is not None and evaluated[0] not in record.manifests:
        evaluation = records.find_evaluation(*evaluated)
        record = record if evaluation is None else record.with_evaluation(evaluation)
    return record


def _served(version: Any, registry: Registry) -> list[Change]:
    """Whether MLflow hands out other files for a registered version than those that were registered."""
    if version is None:
        return []
    try:
        registry().check_served(version)
    except CorruptArtifactError as error:
        return [Change(str(error).partition(";")[0], "stops")]
    return []


# ------------------------------------------------------------------------------------------------------ compare --


def _check_room(record: Record, home: Path) -> None:
    """Refuse before any work what the disk cannot hold."""
    needed = 0
    for manifest in record.manifests.values():
        sizes = {name: int(entry["size"]) for name, entry in manifest["files"].items()}
        needed += sum(sizes.values()) + _CHECKPOINTS * sizes.get(_WEIGHTS, 0)
    check_room(home, needed, "rebuilding")


def _compare(record: Record, rebuilt: Artifact) -> StageRow:
    manifest = record.manifests[rebuilt.stage]
    differs = "" if manifest["digest"] == rebuilt.digest else _first_difference(record, rebuilt)
    return StageRow(rebuilt.stage, manifest["digest"], rebuilt.digest, differs)


def _first_difference(record: Record, rebuilt: Artifact) -> str:
    recorded, now = record.manifests[rebuilt.stage]["files"], rebuilt.manifest()["files"]
    for name in sorted(recorded.keys() | now.keys()):
        if name.startswith("report/"):
            continue
        if name not in now or name not in recorded:
            return f"{name} is {'new' if name in now else 'missing'}"
        if recorded[name]["sha256"] != now[name]["sha256"]:
            weights = (
                _largest_difference(record.folders[rebuilt.stage] / name, rebuilt.path / name) if name == _WEIGHTS else None
            )
            return name if weights is None else f"{name}, weights by up to {weights:.2g}"
    return "its list of files"


def _largest_difference(recorded: Path, rebuilt: Path) -> float | None:
    """Largest absolute difference of two files of weights; None when they cannot be compared."""
    import numpy
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        ours, theirs = load_file(recorded), load_file(rebuilt)
    except (OSError, SafetensorError):
        return None
    if {name: weights.shape for name, weights in ours.items()} != {name: weights.shape for name, weights in theirs.items()}:
        return None
    return max(float(numpy.abs(ours[name] - theirs[name]).max()) for name in ours)


def _numbers(record: Record, rebuilt: Mapping[str, Artifact]) -> list[MetricRow]:
    """Every measured number with its baselines, beside the recorded one."""
    from gptcore.evaluation import read_results

    rows = []
    for stage, artifact in rebuilt.items():
        if stage.startswith("evaluation-"):
            recorded = record.manifests[stage]["numbers"]
            for metric, entry in read_results(artifact.path)["metrics"].items():
                if metric not in recorded:
                    continue
                ours = (metric, float(recorded[metric]), entry["value"], entry["low"], entry["high"])
                beside = entry["baselines"].items() or [(None, {"value": None})]
                rows += [MetricRow(*ours, name, other["value"]) for name, other in beside]
    return rows
