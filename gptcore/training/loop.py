"""One visible loop. Everything it calls has a name and can be tested alone."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gptcore.artifacts import digest_of
from gptcore.errors import TrainingError
from gptcore.model import GPT, save_model
from gptcore.model.folder import WEIGHTS, load_weights, pick_device, read_settings
from gptcore.model.loss import bits_per_byte, mean_loss, token_losses
from gptcore.tokens import Shards, Tokenizer
from gptcore.tokens.batches import (
    IGNORED,
    Batch,
    Batches,
    HeldOut,
    RowBatches,
    StreamBatches,
    held_out_rows,
    held_out_stream,
)
from gptcore.training import checkpoint
from gptcore.training.attempts import Recorder
from gptcore.training.budget import decide_compile, pays, resolve, seconds_of, steps_in
from gptcore.training.energy import nvml
from gptcore.training.job import Job, Resolved, Run
from gptcore.training.journal import Journal, cut_back
from gptcore.training.optimizers import Optimizers, clip, named_gradients
from gptcore.training.schedule import rate_at

_PROBE_STEPS = 8
_PROBE_FROM = 200
"""A run of at least this many steps is worth a probe to decide whether to compile."""
_LINES = 500
"""About as many points as a curve of the journal has."""

LossFunction = Callable[[GPT, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Rank:
    """This process among the trainers."""

    number: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Only the first one writes."""
        return self.number == 0

    def wait(self) -> None:
        """Return when all of them are here."""
        if self.world > 1:
            dist.barrier()


