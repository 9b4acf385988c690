"""Model, optimizers and data of one run at some step, in one of its processes."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcore.artifacts import digest_of
from gptcore.errors import TrainingError
from gptcore.model import GPT
from gptcore.model.folder import WEIGHTS, load_weights, pick_device, read_settings
from gptcore.model.inputs import Inputs, inputs
from gptcore.model.loss import bits_per_byte, mean_loss, token_losses
from gptcore.tokens import Shards, Tokenizer
from gptcore.tokens.batches import Batches, HeldOut, RowBatches, StreamBatches, held_out_rows, held_out_stream
from gptcore.tokens.objectives import Batch, Symbols, objective
from gptcore.training import checkpoint
from gptcore.training.average import Average
from gptcore.training.budget import Change, adapt, dtype_of, resolve
from gptcore.training.footprint import Footprint
from gptcore.training.guard import Guard
from gptcore.training.job import Job, Run
from gptcore.training.journal import Journal
from gptcore.training.optimizers import Optimizers
from gptcore.training.ranks import Rank
from gptcore.training.scaling import LossScale
from gptcore.training.schedule import rate_at
from gptcore.training.step import LossFunction, update


class Trainer:
    """Model, optimizers, data and answers of one run, at some step."""

    def __init__(self, run: Run, rank: Rank, journal: Journal) -> None:
        self.run, self.rank, self.journal = run, rank, journal
        self.job = run.job()
        self.tokenizer = Tokenizer.load(Path(self.job.tokenizer))
        self.batches, self.held_out = _open_data(self.job, self.tokenizer)
        answered = run.resolved()
        self.answered = answered is not None
        self.resolved = answered or resolve(self.job, self.tokenizer.vocabulary, self.batches)
        self.device = pick_device(self.resolved.device)
        torch.set_num_threads(self.resolved.threads)
        torch.set_float32_matmul_precision("high")
        self.step = 0
        self.loss_function: LossFunction = self.plain_loss
        self.guard = Guard(run.skipped, self.job.training.max_spike)
        self.scale = LossScale() if self.resolved.precision == "float16" else None
        self.model = GPT(self.job.model, self.tokenizer.vocabulary, device=self.device).train()
        self.model.compute_dtype = dtype_of(self.resolved.precision)
        self.reset()

    def adapt(self, too_much: int | None) -> list[Change]:
        """Bring the answers of an earlier trainer up to what is asked for and fits into memory; returns what changed.

        `too_much`: the micro-batch with which memory ran out. Raises `TrainingError` when there is no smaller one.
        """
        before = self.resolved.micro_batch
        self.resolved, changes = adapt(self.resolved, self.job.training, too_much)
        if self.resolved.micro_batch != before:
            predicted = self.footprint.at(self.resolved.micro_batch).total >> 20
            self.resolved = self.resolved.model_copy(update={"memory_mb": predicted})
        torch.set_num_threads(self.resolved.threads)
        if changes and self.answered and self.rank.first:
            self.run.write(self.resolved)
        return changes

    @property
    def footprint(self) -> Footprint:
        """The memory of this process, predicted."""
        return Footprint(
            self.job.model, self.tokenizer.vocabulary, self.job.training, self.batches.longest, self.device.type,
            self.model.compute_dtype,
        )  # fmt: skip

    @property
    def plain_loss(self) -> LossFunction:
        """The loss, not compiled."""
        training = self.job.training
        return partial(mean_loss, smoothing=training.label_smoothing, z=training.z_loss)

    def reset(self) -> None:
        """The model as it is before step 1: drawn from the seed, or read from `init_from`. In place: it may be compiled."""
        self.step = 0
        self.recall({})
        job = self.job
        if job.init_from is None:
            self.model.initialise(self.resolved.seed)
        else:
            if read_settings(Path(job.init_from))["tokenizer"] != self.tokenizer.digest:
                raise TrainingError(f"the model {job.init_from} speaks another tokenizer than {job.tokenizer}")
            load_weights(self.model, Path(job.init_from) / WEIGHTS)
        self.optimizers = Optimizers(self.model, job.training.optimizer)
        self.average = Average(self.model, job.training.ema) if job.training.ema else None

    @property
    def state(self) -> checkpoint.State:
        """What a checkpoint holds."""
        return checkpoint.State(self.model, self.optimizers, self.average)

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint must belong to."""
        return {
            "shards": self.job.shards_digest,
            "tokenizer": self.tokenizer.digest,
            "resolved.json": digest_of(self.resolved.plan),
        }

    @property
    def memory(self) -> dict[str, Any]:
        """What else a checkpoint holds; JSON."""
        return self.guard.state() | ({"loss_scale": self.scale.state()} if self.scale is not None else {})

    def recall(self, memory: dict[str, Any]) -> None:
        """Take over what `memory` was; {} for the start."""
        self.guard.load(memory)
        if self.scale is not None:
            self.scale.load(memory.get("loss_scale", {}))

    def train_step(self, step: int) -> tuple[Tensor, Tensor]:
        """Forward, backward, update for the global batch of `step`; returns its mean loss and the gradient's norm."""
        batch = self.batches.at(self.guard.batch_of(step))
        count = float(batch.learned)
        if self.model.config.dropout > 0.0:
            # Dropout is a function of (seed, step, rank), so a resumed run drops the same.
            torch.manual_seed(hash((self.resolved.seed, step, self.rank.number)))
        optimizer, scale = self.job.training.optimizer, None if self.scale is None else self.scale.value
        loss, norm = update(
            self.model, self.loss_function, self.optimizers, self._micro_batches(batch), count, scale=self.scale,
            share=rate_at(step, max(1, self.resolved.steps), optimizer), clip_to=optimizer.clip, world=self.rank.world,
        )  # fmt: skip
        if self.scale is not None and scale is not None and self.scale.value < scale:
            text = (
                f"the gradient of step {step + 1} overflowed and is left out; the loss scale is halved to {self.scale.value:g}"
            )
            self.journal.event(step + 1, "overflow", text)
        if self.average is not None:
            self.average.update(step)
        return loss, norm

    def _micro_batches(self, batch: Batch) -> Iterator[Inputs]:
        """This rank's rows of a global batch, in pieces that fit into memory, on the device."""
        rows, size = range(self.rank.number, len(batch.tokens), self.rank.world), self.resolved.micro_batch
        for part in (rows[start : start + size] for start in range(0, len(rows), size)):
            yield inputs(batch, self.device, slice(part.start, part.stop, part.step))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss on the fixed part of the validation split; bits per byte where it is plain text. Of several sources each too."""
        self.model.eval()
        with self.published_weights():
            nats = {source: self._nats(part) for source, part in self.held_out.items()}
        self.model.train()
        parts = self.held_out.values()
        values = _losses("", sum(nats.values()), sum(part.labels for part in parts), sum(part.text_bytes for part in parts))
        for source, part in self.held_out.items() if len(parts) > 1 else ():
            values |= _losses(f"/{source}", nats[source], part.labels, part.text_bytes)
        return values

    def _nats(self, part: HeldOut) -> float:
        """Sum of the loss over all labels."""
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in part.batches:
            nats += token_losses(self.model, *inputs(batch, self.device)).sum(dtype=torch.float64)
        return float(nats)

    def published_weights(self) -> AbstractContextManager[None]:
        """Inside of the block the model has the weights that are measured and published: the averaged ones, if there are."""
        return nullcontext() if self.average is None else self.average.used()

    def save(self) -> checkpoint.Checkpoint:
        """Store the state after the current step and drop old ones; every rank has its part in it."""
        saved = checkpoint.save(self.run.checkpoints, self.step, self.state, self.identity, self.memory, self.rank)
        self.journal.event(self.step, "checkpoint", f"saved step {self.step}")
        if self.rank.first:
            checkpoint.prune(self.run.checkpoints, self.job.training.keep)
        return saved


def _losses(of: str, nats: float, labels: int, text_bytes: int) -> dict[str, float]:
    """Nats per label and, where the labels are `text_bytes` of plain text, bits per byte."""
    values = {f"valid/loss{of}": nats / max(1, labels)}
    if text_bytes:
        values[f"valid/bits_per_byte{of}"] = bits_per_byte(nats, text_bytes)
    return values


def _open_data(job: Job, tokenizer: Tokenizer) -> tuple[Batches, Mapping[str, HeldOut]]:
    """The training batches and the fixed validation part, by source, of the job's shards."""
    training, context, shards = job.training, job.model.context, Shards.open(Path(job.shards))
    if shards.tokenizer != tokenizer.digest:
        raise TrainingError(f"the shards {job.shards} were made with another tokenizer than {job.tokenizer}")
    rows = max(1, min(training.batch, 8192 // context))
    symbols = Symbols.of(tokenizer)
    learned = objective(job.model, training.masking, symbols, training.seed)
    measured = objective(job.model, training.masking, symbols, 0)  # what is hidden then is the same for every seed
    train, valid = shards.split("train"), shards.split("valid")
    if shards.masked:
        batches: Batches = RowBatches(train, learned, training.batch, training.seed)
        return batches, {"": held_out_rows(valid, measured, rows, training.evaluation_tokens)}
    batches = StreamBatches(train, learned, training.batch, training.seed, training.mixture)
    return batches, held_out_stream(valid, measured, rows, training.evaluation_tokens)
