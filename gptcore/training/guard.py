"""The guard: a loss that is no number, or jumps, takes the training back to its last checkpoint and skips what caused it.

    <run>/skipped.json   {"batches": [118, 119], "rollbacks": 1}   written before the rollback, so a kill changes nothing

Which batch a step reads follows from the step and this list; what counts as a jump follows from the losses before it, which
stand in the checkpoint. So a run that was killed meets the same trouble and leaves it the same way.
"""

import json
import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gptcore.artifacts import write_json
from gptcore.errors import TrainingError

MOST = 3
"""Rollbacks after which a training gives up."""
_WINDOW = 64
_ENOUGH = 16
"""Losses that must be known before one can jump."""
_SPREADS = 10.0


@dataclass(frozen=True)
class Trouble:
    """What is wrong, and since which step."""

    step: int
    """Whose batch brought it; steps count from 0."""
    what: str


class Guard:
    """Watches losses and knows which batches are skipped."""

    def __init__(self, file: Path, max_spike: float) -> None:
        self.file, self.max_spike = file, max_spike
        noted: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.skipped: list[int] = noted.get("batches", [])
        self.rollbacks: int = noted.get("rollbacks", 0)
        self.losses: deque[float] = deque(maxlen=_WINDOW)
        self._waiting: list[tuple[int, Tensor, Tensor]] = []

    def batch_of(self, step: int) -> int:
        """Number of the batch that a step reads: the step's own, moved on by those that are skipped."""
        for batch in self.skipped:
            step += batch <= step
        return step

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Remember a step's loss and the norm of its gradient; nothing is read from the device yet."""
        self._waiting.append((step, loss, norm))

    @property
    def waits(self) -> int:
        """Steps that were not looked at."""
        return len(self._waiting)

    def look(self) -> Trouble | None:
        """The first trouble among the steps since the last look."""
        waiting, self._waiting = self._waiting, []
        for step, loss, norm in waiting:
            value = float(loss)
            if not math.isfinite(value) or not math.isfinite(float(norm)):
                return Trouble(step, f"the loss of step {step + 1} or its gradient is not a number")
            if (limit := self._limit()) is not None and value > limit:
                usual = statistics.median(self.losses)
                return Trouble(step, f"the loss jumped to {value:.2f} at step {step + 1}, from about {usual:.2f}")
            self.losses.append(value)
        return None

    def skip(self, trouble: Trouble) -> list[int]:
        """Never read the trouble's batch and the one before it again, whose update may have caused it; their numbers.

        Raises `TrainingError` when this happened too often.
        """
        if self.rollbacks >= MOST:
            raise TrainingError(
                f"{trouble.what}; the training went back {MOST} times already and skipped batches "
                f"{', '.join(map(str, self.skipped))}: lower training.optimizer.rate and matrix_rate, or look at the text"
            )
        batches = [self.batch_of(step) for step in range(max(0, trouble.step - 1), trouble.step + 1)]
        self.skipped, self.rollbacks = sorted({*self.skipped, *batches}), self.rollbacks + 1
        write_json(self.file, {"batches": self.skipped, "rollbacks": self.rollbacks})
        return batches

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"losses": list(self.losses)}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state()` gave; {} for the start."""
        self.losses = deque(state.get("losses", ()), maxlen=_WINDOW)
        self._waiting = []

    def _limit(self) -> float | None:
        """A loss above it is a jump: far outside of the usual spread, and by `max_spike` nats at least."""
        if len(self.losses) < _ENOUGH:
            return None
        usual = statistics.median(self.losses)
        spread = 1.4826 * statistics.median(abs(loss - usual) for loss in self.losses)
        return usual + max(_SPREADS * spread, self.max_spike)
