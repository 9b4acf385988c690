"""The end of a sweep: its table, picture and best settings, published as one folder and shown in Prefect."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
from filelock import FileLock
from prefect.runtime import flow_run

from gptcore.artifacts import publish
from gptcore.errors import TrainingError, disk_full_is_clear
from gptcore.evaluation.trials import BEST, comparison, write_trials
from gptcore.search import TrialResult, best_of
from gptcore.sweeps import SweepConfig
from tasks.progress import show_results
from tasks.run import Run


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep ends with."""

    sweep: SweepConfig
    trials: list[TrialResult]
    best: TrialResult
    table: pandas.DataFrame
    """A row per trial, the best first."""
    folder: Path
    """Holds trials.csv, trials.md, trials.png and the best settings."""
    mlflow_run_id: str | None
    prefect_flow_run_id: str | None

    @property
    def config(self) -> Path:
        """The best settings as a file that runs."""
        return self.folder / BEST

    def as_json(self) -> dict[str, Any]:
        """The object that `gptcore sweep --json` prints."""
        return {
            "sweep": self.sweep.name,
            "metric": self.sweep.number,
            "goal": "max" if self.sweep.maximise else "min",
            "best": _as_row(self.best),
            "trials": [_as_row(trial) for trial in self.trials],
            "config": str(self.config),
            "folder": str(self.folder),
            "mlflow_run_id": self.mlflow_run_id,
            "prefect_flow_run_id": self.prefect_flow_run_id,
        }


def _as_row(trial: TrialResult) -> dict[str, Any]:
    model = trial.model
    return {
        "trial": trial.number,
        "settings": trial.settings,
        "value": trial.value,
        "error": trial.error,
        "path": str(model.path) if model else None,
        "fingerprint": model.fingerprint if model else None,
        "digest": model.digest if model else None,
        "reused": model.reused if model else False,
        "mlflow_run_id": trial.mlflow_run_id,
        "prefect_flow_run_id": trial.prefect_flow_run_id,
    }


def finish_sweep(run: Run, sweep: SweepConfig, trials: Sequence[TrialResult]) -> SweepOutcome:
    """Publish `<home>/sweeps/<name>` whole, and hand its numbers and its folder to MLflow. Raises when every trial failed."""
    best = best_of(sweep, trials)
    if best is None:
        raise TrainingError(
            f"all {len(trials)} trial(s) of the sweep {sweep.name} failed, the last one because: {trials[-1].error}; "
            "change its settings, then run it again"
        )
    assert best.value is not None
    assert run.tracking is not None
    folder = run.store.home / "sweeps" / sweep.name
    (run.store.home / "locks").mkdir(exist_ok=True)
    with disk_full_is_clear(run.store.home), FileLock(run.store.home / "locks" / f"sweep-{sweep.name}.lock"):
        partial = folder.with_name(f"{sweep.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # a killed sweep's
        partial.mkdir(parents=True)
        write_trials(partial, sweep, trials, folder)
        publish(partial, folder)
    failed = sum(trial.value is None for trial in trials)
    run.metrics = {f"best_{sweep.number}": best.value, "best_trial": best.number, "trials": len(trials), "failed": failed}
    run.results = folder
    show_results(folder / "trials.md", f"sweep-{sweep.name}", run.watcher.say)
    ids = (run.tracking.parent_id, str(flow_run.get_id() or "") or None)
    return SweepOutcome(sweep, list(trials), best, comparison(sweep, trials), folder, *ids)
