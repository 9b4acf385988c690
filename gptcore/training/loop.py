"""One visible loop. Everything it calls has a name and can be tested alone."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gptcore.model import save_model
from gptcore.training import checkpoint
from gptcore.training.answers import answer
from gptcore.training.attempts import Recorder
from gptcore.training.budget import Change
from gptcore.training.energy import nvml
from gptcore.training.fit import overfits, progress
from gptcore.training.guard import Guard, Trouble
from gptcore.training.job import Run
from gptcore.training.journal import Journal, cut_back, read_journal
from gptcore.training.profiling import profiled
from gptcore.training.ranks import Rank
from gptcore.training.schedule import rate_at
from gptcore.training.trainer import Trainer

_LINES = 500
"""About as many points as a curve of the journal has."""
_LOOK_EVERY = {"cpu": 1, "cuda": 16}
"""Steps between two looks at the losses; a look waits for a card."""


def train(run: Run, rank: Rank, stop_asked: Callable[[], bool], recorder: Recorder) -> bool:
    """Train to the end, from wherever an earlier process got. Returns whether it is finished (False: stopped and saved)."""
    journal = Journal(run.journal if rank.first else Path("/dev/null"))
    trainer = Trainer(run, rank, journal)
    if rank.first and trainer.device.type == "cuda":
        recorder.measure(nvml(_cards(trainer.job.training.processes)))
    rank.wait()  # all have looked for resolved.json before the first one may write it
    changes = trainer.adapt(int(rank.same(recorder.too_much or 0)) or None)
    recorder.compute(trainer.resolved.micro_batch)
    answer(trainer)
    if not rank.first:
        rank.wait()
    _resume(trainer, changes)
    if rank.first:
        rank.wait()  # whatever it set aside is out of the way of the others
    resolved, aside = trainer.resolved, _Aside()
    clock = _SaveClock(trainer.job.training.checkpoint_seconds)
    meter = _Meter(trainer, max(1, resolved.steps // _LINES), aside)
    recorder.begin(trainer.step, resolved.tokens_per_step, resolved.device_name)
    folder = run.profile if trainer.job.training.profile and rank.first else None
    with profiled(folder, trainer.device.type == "cuda") as profiled_step:
        while trainer.step < resolved.steps and not _has_converged(trainer):
            loss, norm = trainer.train_step(trainer.step)
            trainer.guard.add(trainer.step, loss, norm)
            trainer.step += 1
            recorder.step = trainer.step
            profiled_step()
            if meter.add(loss, norm):
                with aside:
                    recorder.note()
            due = trainer.step % resolved.evaluate_every == 0 or trainer.step == resolved.steps
            stopping = rank.any(stop_asked())
            saving = due or stopping or rank.any(rank.first and clock.due())
            if (saving or trainer.guard.waits >= _LOOK_EVERY[trainer.device.type]) and (trouble := trainer.guard.look()):
                _go_back(trainer, trouble)
                meter.begin()
                continue
            if saving:
                with aside:
                    recorder.note()  # before the save: no attempt goes on from a step that the one before did not tell
                    saved = clock.timed(trainer.save)
                if rank.first and due and not stopping:
                    _measure(trainer, saved)
                meter.skip_time()
            if stopping and trainer.step < resolved.steps:
                journal.event(trainer.step, "stopped", f"stopped and saved at step {trainer.step} of {resolved.steps}")
                return False
    if rank.first:
        _finish(trainer, aside)
    return True


# ------------------------------------------------------------------------------------------- before and after it --


def _cards(count: int) -> list[str]:
    """UUIDs of the first `count` NVIDIA cards that this process sees, one for each of the trainers."""
    seen = min(count, torch.cuda.device_count())
    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(seen)]


def _measure(trainer: Trainer, saved: checkpoint.Checkpoint) -> None:
    """Evaluate the state that was just saved, beside what the training said since the evaluation before."""
    measured = trainer.evaluate()
    points, seen = progress(read_journal(trainer.run.journal))
    if seen is not None:
        measured["valid/gap"] = measured["valid/loss"] - seen
        if warning := overfits([*points, (trainer.step, measured["valid/loss"], seen)]):
            trainer.journal.event(trainer.step, "overfitting", warning)
    trainer.journal.metrics(trainer.step, measured)
    checkpoint.note_metrics(saved, measured)


def _has_converged(trainer: Trainer) -> bool:
    """Whether so many evaluations as `patience` says brought nothing."""
    patience = trainer.job.training.patience
    if patience is None or trainer.step % trainer.resolved.evaluate_every:
        return False
    points = progress(read_journal(trainer.run.journal))[0] if trainer.rank.first else []
    losses = [valid for _, valid, _ in points]
    return trainer.rank.any(len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience]))


def _resume(trainer: Trainer, changes: Sequence[Change]) -> None:
    """Go to the newest good checkpoint, if there is one, cut the journal back to it and note what is not as it was."""
    broken: list[tuple[int, str]] = []
    found = checkpoint.restore(
        trainer.run.checkpoints, trainer.state, trainer.identity, lambda step, text: broken.append((step, text))
    )
    trainer.step = found.step if found is not None else 0
    trainer.recall(found.memory if found is not None else {})
    if trainer.rank.first:
        cut_back(trainer.run.journal, trainer.step)
        trainer.journal.reopen()
    for _, text in broken:
        trainer.journal.event(trainer.step, "broken_checkpoint", text)
    for change in changes:
        trainer.journal.event(trainer.step, change.event, change.text)
    steps = trainer.resolved.steps
    if found is None and trainer.answered:
        trainer.journal.event(0, "restarted", f"starts at step 0 with the answers of resolved.json, {steps} steps", steps=steps)
    if found is not None:
        trainer.journal.event(
            trainer.step, "resumed", f"continues from the checkpoint of step {found.step} of {steps}", steps=steps
        )
        due = found.step % trainer.resolved.evaluate_every == 0 or found.step == steps
        if trainer.rank.first and due and "valid/loss" not in found.metrics:
            _measure(trainer, found)  # the kill came between the save and its evaluation


def _go_back(trainer: Trainer, trouble: Trouble) -> None:
    """To the last checkpoint from before the trouble, or to the start, and past the batches that caused it."""
    if trainer.rank.first:
        trainer.guard.skip(trouble)
        # One that was saved just before it holds the update that may have caused it.
        checkpoint.set_aside_from(trainer.run.checkpoints, trouble.step)
    trainer.rank.wait()
    trainer.guard = Guard(trainer.run.skipped, trainer.job.training.max_spike)
    trainer.reset()
    found = checkpoint.restore(trainer.run.checkpoints, trainer.state, trainer.identity, lambda *_: None)
    if found is not None:
        trainer.step = found.step
        trainer.recall(found.memory)
    skipped = ", ".join(map(str, trainer.guard.skipped))
    if trainer.rank.first:
        cut_back(trainer.run.journal, trainer.step)
        trainer.journal.reopen()
    trainer.rank.wait()
    trainer.journal.event(
        trainer.step, "rolled_back", f"{trouble.what}: back at step {trainer.step}, without the batches {skipped}",
        skipped=trainer.guard.skipped,
    )  # fmt: skip


def _finish(trainer: Trainer, aside: "_Aside") -> None:
    """Write the model folder, whole or not at all."""
    if trainer.job.training.patience is not None and trainer.step < trainer.resolved.steps:
        best = checkpoint.best(trainer.run.checkpoints)
        assert best is not None, "every evaluation has a checkpoint"
        checkpoint.load(best, trainer.state)
        text = f"stopped early after {trainer.step} of {trainer.resolved.steps} steps; {best.name} was the best"
        trainer.journal.event(trainer.step, "stopped_early", text)
    partial = trainer.run.model.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with trainer.published_weights():
        save_model(partial, trainer.model, Path(trainer.job.tokenizer), trainer.job.task)
    shutil.rmtree(trainer.run.model, ignore_errors=True)
    partial.rename(trainer.run.model)
    text = f"finished {trainer.step} steps; saves and records took {aside.share:.2%} of the time"
    trainer.journal.event(trainer.step, "finished", text, seconds_aside=round(aside.seconds, 3))


class _Aside:
    """Seconds of this process that went into saves and records and not into training."""

    def __init__(self) -> None:
        self.seconds, self.began = 0.0, time.perf_counter()

    def __enter__(self) -> None:
        self.entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.entered

    @property
    def share(self) -> float:
        """Of the time since the loop began."""
        return self.seconds / (time.perf_counter() - self.began)


class _SaveClock:
    """A save is due at most every `seconds`, and no more often than 100 times its own cost."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.cost, self.last = seconds, 0.0, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.last > max(self.seconds, 100.0 * self.cost)

    def timed(self, save: Callable[[], checkpoint.Checkpoint]) -> checkpoint.Checkpoint:
        started = time.monotonic()
        saved = save()
        self.last = time.monotonic()
        self.cost = self.last - started
        return saved


