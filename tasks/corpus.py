"""examples and corpus: from sources to rows and documents."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gptcore.artifacts import Artifact, Numbers, Recipe, digest_of
from gptcore.config import CorpusConfig, SplitConfig, TaskConfig
from gptcore.corpus import build_corpus, identify
from gptcore.corpus.additions import build_all, build_new, write_files
from gptcore.downstream import build_examples
from gptcore.record import OLD
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
    identities = {source.name: identify(source, run.store.home) for source in config.sources}
    recipe = Recipe(
        stage="corpus",
        name=name,
        version=2,
        settings={**config.model_dump(mode="json", exclude={"workers"}), "split": split.model_dump(mode="json")},
        inputs=_digests(identities) | {artifact.stage: artifact.digest for artifact in examples.values()},
    )
    protected = [artifact.path for artifact in examples.values()]

    def make(folder: Path) -> Numbers:
        numbers = build_corpus(folder, config, split, protected, run.store.home)
        write_files(folder, config, identities, {})  # what is added later need not be read together with this
        return numbers

    return run.stage(recipe, make, list(examples.values()))


@stage_task("corpus-new")
def prepare_new(
    run: Run, name: str, config: CorpusConfig, split: SplitConfig, examples: Mapping[str, Artifact], old: Artifact
) -> Artifact:
    """What the sources hold now and the corpus `old` does not."""
    identities = {source.name: identify(source, run.store.home) for source in config.sources}
    inputs = {artifact.stage: artifact.digest for artifact in examples.values()} | {OLD: old.digest}
    settings = {**config.model_dump(mode="json", exclude={"workers"}), "split": split.model_dump(mode="json")}
    recipe = Recipe("corpus-new", name, 1, settings, _digests(identities) | inputs)
    protected = [artifact.path for artifact in examples.values()]
    return run.stage(
        recipe,
        partial(
            build_new, config=config, split=split, old=old.path, identities=identities, protected=protected, home=run.store.home
        ),
        [*examples.values(), old],
    )


@stage_task("corpus-all")
def unite(run: Run, name: str, old: Artifact, new: Artifact) -> Artifact:
    """The corpus `old` and what was added to it."""
    recipe = Recipe("corpus-all", name, 1, {}, {OLD: old.digest, new.stage: new.digest})
    return run.stage(recipe, partial(build_all, old=old.path, new=new.path), [old, new])


def _digests(identities: Mapping[str, Any]) -> dict[str, str]:
    return {name: digest_of(identity) for name, identity in identities.items()}
