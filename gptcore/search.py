"""The search of a sweep: which trial comes next, what became of each, and which is the best."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptcore.artifacts import Artifact
from gptcore.config import PipelineConfig
from gptcore.sweeps import Changes, Range, SweepConfig, grid

if TYPE_CHECKING:
    from optuna import Trial

Objective = Callable[[int, Changes], float | None]
"""Number of a trial, counted from 1, and its settings -> what it is judged by; None when it failed."""


def search(sweep: SweepConfig, objective: Objective) -> None:
    """Give every trial to `objective`, one after the other.

    Nothing is kept for a later call: whoever is called again answers for the trials that it remembers, and Optuna, with the
    same seed and the same answers, asks for the same trials again. So a sweep that was killed goes on as if it had not been.
    """
    if sweep.method == "grid":
        for number, changes in enumerate(grid(sweep), 1):
            objective(number, changes)
        return
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=sweep.seed)
    study = optuna.create_study(sampler=sampler, direction="maximize" if sweep.maximise else "minimize")
    for number in range(1, sweep.count + 1):
        trial = study.ask()
        value = objective(number, {key: _suggest(trial, key, dimension) for key, dimension in sweep.space.items()})
        # TPE takes no notice of FAIL and would ask for the same corner again; PRUNED counts as worse than all that ended.
        study.tell(trial, value, state=optuna.trial.TrialState.PRUNED if value is None else None)


@dataclass(frozen=True)
class TrialResult:
    """What became of a trial."""

    number: int
    """Counted from 1."""
    changes: Changes
    config: PipelineConfig | None = None
    """Its whole settings; None where they do not fit together."""
    model: Artifact | None = None
    """What it trained, or found trained; None when it failed."""
    value: float | None = None
    """What it is judged by."""
    error: str | None = None
    """Why it failed."""
    mlflow_run_id: str | None = None
    prefect_flow_run_id: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that it differs in; plain values as they were read (`1e-3` in YAML is a number here)."""
        values = dict(self.changes)
        if self.config is not None:
            read = self.config.model_dump(mode="json")
            values |= {key: _at(read, key) for key, given in values.items() if not isinstance(given, dict | list)}
        return values


def _at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings[int(part) if isinstance(settings, list) else part]
    return settings


def best_of(sweep: SweepConfig, results: Sequence[TrialResult]) -> TrialResult | None:
    """The trial to choose, of equal ones the first; None when all failed."""
    return next(iter(ranked(sweep, results)), None) if any(result.value is not None for result in results) else None


def ranked(sweep: SweepConfig, results: Sequence[TrialResult]) -> list[TrialResult]:
    """The best first, those that failed last."""
    sign = -1.0 if sweep.maximise else 1.0
    return sorted(results, key=lambda result: math.inf if result.value is None else sign * result.value)


def _suggest(trial: "Trial", key: str, dimension: tuple[Any, ...] | Range) -> Any:
    if not isinstance(dimension, Range):
        return dimension[trial.suggest_categorical(key, range(len(dimension)))]  # a value may be a whole section
    low, high, log, step = dimension.low, dimension.high, dimension.log, dimension.step
    if dimension.whole:
        return trial.suggest_int(key, int(low), int(high), log=log, step=int(step or 1))
    return trial.suggest_float(key, low, high, log=log, step=step)