class _Meter:
    """Means of loss, gradient norm and speed over a few steps, written to the journal."""

    def __init__(self, trainer: Trainer, every: int, aside: _Aside) -> None:
        self.trainer, self.every, self.aside = trainer, every, aside
        self.begin()

    def begin(self) -> None:
        """Forget the steps that were not written yet."""
        self.steps, self.since, self.pause = 0, time.perf_counter(), 0.0
        self.loss = torch.zeros((), device=self.trainer.device)
        self.norm = torch.zeros((), device=self.trainer.device)

    def skip_time(self) -> None:
        """What passed since the last `add` was no training."""
        self.pause += time.perf_counter() - self.seen

    def add(self, loss: Tensor, norm: Tensor) -> bool:
        """Count one step; whether it was written."""
        self.steps, self.loss, self.norm = self.steps + 1, self.loss + loss, self.norm + norm
        self.seen = time.perf_counter()
        trainer = self.trainer
        if trainer.step % self.every and trainer.step != trainer.resolved.steps:
            return False
        seconds = max(1e-9, self.seen - self.since - self.pause)
        values = {
            "train/loss": float(self.loss) / self.steps,
            "gradient_norm": float(self.norm) / self.steps,
            "rate": rate_at(trainer.step - 1, trainer.resolved.steps, trainer.job.training.optimizer),
            "tokens_per_second": self.steps * trainer.resolved.tokens_per_step / seconds,
            "tokens": trainer.step * trainer.resolved.tokens_per_step,
        }
        if trainer.scale is not None:
            values["loss_scale"] = trainer.scale.value
        with self.aside:
            trainer.journal.metrics(trainer.step, values)
        self.begin()
        return True