class Trainer:
    """Model, optimizers, data and answers of one run, at some step."""

    def __init__(self, run: Run, rank: Rank, journal: Journal) -> None:
        self.run, self.rank, self.journal = run, rank, journal
        self.job = run.job()
        self.tokenizer = Tokenizer.load(Path(self.job.tokenizer))
        self.batches, self.held_out = _open_data(self.job, self.tokenizer)
        answered = run.resolved()
        self.answered = answered is not None
        self.resolved = answered or resolve(self.job.training, self.job.model.context, self.batches)
        self.device = pick_device(self.resolved.device)
        torch.set_num_threads(self.resolved.threads)
        torch.set_float32_matmul_precision("high")
        self.step = 0
        self.loss_function: LossFunction = mean_loss
        self.model = GPT(self.job.model, self.tokenizer.vocabulary, device=self.device).train()
        self.model.compute_dtype = torch.bfloat16 if self.resolved.precision == "bfloat16" else torch.float32
        self.reset()

    def reset(self) -> None:
        """The model as it is before step 1: drawn from the seed, or read from `init_from`. In place: it may be compiled."""
        job = self.job
        if job.init_from is None:
            self.model.initialise(self.resolved.seed)
        else:
            if read_settings(Path(job.init_from))["tokenizer"] != self.tokenizer.digest:
                raise TrainingError(f"the model {job.init_from} speaks another tokenizer than {job.tokenizer}")
            load_weights(self.model, Path(job.init_from) / WEIGHTS)
        self.optimizers = Optimizers(self.model, job.training.optimizer)

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint must belong to."""
        return {
            "shards": self.job.shards_digest,
            "tokenizer": self.tokenizer.digest,
            "resolved.json": digest_of(self.resolved.model_dump()),
        }

    def train_step(self, step: int) -> tuple[Tensor, Tensor]:
        """Forward, backward, update for the global batch of `step`; returns its mean loss and the gradient's norm."""
        batch = self.batches.at(step)
        count = float((batch.labels != IGNORED).sum())
        loss = torch.zeros((), device=self.device)
        if self.model.config.dropout > 0.0:
            # Dropout is a function of (seed, step, rank), so a resumed run drops the same.
            torch.manual_seed(hash((self.resolved.seed, step, self.rank.number)))
        for tokens, labels in self._micro_batches(batch):
            part = self.loss_function(self.model, tokens, labels, count)
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        if self.rank.world > 1:
            for tensor in (*named_gradients(self.model), loss):
                dist.all_reduce(tensor)
        norm = clip(self.model, self.job.training.optimizer.clip)
        self.optimizers.step(rate_at(step, max(1, self.resolved.steps), self.job.training.optimizer))
        return loss, norm

    def _micro_batches(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """This rank's rows of a global batch, in pieces that fit into memory, on the device."""
        tokens = torch.from_numpy(batch.tokens[self.rank.number :: self.rank.world]).to(self.device, non_blocking=True)
        labels = torch.from_numpy(batch.labels[self.rank.number :: self.rank.world]).to(self.device, non_blocking=True)
        size = self.resolved.micro_batch
        return list(zip(torch.split(tokens, size), torch.split(labels, size), strict=True))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss on the fixed part of the validation split; bits per byte where it is plain text."""
        self.model.eval()
        nats, labels_seen = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in self.held_out.batches:
            tokens, labels = (torch.from_numpy(part).to(self.device) for part in (batch.tokens, batch.labels))
            nats += token_losses(self.model, tokens, labels).sum(dtype=torch.float64)
            labels_seen += int((batch.labels != IGNORED).sum())
        self.model.train()
        values = {"valid/loss": float(nats) / max(1, labels_seen)}
        if self.held_out.text_bytes:
            values["valid/bits_per_byte"] = bits_per_byte(float(nats), self.held_out.text_bytes)
        return values

    def save(self) -> checkpoint.Checkpoint:
        """Store the state after the current step and drop old ones."""
        saved = checkpoint.save(self.run.checkpoints, self.step, self.model, self.optimizers, self.identity)
        self.journal.event(self.step, "checkpoint", f"saved step {self.step}")
        checkpoint.prune(self.run.checkpoints, self.job.training.keep)
        return saved

    def any_rank(self, here: bool) -> bool:
        """Whether it holds on any rank, so that all of them stop at the same step."""
        if self.rank.world == 1:
            return here
        flag = torch.tensor(int(here), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


def train(run: Run, rank: Rank, stop_asked: Callable[[], bool], recorder: Recorder) -> bool:
    """Train to the end, from wherever an earlier process got. Returns whether it is finished (False: stopped and saved)."""
    journal = Journal(run.journal if rank.first else Path("/dev/null"))
    trainer = Trainer(run, rank, journal)
    if rank.first and trainer.device.type == "cuda":
        recorder.measure(nvml(_cards(rank.world)))
    rank.wait()  # all have looked for resolved.json before the first one may write it
    _answer(trainer)
    if not rank.first:
        rank.wait()
    _resume(trainer)
    if rank.first:
        rank.wait()  # whatever it set aside is out of the way of the others
    resolved, clock = trainer.resolved, _SaveClock(trainer.job.training.checkpoint_seconds)
    meter = _Meter(trainer, max(1, resolved.steps // _LINES))
    recorder.begin(trainer.step, resolved.tokens_per_step, resolved.device_name)
    while trainer.step < resolved.steps:
        loss, norm = trainer.train_step(trainer.step)
        trainer.step += 1
        recorder.step = trainer.step
        if meter.add(loss, norm):
            recorder.note()
        due = trainer.step % resolved.evaluate_every == 0 or trainer.step == resolved.steps
        stopping = trainer.any_rank(stop_asked())
        if rank.first and (due or stopping or clock.due()):
            recorder.note()  # before the save: no attempt goes on from a step that the one before did not tell
            saved = clock.timed(trainer.save)
            if due and not stopping:
                _measure(trainer, saved)
            meter.skip_time()
        if stopping and trainer.step < resolved.steps:
            journal.event(trainer.step, "stopped", f"stopped and saved at step {trainer.step} of {resolved.steps}")
            return False
    if rank.first:
        _finish(trainer)
    return True


# ------------------------------------------------------------------------------------------- before and after it --


def _open_data(job: Job, tokenizer: Tokenizer) -> tuple[Batches, HeldOut]:
    """The training batches and the fixed validation part of the job's shards."""
    training, context, shards = job.training, job.model.context, Shards.open(Path(job.shards))
    if shards.tokenizer != tokenizer.digest:
        raise TrainingError(f"the shards {job.shards} were made with another tokenizer than {job.tokenizer}")
    rows = max(1, min(training.batch, 8192 // context))
    if shards.masked:
        batches: Batches = RowBatches(shards.split("train"), training.batch, tokenizer.pad_id, training.seed)
        held_out = held_out_rows(shards.split("valid"), rows, training.evaluation_tokens, tokenizer.pad_id)
    else:
        batches = StreamBatches(shards.split("train"), context, training.batch, training.seed)
        held_out = held_out_stream(
            shards.split("valid"), context, rows, training.evaluation_tokens, tokenizer.control_ids
        )  # fmt: skip
    return batches, held_out


def _cards(count: int) -> list[str]:
    """UUIDs of the first `count` NVIDIA cards that this process sees, one for each of the trainers."""
    seen = min(count, torch.cuda.device_count())
    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(seen)]


def _answer(trainer: Trainer) -> None:
    """Complete resolved.json where it is not yet written: compile or not, and how many steps the minutes are worth."""
    if trainer.answered:
        if trainer.resolved.compiled:
            trainer.loss_function = _compiled(trainer)
        return
    training, started = trainer.job.training, time.perf_counter()
    step_seconds = _choose_compile(trainer)
    steps, evaluations = trainer.resolved.steps, training.evaluations
    if training.minutes is not None:
        assert step_seconds is not None
        evaluation_seconds = seconds_of(lambda _: trainer.evaluate(), 1)
        left = training.minutes * 60 - (time.perf_counter() - started)
        steps, evaluations = steps_in(left, step_seconds, evaluation_seconds, training.evaluations)
        steps = int(_agreed(steps, trainer))
    trainer.resolved = _with(
        trainer.resolved,
        steps=steps,
        tokens_per_second=step_seconds and trainer.resolved.tokens_per_step / step_seconds,
        evaluate_every=max(1, -(-steps // evaluations)),
    )
    trainer.reset()  # the probe's steps never happened
    if trainer.rank.first:
        trainer.run.write(trainer.resolved)
        trainer.journal.event(0, "resolved", _describe(trainer), **trainer.resolved.model_dump())


def _choose_compile(trainer: Trainer) -> float | None:
    """Decide between eager and compiled, by trying both where a run is long; seconds of a step, if they were measured."""
    training, resolved, eager = trainer.job.training, trainer.resolved, None
    seconds = None if training.minutes is None else training.minutes * 60
    if seconds is not None or (training.compile == "auto" and resolved.steps >= _PROBE_FROM):
        eager = _agreed(seconds_of(trainer.train_step, _PROBE_STEPS), trainer)
        seconds = seconds or eager * resolved.steps
    compiled, reason = decide_compile(training.compile, resolved.device, seconds)
    step_seconds = eager
    if compiled:
        try:
            trainer.loss_function = _compiled(trainer)
            trainer.train_step(0)
            if eager is not None:
                step_seconds = _agreed(seconds_of(trainer.train_step, _PROBE_STEPS), trainer)
                if training.compile == "auto":
                    compiled, reason = pays(eager, step_seconds)
        except Exception as error:
            compiled, reason = False, f"eager, because torch.compile failed: {str(error).strip().splitlines()[0][:200]}"
        if not compiled:
            trainer.loss_function, step_seconds = mean_loss, eager
    trainer.resolved = _with(resolved, compiled=compiled, compile_reason=reason)
    return step_seconds


def _compiled(trainer: Trainer) -> LossFunction:
    """The loss, compiled when it is first called."""
    function: LossFunction = torch.compile(mean_loss, dynamic=isinstance(trainer.batches, RowBatches))
    return function


def _with(resolved: Resolved, **answers: object) -> Resolved:
    return resolved.model_copy(update=answers)


def _agreed(value: float, trainer: Trainer) -> float:
    """The first rank's number, on all ranks: they must decide alike."""
    if trainer.rank.world == 1:
        return value
    agreed = torch.tensor(value, device=trainer.device, dtype=torch.float64)
    dist.broadcast(agreed, 0)
    return float(agreed)


def _measure(trainer: Trainer, saved: checkpoint.Checkpoint) -> None:
    """Evaluate the state that was just saved."""
    measured = trainer.evaluate()
    trainer.journal.metrics(trainer.step, measured)
    checkpoint.note_metrics(saved, measured)


def _resume(trainer: Trainer) -> None:
    """Go to the newest good checkpoint, if there is one, and cut the journal back to it."""
    broken: list[tuple[int, str]] = []
    found = checkpoint.restore(
        trainer.run.checkpoints, trainer.model, trainer.optimizers, trainer.identity,
        lambda step, text: broken.append((step, text)),
    )  # fmt: skip
    trainer.step = found.step if found is not None else 0
    if trainer.rank.first:
        cut_back(trainer.run.journal, trainer.step)
        trainer.journal.reopen()
    for _, text in broken:
        trainer.journal.event(trainer.step, "broken_checkpoint", text)
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


def _finish(trainer: Trainer) -> None:
    """Write the model folder, whole or not at all."""
    partial = trainer.run.model.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(partial, trainer.model, Path(trainer.job.tokenizer), trainer.job.task)
    shutil.rmtree(trainer.run.model, ignore_errors=True)
    partial.rename(trainer.run.model)
    trainer.journal.event(trainer.step, "finished", f"finished {trainer.step} steps")


def _describe(trainer: Trainer) -> str:
    resolved = trainer.resolved
    weights = sum(weight.numel() for weight in trainer.model.parameters())
    return (
        f"{weights / 1e6:.1f} M parameters, {resolved.steps} steps of {resolved.tokens_per_step:.0f} tokens, "
        f"{resolved.precision} on {resolved.device_name}, {resolved.threads} thread(s); {resolved.compile_reason}"
    )


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

    def __init__(self, trainer: Trainer, every: int) -> None:
        self.trainer, self.every = trainer, every
        self._start()

    def _start(self) -> None:
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
        trainer.journal.metrics(trainer.step, values)
        self._start()
        return True
