"""examples and corpus: from sources to rows and documents."""

from collections.abc import Mapping
from functools import partial

from gptcore.artifacts import Artifact, Recipe, digest_of
from gptcore.config import CorpusConfig, SplitConfig, TaskConfig
from gptcore.corpus import build_corpus, identify
from gptcore.downstream import build_examples
from tasks.run import Run, stage_task


@stage_task("examples-{task.name}")
def prepare_examples(run: Run, name: str, task: TaskConfig, split: SplitConfig, workers: int) -> Artifact:
    """The rows of a task, dealt to train, valid and test."""
    settings = task.model_dump(mode="json", exclude={"training"})
    recipe = Recipe(
        stage=f"examples-{task.name}",
        name=name,
        version=1,
        settings={**settings, "split": split.model_dump(mode="json")},
        inputs={task.source.name: digest_of(identify(task.source, run.store.home))},
    )
    return run.stage(recipe, partial(build_examples, task=task, split=split, workers=workers, home=run.store.home))


@stage_task("corpus")
def prepare_corpus(run: Run, name: str, config: CorpusConfig, split: SplitConfig, examples: Mapping[str, Artifact]) -> Artifact:
    """Cleaned documents, dealt to train, valid and test, without the test rows of the tasks in train."""
    identities = {source.name: digest_of(identify(source, run.store.home)) for source in config.sources}
    recipe = Recipe(
        stage="corpus",
        name=name,
        version=2,
        settings={**config.model_dump(mode="json", exclude={"workers"}), "split": split.model_dump(mode="json")},
        inputs=identities | {artifact.stage: artifact.digest for artifact in examples.values()},
    )
    protected = [artifact.path for artifact in examples.values()]
    return run.stage(
        recipe,
        partial(build_corpus, config=config, split=split, protected=protected, home=run.store.home),
        list(examples.values()),
    )
