"""register and promote: a model enters the registry; the better one becomes champion. Neither is a stored stage."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from gptcore.artifacts import Artifact, Store, load_artifact
from gptcore.config import CostConfig, EvaluationConfig
from gptcore.cost import cost_card
from gptcore.errors import ArtifactError, RegistryError
from gptcore.evaluation import compare_evaluations, headline, read_results, summary_rows
from gptcore.evaluation.comparison import Comparison
from gptcore.evaluation.overview import results_page
from tasks.evaluation import evaluate
from tasks.progress import show_results, show_table
from tasks.registry import CHAMPION, Registry, Version
from tasks.run import Run, Silent
from tasks.tracking import Tracking

_FREE = CostConfig()
"""No prices."""


@dataclass(frozen=True)
class Promotion:
    """What became of a model in the registry."""

    version: Version
    verdict: str
    """One sentence: champion or not, and why."""

    def as_row(self) -> dict[str, Any]:
        """For tables and JSON."""
        version = self.version
        return {
            "name": version.name, "version": version.version, "aliases": list(version.aliases), "verdict": self.verdict,
        }  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a pipeline run ends with."""

    artifacts: Mapping[str, Artifact]
    models: list[dict[str, Any]]
    summary: pandas.DataFrame
    results: Path | None
    """The page for the whole run; None while planning."""
    sample: tuple[str, str] | None
    """A prompt and what the base made of it."""
    metrics: Mapping[str, float]
    mlflow_run_id: str | None
    prefect_flow_run_id: str | None

    def as_json(self) -> dict[str, Any]:
        """The object that `gptcore run --json` prints."""
        return {
            "artifacts": {
                stage: {
                    "path": str(artifact.path), "fingerprint": artifact.fingerprint, "digest": artifact.digest,
                    "reused": artifact.reused,
                }
                for stage, artifact in self.artifacts.items()
            },
            "models": [{key: row[key] for key in ("name", "version", "aliases")} for row in self.models],
            "metrics": dict(self.metrics),
            "mlflow_run_id": self.mlflow_run_id,
            "prefect_flow_run_id": self.prefect_flow_run_id,
            "seconds": {stage: 0.0 if a.reused else round(a.seconds, 3) for stage, a in self.artifacts.items()},
        }  # fmt: skip


def promote(
    run: Run, config: EvaluationConfig, model: Artifact, evaluation: Artifact, test_set: Artifact, prices: CostConfig = _FREE
) -> Promotion | None:
    """Register a model with its evidence and make it champion if it is the first or the better one; None while planning."""
    if run.planning:
        return None
    result: Promotion = _promote(run, config, model, evaluation, test_set, prices)
    return result


@task(name="promote", task_run_name="promote {model.stage}", cache_policy=NO_CACHE, persist_result=False)
def _promote(
    run: Run, config: EvaluationConfig, model: Artifact, evaluation: Artifact, test_set: Artifact, prices: CostConfig
) -> Promotion:
    registry = Registry(run.store.home, run.watcher.say)
    version, judged = register(run, registry, model, evaluation, test_set, prices)
    return judged or _decide(run, registry, version, config, evaluation, test_set)


def register(
    run: Run, registry: Registry, model: Artifact, evaluation: Artifact, test_set: Artifact, prices: CostConfig, **more: Any
) -> tuple[Version, Promotion | None]:
    """Register a model with its evidence and `more` of it; the version, and where it stands if it was judged before."""
    assert run.tracking is not None
    name, value, _ = headline(read_results(evaluation.path))
    evidence = {
        "metrics": _metrics({model.stage: evaluation}),
        "headline": f"{name} {value:.4f}",
        "cost": cost_card(run.store, model, evaluation, prices, run.artifacts.values()),
        # What the gate needs when somebody promotes by hand later.
        "evaluation": str(evaluation.path),
        "test_set": str(test_set.path),
        **more,
    }
    version = registry.register(run.tracking, model, evidence)
    if "verdict" in version.evidence:
        # Judged before: a reused model never undoes what a person has decided since.
        registry.complete_unfinished(version.name)
        version = registry.find(f"{version.name}/{version.version}")
        standing = "champion already" if CHAMPION in version.aliases else f"judged before: {version.evidence['verdict']}"
        return version, Promotion(version, standing)
    return version, None


def promote_version(home: Path, reference: str, force: str | None) -> dict[str, Any]:
    """`gptcore promote`: the gate for a version that is registered already; `force` is a reason to skip it."""
    registry = Registry(home)
    version = registry.find(reference)
    if force is not None:
        if not force.strip():
            raise RegistryError('promote --force needs a reason that is recorded, such as --force "rolled out by hand"')
        if CHAMPION in version.aliases:
            return Promotion(version, "champion already, so nothing was forced and no reason recorded").as_row()
        promoted = registry.promote(version.name, version.version, force, forced=True)
        return Promotion(promoted, f"champion, forced: {force}").as_row()
    try:
        evaluation = load_artifact(Path(str(version.evidence["evaluation"])))
        test_set = load_artifact(Path(str(version.evidence["test_set"])))
    except (ArtifactError, KeyError) as error:
        raise RegistryError(
            f"{version.name}/{version.version} cannot be compared, its evaluation or test set is gone ({error}); "
            'run its pipeline again, or give a reason with --force "…"'
        ) from error
    run = Run(Store(home), Silent(), Tracking(home, evaluation.name))
    config = EvaluationConfig(**evaluation.manifest()["settings"])
    return _decide(run, registry, version, config, evaluation, test_set).as_row()


