"""Model, optimizers and data of one run at some step, in one of its processes."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gptcore.artifacts import digest_of
from gptcore.errors import TrainingError
from gptcore.model import GPT
from gptcore.model.folder import WEIGHTS, load_weights, pick_device, read_settings
from gptcore.model.loss import bits_per_byte, mean_loss, token_losses
from gptcore.tokens import Shards, Tokenizer
from gptcore.tokens.batches import IGNORED, Batch, Batches, HeldOut, RowBatches, StreamBatches, held_out_rows, held_out_stream
from gptcore.training import checkpoint
from gptcore.training.average import Average
from gptcore.training.budget import resolve
from gptcore.training.guard import Guard
from gptcore.training.job import Job, Run
from gptcore.training.journal import Journal
from gptcore.training.optimizers import Optimizers
from gptcore.training.schedule import rate_at
from gptcore.training.step import LossFunction, update


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
        self.resolved = answered or resolve(self.job.training, self.job.model, self.tokenizer.vocabulary, self.batches)
        self.device = pick_device(self.resolved.device)
        torch.set_num_threads(self.resolved.threads)
        torch.set_float32_matmul_precision("high")
        self.step = 0
        self.loss_function: LossFunction = self.plain_loss
        self.guard = Guard(run.skipped, self.job.training.max_spike)
        self.model = GPT(self.job.model, self.tokenizer.vocabulary, device=self.device).train()
        self.model.compute_dtype = torch.bfloat16 if self.resolved.precision == "bfloat16" else torch.float32
        self.reset()

    @property
    def plain_loss(self) -> LossFunction:
        """The loss, not compiled."""
        training = self.job.training
        return partial(mean_loss, smoothing=training.label_smoothing, z=training.z_loss)

    def reset(self) -> None:
        """The model as it is before step 1: drawn from the seed, or read from `init_from`. In place: it may be compiled."""
        self.step = 0
        self.guard.load({})
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
            "resolved.json": digest_of(self.resolved.model_dump(exclude={"memory_mb"})),  # a prediction is no answer
        }

    def train_step(self, step: int) -> tuple[Tensor, Tensor]:
        """Forward, backward, update for the global batch of `step`; returns its mean loss and the gradient's norm."""
        batch = self.batches.at(self.guard.batch_of(step))
        count = float((batch.labels != IGNORED).sum())
        if self.model.config.dropout > 0.0:
            # Dropout is a function of (seed, step, rank), so a resumed run drops the same.
            torch.manual_seed(hash((self.resolved.seed, step, self.rank.number)))
        optimizer = self.job.training.optimizer
        loss, norm = update(
            self.model, self.loss_function, self.optimizers, self._micro_batches(batch), count,
            share=rate_at(step, max(1, self.resolved.steps), optimizer), clip_to=optimizer.clip, world=self.rank.world,
        )  # fmt: skip
        if self.average is not None:
            self.average.update(step)
        return loss, norm

    def _micro_batches(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """This rank's rows of a global batch, in pieces that fit into memory, on the device."""
        mine = slice(self.rank.number, None, self.rank.world)
        return self._pieces(Batch(batch.tokens[mine], batch.labels[mine]))

    def _pieces(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        tokens = torch.from_numpy(batch.tokens).to(self.device, non_blocking=True)
        labels = torch.from_numpy(batch.labels).to(self.device, non_blocking=True)
        size = self.resolved.micro_batch
        return list(zip(torch.split(tokens, size), torch.split(labels, size), strict=True))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss on the fixed part of the validation split; bits per byte where it is plain text."""
        self.model.eval()
        nats, labels_seen = torch.zeros((), dtype=torch.float64, device=self.device), 0
        with self.published_weights():
            for batch in self.held_out.batches:
                for tokens, labels in self._pieces(batch):
                    nats += token_losses(self.model, tokens, labels).sum(dtype=torch.float64)
                labels_seen += int((batch.labels != IGNORED).sum())
        self.model.train()
        values = {"valid/loss": float(nats) / max(1, labels_seen)}
        if self.held_out.text_bytes:
            values["valid/bits_per_byte"] = bits_per_byte(float(nats), self.held_out.text_bytes)
        return values

    def published_weights(self) -> AbstractContextManager[None]:
        """Inside of the block the model has the weights that are measured and published: the averaged ones, if there are."""
        return nullcontext() if self.average is None else self.average.used()

    def save(self) -> checkpoint.Checkpoint:
        """Store the state after the current step and drop old ones."""
        saved = checkpoint.save(self.run.checkpoints, self.step, self.state, self.identity, self.guard.state())
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
