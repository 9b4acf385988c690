"""What a trainer is asked to do, and what was decided before its first step. Plain files in its run folder; no torch.

<run>/job.json        the question: settings, shards, tokenizer, what to start from
<run>/resolved.json   the answers that the settings left open; read again by every resume. Written anew, with a word in the
                      journal, where memory ran out or the job asks for another number of processes
<run>/journal.jsonl   metrics and events
<run>/attempts.jsonl  every trainer process: seconds, steps, energy, how it ended
<run>/checkpoints/    step-000120/ …
<run>/skipped.json    batches that the guard passes over
<run>/profile/        trace and table, where they were asked for
<run>/model/          the finished model folder
<run>/trainer.json    pid, start time and host of the trainer that holds trainer.lock
<run>/error.json      the sentence that a trainer ended with, for those on another node
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from gptcore.artifacts import write_json
from gptcore.config import ModelConfig, TrainingConfig

Precision = Literal["float32", "bfloat16", "float16"]


class Record(BaseModel):
    """A frozen plain record that is one JSON file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Job(Record):
    """The question. Paths are absolute; digests say what must be behind them."""

    model: ModelConfig
    training: TrainingConfig
    shards: str
    """Folder of the shards."""
    shards_digest: str
    tokenizer: str
    """Folder of the tokenizer."""
    init_from: str | None = None
    """Model folder to start from; unset: random weights."""
    task: dict[str, Any] | None = None
    """What the model is fine-tuned for; travels into its model folder."""


class Resolved(Record):
    """The answers. Equal ones mean equal bits on a CPU."""

    steps: int
    batch: int
    micro_batch: int
    nodes: int = 1
    processes: int
    """On each node."""
    threads: int
    device: Literal["cpu", "cuda"]
    device_name: str
    precision: Precision
    compiled: bool
    compile_reason: str
    """Why it is compiled or not, for people."""
    seed: int
    tokens_per_step: float
    tokens_per_second: float | None
    """As the probe measured it; None when the settings named the steps."""
    evaluate_every: int
    torch: str
    """Its version."""
    memory_mb: int | None = None
    """Peak of one process as it was predicted; None in the answers of older versions."""

    @property
    def world(self) -> int:
        """Trainer processes on all nodes."""
        return self.nodes * self.processes

    @property
    def plan(self) -> dict[str, Any]:
        """What a run has to keep to its end: which batches, at which rates. The rest changes its result by rounding only."""
        return self.model_dump(include={"steps", "batch", "seed", "tokens_per_step", "evaluate_every"})


class Run:
    """The run folder of one training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job_file = folder / "job.json"
        self.resolved_file = folder / "resolved.json"
        self.journal = folder / "journal.jsonl"
        self.attempts = folder / "attempts.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.skipped = folder / "skipped.json"
        self.profile = folder / "profile"
        self.model = folder / "model"
        self.holder = folder / "trainer.json"
        self.lock = folder / "trainer.lock"
        self.error = folder / "error.json"

    def job(self) -> Job:
        """The question."""
        return Job.model_validate_json(self.job_file.read_text(encoding="utf-8"))

    def resolved(self) -> Resolved | None:
        """The answers, once there are any."""
        if not self.resolved_file.exists():
            return None
        return Resolved.model_validate_json(self.resolved_file.read_text(encoding="utf-8"))

    def write(self, record: Job | Resolved) -> None:
        """Store the question or the answers."""
        file = self.job_file if isinstance(record, Job) else self.resolved_file
        write_json(file, json.loads(record.model_dump_json()))
