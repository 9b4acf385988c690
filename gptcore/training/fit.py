"""How training and validation loss stand to each other, read from the journal. No torch here."""

import itertools
from collections.abc import Sequence

from gptcore.training.journal import Line

Point = tuple[int, float, float | None]
"""Step, validation loss, mean training loss since the evaluation before; None where no line told it."""
_RISES = 2


def progress(lines: Sequence[Line]) -> tuple[list[Point], float | None]:
    """A point per evaluation, in order, and the mean training loss since the last one."""
    points: list[Point] = []
    seen: list[float] = []
    for line in lines:
        values = line.get("values", {})
        if "train/loss" in values:
            seen.append(values["train/loss"])
        if "valid/loss" in values:
            points.append((line["step"], values["valid/loss"], _mean(seen)))
            seen = []
    return points, _mean(seen)


def _mean(losses: Sequence[float]) -> float | None:
    return sum(losses) / len(losses) if losses else None


def overfits(points: Sequence[Point]) -> str:
    """A sentence when validation rose at the last two evaluations, not at the one before, while training fell; else empty."""
    last = points[-_RISES - 1 :]
    if len(last) <= _RISES:
        return ""
    (step, best, _), *_, (now, valid, seen) = last
    risen = all(later[1] > earlier[1] for earlier, later in itertools.pairwise(last))
    told_before = len(points) > _RISES + 1 and points[-_RISES - 2][1] < best
    falls = seen is not None and last[1][2] is not None and seen < last[1][2]
    if not risen or not falls or told_before:
        return ""
    return (
        f"overfitting: since step {step} the validation loss rose from {best:.3f} to {valid:.3f} while the training loss fell "
        f"to {seen:.3f} at step {now}; more text, dropout or weight decay, or training.patience, would help"
    )