def _decide(
    run: Run, registry: Registry, version: Version, config: EvaluationConfig, evaluation: Artifact, test_set: Artifact
) -> Promotion:
    """The gate: better than the champion on the candidate's own test set, where the champion is evaluated again."""
    registry.complete_unfinished(version.name)
    champion = registry.champion(version.name)
    if champion is None:
        return Promotion(registry.promote(version.name, version.version, "first version"), "champion: the first version")
    if champion.version == version.version:
        return Promotion(champion, "champion already")
    theirs = evaluate_champion(run, registry, champion, config, test_set)
    comparison = compare_evaluations(evaluation.path, theirs.path, resamples=config.resamples, seed=config.seed)
    metric = headline(read_results(evaluation.path))[0]
    numbers = f"{metric} {comparison.a:.4f} against {comparison.b:.4f} of version {champion.version}"
    rows = comparison_rows(metric, version, champion, comparison)
    show_table(rows, f"comparison-of-{version.name}", f"{version.name}: is version {version.version} better?", run.watcher.say)
    if comparison.better:
        reason = f"better: {numbers}"
        return Promotion(registry.promote(version.name, version.version, reason), f"champion, {reason}")
    return Promotion(registry.challenge(version.name, version.version), f"not better: {numbers}")


def comparison_rows(metric: str, version: Version, champion: Version, comparison: Comparison) -> list[dict[str, Any]]:
    """A candidate beside the champion on the same samples, for a table."""
    return [
        {"model": f"{version.name}/{version.version}", "metric": metric, "value": round(comparison.a, 4),
         "difference": f"{comparison.difference:+.4f}", "95 % interval": f"{comparison.low:+.4f} to {comparison.high:+.4f}",
         "samples": comparison.samples, "verdict": comparison.verdict},
        {"model": f"{champion.name}/{champion.version} @champion", "metric": metric, "value": round(comparison.b, 4),
         "difference": "", "95 % interval": "", "samples": comparison.samples, "verdict": ""},
    ]  # fmt: skip


def evaluate_champion(
    run: Run, registry: Registry, champion: Version, config: EvaluationConfig, test_set: Artifact
) -> Artifact:
    """The champion on the candidate's test set; stored like every evaluation, so it is done once."""
    stage = "base" if test_set.stage.startswith("corpus") else test_set.stage.replace("examples-", "finetune-")
    folder = registry.resolve(f"{champion.name}/{champion.version}").parent
    model = Artifact(stage, test_set.name, folder, "", champion.digest)
    aside = replace(run, artifacts={}, rebuild=frozenset())  # not a stage of this run
    run.watcher.say(f"{champion.name}/{champion.version}, the champion, on the same test set:")
    return evaluate(aside, test_set.name, config, model, test_set)


# ------------------------------------------------------------------------------------------------------- closing --


def write_results(run: Run, name: str, evaluations: Mapping[str, Artifact], promotions: list[Promotion | None]) -> Outcome:
    """The page for the whole run, its headline numbers, and all that the closing table shows."""
    models = [promotion.as_row() for promotion in promotions if promotion is not None]
    ids = (run.tracking.parent_id if run.tracking is not None else None, str(flow_run.get_id() or "") or None)
    if run.planning:
        return Outcome(run.artifacts, models, pandas.DataFrame(), None, None, {}, *ids)
    paths = {stage: artifact.path for stage, artifact in evaluations.items()}
    curves = {
        f"training of {stage}": artifact.path / "report" / "curves.png"
        for stage, artifact in run.artifacts.items()
        if stage == "base" or stage.startswith("finetune-")
    }
    run.results = run.store.home / "results" / name
    run.results.mkdir(parents=True, exist_ok=True)
    costs = {p.version.name: p.version.evidence.get("cost", {}) for p in promotions if p is not None}
    costs = {model: card for model, card in costs.items() if "whole_chain" in card}
    title = f"{name}, {time.strftime('%Y-%m-%d %H:%M')}"
    page = results_page(run.results, paths, title=title, pictures=curves, costs=costs)
    show_results(page, name, run.watcher.say)
    run.metrics = _metrics(evaluations)
    samples = read_results(paths["base"])["samples"]
    # What a masked model filled in is the whole text.
    sample = (samples[0]["prompt"], samples[0]["drawn"]) if samples and "drawn" in samples[0] else None
    if samples and sample is None:
        sample = ("", samples[0]["likeliest"])
    return Outcome(run.artifacts, models, summary_rows(paths), page, sample, run.metrics, *ids)


def _metrics(evaluations: Mapping[str, Artifact]) -> dict[str, float]:
    """Every measured number, as `<model>/<metric>`; of a single evaluation without the model's name."""
    numbers = {}
    for model, artifact in evaluations.items():
        for metric, entry in read_results(artifact.path)["metrics"].items():
            key = metric if len(evaluations) == 1 else f"{model}/{metric}"
            numbers[key] = float(entry["value"])
    return numbers
