"""sweep: the same pipeline with different settings, up to the model each is judged by; the best become a file that runs."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from rich.markup import escape

from flows.session import OPTIONS, Place, open_run
from flows.start import open_chain
from gptcore.artifacts import Artifact
from gptcore.config import PipelineConfig
from gptcore.errors import DiskFullError, Interrupted, TrainingError
from gptcore.search import TrialResult, search
from gptcore.sweeps import SweepConfig, words
from tasks.run import Run, Watcher
from tasks.sweep import SweepOutcome, finish_sweep


@flow(name="sweep", flow_run_name="{config.name}")
def sweep(config: SweepConfig) -> SweepOutcome:
    """Train every trial that was not trained before, compare them all, and write the best one's settings."""
    place = Place(f"sweep {config.name}", settings=config.model_dump(mode="json"))
    OPTIONS.set(replace(OPTIONS.get(), watcher=_Calm(OPTIONS.get().watcher)))
    with open_run(config.config, place) as run:
        trials: list[TrialResult] = []

        def objective(number: int, changes: Mapping[str, Any]) -> float | None:
            trials.append(_attempt(run, config, TrialResult(number, changes)))
            return trials[-1].value

        search(config, objective)
        return finish_sweep(run, config, trials)


def _attempt(run: Run, sweep: SweepConfig, begun: TrialResult) -> TrialResult:
    """One trial; what goes wrong in it is noted and the sweep goes on, unless it would go wrong in all of them."""
    assert run.tracking is not None
    try:
        settings = sweep.trial_config(begun.changes)
        begun = replace(begun, config=settings)
        title = f"trial {begun.number} of {sweep.count}: {words(begun.settings)}"[:200]
        run.watcher.say(escape(title))
        done = trial(settings, title, sweep.until, sweep.number, run.tracking.parent_id)
    except (Interrupted, DiskFullError):
        raise
    except Exception as error:  # its traceback is in Prefect's pages
        reason = str(error).strip() or type(error).__name__
        run.watcher.say(f"trial {begun.number} of {sweep.count} failed: {escape(reason)}")
        return replace(begun, error=reason)
    run.watcher.say(f"trial {begun.number} of {sweep.count}: {sweep.number} {done.value:.5g}")
    return replace(done, number=begun.number, changes=begun.changes)


@flow(name="trial", flow_run_name="{title}")
def trial(config: PipelineConfig, title: str, until: str, number: str, parent: str | None = None) -> TrialResult:
    """Build or reuse everything up to the model `until`, and read its `number`. `parent` is the sweep's run in MLflow."""
    with open_run(config, Place(title, parent)) as run:
        assert run.tracking is not None
        model = open_chain(run, config).model(until)
        value = float(model.numbers.get(number, math.nan))
        if not math.isfinite(value):
            raise TrainingError(f"its {number} is {value}: the training diverged; try smaller learning rates")
        run.metrics = {number: value}
        ids = (run.tracking.parent_id, str(flow_run.get_id() or "") or None)
        return TrialResult(0, {}, config, model, value, None, *ids)


class _Calm:
    """Shows a stage that all trials share once, and not again for each of them."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._seen: set[str] = set()
        self.stage, self.journal, self.say = watcher.stage, watcher.journal, watcher.say

    def done(self, artifact: Artifact) -> None:
        """A stage is there."""
        if not artifact.reused or artifact.fingerprint not in self._seen:
            self._watcher.done(artifact)
        self._seen.add(artifact.fingerprint)
