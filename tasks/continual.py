"""continual: the champion with all that it has seen, a candidate that was trained on from it, and the gate between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from gptcore.artifacts import Artifact, Recipe, Store, load_artifact
from gptcore.config import EvaluationConfig, ModelConfig, PipelineConfig
from gptcore.corpus.watching import changed_sources
from gptcore.errors import ArtifactError
from gptcore.evaluation.forgetting import Gate, build_forgetting, decide, read_forgetting
from gptcore.lineage import Lineage, Node
from tasks.promotion import Outcome, Promotion, evaluate_champion, register
from tasks.registry import Registry, Version
from tasks.run import Run, stage_task

FIRST, UNCHANGED, WAITING, PROMOTED, KEPT = "First", "Unchanged", "Waiting", "Promoted", "Kept"
CAUGHT_UP = "CaughtUp"
"""How a round ends: there was no champion yet; nothing is new; too little is new; the candidate is champion; it is not; or the
tasks of the champion were missing and are made."""


@dataclass(frozen=True)
class Parent:
    """The base that a round goes on from, and its text."""

    base: Artifact
    corpus: Artifact
    """All text that it and those before it were made from."""

    @property
    def tokenizer(self) -> Artifact:
        """The one that it speaks, which lies in its own folder."""
        inputs = self.base.manifest()["inputs"]
        return Artifact("tokenizer", self.base.name, self.base.path / "model", "", str(inputs["tokenizer"]))


@dataclass(frozen=True)
class Champion(Parent):
    """The base that everybody uses, and what it was made of."""

    version: Version
    sources: Mapping[str, str]
    """Digest of every source, and of the examples of every task, as it was then."""

    def settings(self, config: PipelineConfig) -> PipelineConfig:
        """`config` with what cannot change in a round: its shape, and the tasks whose test rows its text was cleaned of."""
        model = ModelConfig(**self.base.manifest()["settings"]["model"])
        tasks = tuple(task for task in config.tasks if f"examples-{task.name}" in self.sources)
        return config.model_copy(update={"model": model, "tasks": tasks})

    def has_seen(self, config: PipelineConfig, home: Path) -> bool:
        """Whether the sources are now what they were when it was made."""
        return not changed_sources(config.corpus, home, self.sources)


def find_champion(store: Store, config: PipelineConfig) -> Champion | None:
    """The champion of a pipeline's base. Raises `ArtifactError` when it cannot be trained on, because its corpus is gone."""
    registry = Registry(store.home)
    registry.complete_unfinished(config.name)
    version = registry.champion(config.name)
    if version is None:
        return None
    try:
        base = load_artifact(version.path)
        corpus, newest = _corpora(Lineage(store.root), base)
        return Champion(base, load_artifact(corpus.path or Path()), version, newest.inputs)
    except (ArtifactError, KeyError) as error:
        raise ArtifactError(
            f"the champion {version.name}/{version.version} cannot be trained on in {store.home}: it or its text is not there "
            f"({error}); make a new one with: gptcore run"
        ) from error


def _corpora(lineage: Lineage, base: Artifact) -> tuple[Node, Node]:
    """Everything that a base has seen, and the part of it that came last, which names the sources."""
    inputs = base.manifest()["inputs"]
    if "shards-new" not in inputs:
        corpus = lineage.node(lineage.node(inputs["shards"]).inputs["corpus"])
        return corpus, corpus
    corpus = lineage.node(lineage.node(inputs["shards-new"]).inputs["corpus-all"])
    return corpus, lineage.node(corpus.inputs["corpus-new"])


@stage_task("forgetting")
def compare_rounds(
    run: Run, name: str, config: EvaluationConfig, champion: Version, candidate: Artifact, corpus: Artifact, new: Artifact
) -> Artifact:
    """The forgetting table. `candidate`: its evaluation on `corpus`, on which the champion is evaluated here."""
    theirs = evaluate_champion(run, Registry(run.store.home, run.watcher.say), champion, config, corpus)
    settings = {"resamples": config.resamples, "seed": config.seed}
    inputs = {"evaluation of champion": theirs.digest, "evaluation of candidate": candidate.digest, new.stage: new.digest}
    recipe = Recipe("forgetting", name, 1, settings, inputs)
    make = partial(build_forgetting, champion=theirs.path, candidate=candidate.path, new=new.path, config=config)
    return run.stage(recipe, make, [theirs, candidate, new])


@task(name="promote", task_run_name="promote {model.stage}", cache_policy=NO_CACHE, persist_result=False)
def promote_candidate(
    run: Run,
    config: PipelineConfig,
    model: Artifact,
    evaluation: Artifact,
    test_set: Artifact,
    champion: Version,
    forgetting: Artifact,
) -> Promotion:
    """Register a candidate with what it learned and forgot; it becomes champion if the gate says so."""
    registry = Registry(run.store.home, run.watcher.say)
    _, old, new = read_forgetting(forgetting.path)
    gate = decide(old, new, config.continual.max_forgetting, config.continual.min_gain)
    found = {"continues": f"{champion.name}/{champion.version}", "forgetting": dict(forgetting.numbers)}
    version, judged = register(run, registry, model, evaluation, test_set, config.cost, **found)
    if judged is not None:
        return judged
    now = registry.champion(version.name)
    if now is not None and now.version == version.version:  # another run was quicker with the same candidate
        return Promotion(now, "champion already")
    if now is None or now.version != champion.version:
        reason = f"the champion changed from version {champion.version} meanwhile"
        gate = Gate(False, f"{reason}; the next round goes on from the new one")
    if gate.promote:
        return Promotion(registry.promote(version.name, version.version, gate.reason), f"champion, {gate.reason}")
    return Promotion(registry.challenge(version.name, version.version, gate.reason), gate.reason)


@dataclass(frozen=True)
class Continued:
    """What a round ends with."""

    state: str
    """One of those above."""
    said: str
    """One sentence about it."""
    outcome: Outcome
    table: pandas.DataFrame | None = None
    """The forgetting table, where there was a candidate."""

    def as_json(self) -> dict[str, Any]:
        """The object that `gptcore continual --json` prints."""
        rows = [] if self.table is None else self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        return {"state": self.state, "said": self.said, "forgetting": rows, **self.outcome.as_json()}


def tasks_behind(home: Path, config: PipelineConfig, champion: Champion) -> list[str]:
    """The tasks that nobody has fine-tuned from this champion yet, where the settings ask for it."""
    if not config.continual.tasks:
        return []
    registry = Registry(home)

    def is_made_of_it(version: Version) -> bool:
        return bool(version.evidence.get("parents", {}).get("base") == champion.base.digest)

    return [t.name for t in config.tasks if not any(map(is_made_of_it, registry.versions(f"{config.name}-{t.name}")))]


def judged_before(home: Path, candidate: Artifact) -> Version | None:
    """The version of a candidate that has been through the gate."""
    versions = Registry(home).versions(candidate.name)
    return next((v for v in versions if v.digest == candidate.digest and "verdict" in v.evidence), None)


def nothing_done(state: str, said: str, versions: list[Version]) -> Continued:
    """A round that had nothing to do; `versions` are those that stand."""
    models = [Promotion(version, "as it was").as_row() for version in versions]
    flow_run_id = str(flow_run.get_id() or "") or None
    return Continued(state, said, Outcome({}, models, pandas.DataFrame(), None, None, {}, None, flow_run_id))
