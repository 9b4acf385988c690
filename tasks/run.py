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
from prefect.runtime import flow_run
from prefect.states import Completed

from gptcore.artifacts import Artifact, Decision, Numbers, Recipe, Store
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
    """None while planning."""
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

    @property
    def planning(self) -> bool:
        """Whether nothing is built."""
        return self.tracking is None

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
        if self.tracking is None:
            artifact = self._planned(recipe, force)
        elif not force and (found := self.store.find(recipe)) is not None and self.store.note_use(found):
            artifact = found
            self.tracking.reuse_stage(artifact)
        else:
            artifact = self._built(self.tracking, recipe, make, inputs, evaluated, resumable, force)
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
        tracking: Tracking,
        recipe: Recipe,
        make: Callable[[Path], Numbers],
        inputs: Sequence[Artifact],
        evaluated: Artifact | None,
        resumable: bool,
        force: bool,
    ) -> Artifact:
        self.watcher.stage(recipe.stage)
        building = False

        def build(folder: Path) -> Numbers:
            # Under the artifact's lock: whoever only waits for another run's build has no run of its own in MLflow.
            nonlocal building
            building = True
            tracking.start_stage(recipe)
            for artifact in inputs:
                self.store.verify_once(artifact)
            return make(folder)

        try:
            artifact = self.store.build(recipe, build, force=force)
        except BaseException as error:
            if building:
                tracking.fail_stage(recipe, error, resumable=resumable)
            raise
        if building:
            tracking.finish_stage(artifact, evaluated)
        else:
            tracking.reuse_stage(artifact)
        return artifact


Stage = Callable[Concatenate[Run, Parameters], Artifact]
"""A stage as a plain function: the run first, then its settings and finished inputs."""


def stage_task(name: str) -> Callable[[Stage[Parameters]], Stage[Parameters]]:
    """Make a Prefect task of a stage. Prefect's own cache is not used; a reused stage ends in the state `Reused`.

    `name` is the task run's, with the function's arguments in braces. While planning, and outside of any flow, the plain
    function is called, so that one chain serves all.
    """

    def decorate(function: Stage[Parameters]) -> Stage[Parameters]:
        signature = inspect.signature(function)

        @task(name=function.__name__, cache_policy=NO_CACHE, persist_result=False)
        def coat(run: Run, *arguments: Any, **named: Any) -> Artifact | State[Artifact]:
            artifact = function(run, *arguments, **named)
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
