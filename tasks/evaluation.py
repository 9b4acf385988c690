"""evaluation: from a model and its test set to numbers one can decide on."""

import shutil
from pathlib import Path

from gptcore.artifacts import REPORT, Artifact, Numbers, Recipe
from gptcore.config import EvaluationConfig
from tasks.run import Run, stage_task


@stage_task("evaluation of {model.stage}")
def evaluate(
    run: Run, name: str, config: EvaluationConfig, model: Artifact, test_set: Artifact, start: Artifact | None = None
) -> Artifact:
    """A base on the test documents of a corpus, or a task model on the test rows of its examples.

    `start`: what a base was trained on from, to stand beside it.
    """
    what = "base" if test_set.stage.startswith("corpus") else test_set.stage.removeprefix("examples-")
    made_of = [model, test_set, *([start] if start is not None else [])]
    inputs = {artifact.stage: artifact.digest for artifact in made_of}
    recipe = Recipe(f"evaluation-{what}", name, 1, config.model_dump(mode="json"), inputs)

    def make(folder: Path) -> Numbers:
        # These load torch: a run that reuses everything never comes here.
        from gptcore.evaluation.base import evaluate_base
        from gptcore.evaluation.task import evaluate_task

        if what == "base":
            before = None if start is None else start.path
            numbers = evaluate_base(folder, model.path / "model", test_set.path, config, before)
        else:
            numbers = evaluate_task(folder, model.path / "model", test_set.path, config)
        for table in folder.glob("*.parquet"):  # a row per sample: MLflow gets it with the report
            shutil.copy(table, folder / REPORT)
        return numbers

    return run.stage(recipe, make, made_of, evaluated=model)
