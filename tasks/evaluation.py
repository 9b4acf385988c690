"""evaluation: from a model and its test set to numbers one can decide on."""

import shutil
from pathlib import Path

from gptcore.artifacts import REPORT, Artifact, Numbers, Recipe
from gptcore.config import EvaluationConfig
from tasks.run import Run, stage_task


@stage_task("evaluation of {model.stage}")
def evaluate(run: Run, name: str, config: EvaluationConfig, model: Artifact, test_set: Artifact) -> Artifact:
    """A base on the test documents of a corpus, or a task model on the test rows of its examples."""
    what = "base" if test_set.stage.startswith("corpus") else test_set.stage.removeprefix("examples-")
    inputs = {model.stage: model.digest, test_set.stage: test_set.digest}
    recipe = Recipe(f"evaluation-{what}", name, 1, config.model_dump(mode="json"), inputs)

    def make(folder: Path) -> Numbers:
        # These load torch: a run that reuses everything never comes here.
        from gptcore.evaluation.base import evaluate_base
        from gptcore.evaluation.task import evaluate_task

        measure = evaluate_base if what == "base" else evaluate_task
        numbers = measure(folder, model.path / "model", test_set.path, config)
        for table in folder.glob("*.parquet"):  # a row per sample: MLflow gets it with the report
            shutil.copy(table, folder / REPORT)
        return numbers

    return run.stage(recipe, make, [model, test_set], evaluated=model)
