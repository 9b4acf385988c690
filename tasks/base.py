"""base: from shards to a pretrained model. The trainer is a process of its own; this task starts and follows it."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.artifacts import REPORT, Artifact, Numbers, Recipe, write_json
from gptcore.config import ModelConfig, TrainingConfig
from gptcore.cost import COST
from gptcore.evaluation.report import training_curves
from gptcore.room import check_room, size_of
from gptcore.training.attempts import read_attempts, training_cost
from gptcore.training.job import Job, Resolved
from gptcore.training.job import Run as TrainerRun
from gptcore.training.journal import read_journal
from gptcore.training.process import run_training
from gptcore.training.room import training_bytes
from tasks.contents import is_number
from tasks.progress import ProgressBar
from tasks.run import Run, stage_task

if TYPE_CHECKING:
    from gptcore.model.importing import Original  # loads torch

_ROUNDING = {"nodes", "processes", "threads", "micro_batch"}
_NO_RESULT = {"keep", "checkpoint_seconds", "restarts"} | _ROUNDING
"""Settings of training that cannot change its result, but for rounding."""


@stage_task("base", trains=True)
def train_base(
    run: Run, name: str, model: ModelConfig, training: TrainingConfig, shards: Artifact, tokenizer: Artifact
) -> Artifact:
    """A model pretrained from random weights."""
    training = training.suited(model.width)
    settings = {"model": model.model_dump(mode="json"), "training": training_settings(training)}
    recipe = Recipe("base", name, 1, settings, {"shards": shards.digest, "tokenizer": tokenizer.digest})
    job = Job(
        model=model,
        training=training,
        shards=str(shards.path),
        shards_digest=shards.digest,
        tokenizer=str(tokenizer.path / "tokenizer"),
    )
    return train(run, recipe, job, [shards, tokenizer])


@stage_task("base, continued", trains=True)
def continue_base(
    run: Run, name: str, model: ModelConfig, training: TrainingConfig, parent: Artifact, shards: Artifact, tokenizer: Artifact
) -> Artifact:
    """The finished base `parent`, whose shape and tokenizer these are, trained on. `tokenizer` lies in its model folder."""
    training = training.suited(model.width)
    settings = {"model": model.model_dump(mode="json"), "training": training_settings(training)}
    inputs = {parent.stage: parent.digest, shards.stage: shards.digest, "tokenizer": tokenizer.digest}
    job = Job(
        model=model,
        training=training,
        shards=str(shards.path),
        shards_digest=shards.digest,
        tokenizer=str(tokenizer.path / "tokenizer"),
        init_from=str(tokenizer.path),
    )
    return train(run, Recipe("base", name, 1, settings, inputs), job, [parent, shards])


@stage_task("base, imported")
def import_base(run: Run, name: str, original: "Original") -> Artifact:
    """A model of transformers in place of one of ours."""
    settings = {"model": original.model.model_dump(mode="json"), "base": {"import_from": original.called}}
    return run.stage(Recipe("base", name, 1, settings, {"original": original.digest}), original.convert)


def training_settings(training: TrainingConfig) -> dict[str, Any]:
    """What enters the fingerprint."""
    return training.model_dump(mode="json", exclude=_NO_RESULT)


def train(run: Run, recipe: Recipe, job: Job, inputs: list[Artifact]) -> Artifact:
    """Train in the workspace of `recipe`, from wherever an earlier run got, and publish the model with its report."""
    workspace = TrainerRun(run.store.workspace(recipe))

    bar = ProgressBar(recipe.stage, recipe.name, run.watcher.say)

    def follow(line: dict[str, Any]) -> None:
        run.watcher.journal(recipe.stage, line)
        bar.journal(line)
        if run.tracking is not None:
            run.tracking.follow(recipe, workspace.journal)

    def make(folder: Path) -> Numbers:
        if recipe.stage in run.rebuild:
            shutil.rmtree(workspace.folder, ignore_errors=True)
        before = len(read_attempts(workspace.attempts))
        asked = job
        if recipe.stage in run.answers:
            asked = _as_answered(job, run.answers[recipe.stage])
            if workspace.resolved() is None:
                workspace.folder.mkdir(parents=True, exist_ok=True)
                workspace.write(run.answers[recipe.stage])
        if not (workspace.model / "model.safetensors").exists():
            _check_room(run, recipe, asked, workspace)
            run_training(workspace, asked, follow)
        # Moved, not copied: should a kill come before publishing, the last checkpoint gives the same model again.
        workspace.model.rename(folder / "model")
        return _report(workspace, job, folder, before)

    return run.stage(recipe, make, inputs, resumable=True)


def _as_answered(job: Job, answers: Resolved) -> Job:
    """The same job, asking for the processes, threads and micro-batch that were recorded: no fingerprint knows them."""
    recorded = answers.model_dump(include=_ROUNDING)
    return job.model_copy(update={"training": job.training.model_copy(update=recorded)})


def _check_room(run: Run, recipe: Recipe, job: Job, workspace: TrainerRun) -> None:
    """Raise `DiskFullError` where the checkpoints and the model clearly do not fit."""
    vocabulary = json.loads((Path(job.tokenizer) / "tokenizer.json").read_text(encoding="utf-8"))["vocabulary"]
    # MLflow's files are put together in the home; where MLflow is the home's own, they are copied to it as well.
    copies = 2 if run.tracking is not None and run.tracking.connection.is_private else 1
    need = training_bytes(job.model, job.training, vocabulary, copies) - size_of(workspace.folder)
    check_room(run.store.home, need, f"the training of {recipe.stage}", "keep fewer checkpoints (training.keep)")


def _report(workspace: TrainerRun, job: Job, folder: Path, before: int) -> Numbers:
    """Journal, curves, resolved settings, hardware and cost beside the model; returns its numbers.

    `before`: how many trainer processes there were before this run.
    """
    report = folder / REPORT
    report.mkdir()
    shutil.copy(workspace.journal, report / "journal.jsonl")
    shutil.copy(workspace.resolved_file, report / "resolved.json")
    if workspace.profile.is_dir():
        shutil.copytree(workspace.profile, report / "profile")
    training_curves(workspace.journal, report / "curves.png")
    from gptcore.evaluation.samples import write_samples  # loads torch

    write_samples(folder / "model", Path(job.shards), report / "samples.md")
    resolved = workspace.resolved()
    assert resolved is not None
    lines = read_journal(workspace.journal)
    last: dict[str, float] = {}
    for line in lines:
        last.update(line.get("values", {}))
    speeds = [line["values"]["tokens_per_second"] for line in lines if "tokens_per_second" in line.get("values", {})]
    settings = json.loads((folder / "model" / "model.json").read_text(encoding="utf-8"))
    hardware = {key: getattr(resolved, key) for key in ("device", "device_name", "threads", "processes", "nodes", "precision")}
    write_json(report / "hardware.json", hardware)
    cost = training_cost(read_attempts(workspace.attempts), before)
    write_json(report / COST, cost)
    numbers: dict[str, float | int | str] = {
        "parameters": _parameters(folder / "model" / "model.safetensors"),
        "vocabulary": settings["vocabulary"],
        "steps": resolved.steps,
        "tokens": last.get("tokens", 0.0),
        "tokens_per_second": sorted(speeds)[len(speeds) // 2] if speeds else 0.0,
    }
    numbers |= {key.replace("/", "_"): value for key, value in last.items() if key.startswith(("train/", "valid/"))}
    # These become metrics of the training's run in MLflow, where runs are compared; what nothing told is left out.
    return numbers | {f"cost/{key}": value for key, value in cost.items() if is_number(value)}


def _parameters(file: Path) -> int:
    """Number of weights in a safetensors file, from its header alone."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for size in entry["shape"]:
                count *= size
            total += count
    return total
