"""What every task is handed: where artifacts are, who watches, and the one way to build or reuse a stage."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run, task_run
from prefect.states import Completed

from gptcore.artifacts import Artifact, Decision, Numbers, Recipe, Store
from gptcore.errors import TrainerDied
from gptcore.training.job import Resolved
from tasks.tracking import Tracking

Parameters = ParamSpec("Parameters")

PENDING = "pending"
"""Digest of what a plan would build first."""


class Watcher(Protocol):
    """Whoever shows the run to a person."""

    def stage(self, stage: str) -> None:
        """A stage is being built."""

    def journal(self, stage: str, line: dict[str, Any]) -> None:
        """The trainer wrote a line."""

    def done(self, artifact: Artifact) -> None:
        """A stage is there, built or reused."""

    def say(self, text: str) -> None:
        """Something worth a line."""


class Silent:
    """A watcher that shows nothing."""

    def stage(self, stage: str) -> None:
        """Nothing."""

    def journal(self, stage: str, line: dict[str, Any]) -> None:
        """Nothing."""

    def done(self, artifact: Artifact) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


@dataclass
class Run:
    """One pipeline run, or the plan of one."""

    store: Store
    watcher: Watcher
    tracking: Tracking | None = None
    """None: nothing is told to MLflow."""
    rebuild: frozenset[str] = frozenset()
    """Stages to build although they are there."""
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    """Every stage so far, in order."""
    decisions: dict[str, Decision] = field(default_factory=dict)
    """While planning: what would happen to each stage."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The headline numbers, once they are known."""
    results: Path | None = None
    """Folder of the results page, once it is written."""
    planning: bool = False
    """Nothing is built; the run notes what would be."""
    answers: Mapping[str, Resolved] = field(default_factory=dict)
    """Stage -> what its training shall not decide anew, such as the steps that its minutes were worth."""

    def stage(
        self,
        recipe: Recipe,
        make: Callable[[Path], Numbers],
        inputs: Sequence[Artifact] = (),
        *,
        evaluated: Artifact | None = None,
        resumable: bool = False,
    ) -> Artifact:
        """Build or reuse the artifact of `recipe` and see to it that MLflow knows; inputs are verified before building."""
        force = recipe.stage in self.rebuild
        if self.planning:
            artifact = self._planned(recipe, force)
        elif not force and (found := self.store.find(recipe)) is not None and self.store.note_use(found):
            artifact = found
            if self.tracking is not None:
                self.tracking.reuse_stage(artifact)
        else:
            artifact = self._built(recipe, make, inputs, evaluated, resumable, force)
        self.artifacts[recipe.stage] = artifact
        self.watcher.done(artifact)
        return artifact

    def _planned(self, recipe: Recipe, force: bool) -> Artifact:
        pending = [name for name, digest in recipe.inputs.items() if digest == PENDING]
        if force:
            decision = Decision("build", "asked for with --rebuild")
        elif pending:
            decision = Decision("build", f"after its input {', '.join(pending)}")
        else:
            decision = self.store.explain(recipe)
        self.decisions[recipe.stage] = decision
        if decision.action == "reuse" and (found := self.store.find(recipe)) is not None:
            return found
        return Artifact(recipe.stage, recipe.name, self.store.address(recipe), recipe.fingerprint, PENDING)

    def _built(
        self,
        recipe: Recipe,
        make: Callable[[Path], Numbers],
        inputs: Sequence[Artifact],
        evaluated: Artifact | None,
        resumable: bool,
        force: bool,
    ) -> Artifact:
        self.watcher.stage(recipe.stage)
        building, tracking = False, self.tracking

        def build(folder: Path) -> Numbers:
            # Under the artifact's lock: whoever only waits for another run's build has no run of its own in MLflow.
            nonlocal building
            building = True
            if tracking is not None:
                tracking.start_stage(recipe)
            for artifact in inputs:
                self.store.verify_once(artifact)
            return make(folder)

        try:
            artifact = self.store.build(recipe, build, force=force)
        except BaseException as error:
            if building and tracking is not None:
                tracking.fail_stage(recipe, error, resumable=resumable)
            raise
        if tracking is not None and building:
            tracking.finish_stage(artifact, evaluated)
        elif tracking is not None:
            tracking.reuse_stage(artifact)
        return artifact


Stage = Callable[Concatenate[Run, Parameters], Artifact]
"""A stage as a plain function: the run first, then its settings and finished inputs."""


_TRY_AGAIN_AFTER = (3.0, 15.0)
"""Seconds between the tries of a training whose trainer was killed; another program that took the memory may end meanwhile."""


def stage_task(name: str, *, trains: bool = False) -> Callable[[Stage[Parameters]], Stage[Parameters]]:
    """Make a Prefect task of a stage. Prefect's own cache is not used; a reused stage ends in the state `Reused`.

    `name` is the task run's, with the function's arguments in braces. While planning, and outside of any flow, the plain
    function is called, so that one chain serves all. One that `trains` is tried again when its trainer was killed, and goes
    on from the checkpoint in the same run of MLflow; a mistake of the user's and Ctrl-C end it at once.
    """
    retries: dict[str, Any] = {}
    if trains:
        retries = {
            "retries": len(_TRY_AGAIN_AFTER),
            "retry_delay_seconds": list(_TRY_AGAIN_AFTER),
            "retry_condition_fn": _trainer_died,
        }

    def decorate(function: Stage[Parameters]) -> Stage[Parameters]:
        signature = inspect.signature(function)

        @task(name=function.__name__, cache_policy=NO_CACHE, persist_result=False, **retries)
        def coat(run: Run, *arguments: Any, **named: Any) -> Artifact | State[Artifact]:
            try:
                artifact = function(run, *arguments, **named)
            except TrainerDied as error:
                tried = task_run.run_count or 1
                if tried <= len(_TRY_AGAIN_AFTER):
                    run.watcher.say(f"{task_run.name}: {error}; trying again in {_TRY_AGAIN_AFTER[tried - 1]:.0f} seconds")
                    raise
                raise TrainerDied(f"{error}; it was tried {tried} times") from error
            return Completed(name="Reused", data=artifact) if artifact.reused else artifact

        @functools.wraps(function)
        def call(run: Run, /, *arguments: Parameters.args, **named: Parameters.kwargs) -> Artifact:
            if run.planning or not flow_run.get_id():
                return function(run, *arguments, **named)
            called = name.format(**signature.bind(run, *arguments, **named).arguments)
            result = coat.with_options(task_run_name=called)(run, *arguments, **named)
            return result.result() if isinstance(result, State) else result

        return call

    return decorate


def _trainer_died(_task: Any, _task_run: Any, state: State[Any]) -> bool:
    """Whether a task failed because its trainer was killed."""
    return isinstance(state.data, TrainerDied)
