"""finetune: from the base to a task model, with the same trainer."""

import json

from gptcore.artifacts import Artifact, Recipe
from gptcore.config import ModelConfig, TaskConfig
from gptcore.training.job import Job
from tasks.base import train, training_settings
from tasks.run import Run, stage_task

_GENTLE = 0.1
"""Of the rate that suits a base: what it knows shall stay."""


@stage_task("finetune-{task.name}", trains=True)
def finetune(
    run: Run, name: str, task: TaskConfig, model: ModelConfig, base: Artifact, examples: Artifact, shards: Artifact
) -> Artifact:
    """The base, trained further on the answers of a task."""
    training = task.training.suited(model.width, _GENTLE)
    settings = {"training": training_settings(training)}
    # The examples say what the model is told about its task, such as its labels and the length of an answer.
    inputs = {"base": base.digest, examples.stage: examples.digest, shards.stage: shards.digest}
    recipe = Recipe(f"finetune-{task.name}", name, 2, settings, inputs)
    spec = examples.path / "task.json"
    job = Job(
        model=model,
        training=training,
        shards=str(shards.path),
        shards_digest=shards.digest,
        tokenizer=str(base.path / "model" / "tokenizer"),
        init_from=str(base.path / "model"),
        task=json.loads(spec.read_text(encoding="utf-8")) if spec.exists() else None,
    )
    return train(run, recipe, job, [base, examples, shards])
