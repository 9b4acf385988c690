"""shards: from documents and rows to token ids on disk."""

from pathlib import Path

from gptcore.artifacts import Artifact, Numbers, Recipe
from gptcore.config import ContinualConfig, ModelConfig, ShardsConfig, TaskConfig
from gptcore.downstream import encode_examples as encode_rows
from gptcore.room import check_room
from gptcore.tokens import Tokenizer, encode_round
from gptcore.tokens import encode_corpus as encode_documents
from tasks.run import Run, stage_task

_ROOM = 2 / 16
"""Bytes of shards per byte of text, at least: two for every token, and a token seldom has 16 bytes."""


@stage_task("shards")
def encode_corpus(run: Run, name: str, config: ShardsConfig, corpus: Artifact, tokenizer: Artifact) -> Artifact:
    """The corpus as token ids."""
    inputs = {"corpus": corpus.digest, "tokenizer": tokenizer.digest}
    recipe = Recipe("shards", name, 2, config.model_dump(mode="json"), inputs)

    def make(folder: Path) -> Numbers:
        text = sum(float(value) for key, value in corpus.numbers.items() if key.endswith("_bytes"))
        check_room(run.store.home, int(text * _ROOM), "encoding the corpus")
        return encode_documents(folder, config, corpus.path, Tokenizer.load(tokenizer.path / "tokenizer"))

    return run.stage(recipe, make, [corpus, tokenizer])


@stage_task("shards-new")
def encode_new(
    run: Run, name: str, config: ShardsConfig, continual: ContinualConfig, new: Artifact, corpus: Artifact, tokenizer: Artifact
) -> Artifact:
    """New text, with a share of the old beside it, in the ids of the tokenizer that the champion speaks."""
    settings = {**config.model_dump(mode="json"), "replay": continual.replay, "seed": continual.seed}
    inputs = {new.stage: new.digest, corpus.stage: corpus.digest, "tokenizer": tokenizer.digest}
    recipe = Recipe("shards-new", name, 2, settings, inputs)

    def make(folder: Path) -> Numbers:
        known = Tokenizer.load(tokenizer.path / "tokenizer")
        share, seed = continual.replay, continual.seed
        return encode_round(folder, config, new.path, corpus.path, known, replay=share, seed=seed)

    return run.stage(recipe, make, [new, corpus])


@stage_task("shards-{task.name}")
def encode_examples(
    run: Run, name: str, task: TaskConfig, model: ModelConfig, examples: Artifact, tokenizer: Artifact
) -> Artifact:
    """The rows of a task as token ids with a mask of what is learned."""
    inputs = {examples.stage: examples.digest, "tokenizer": tokenizer.digest}
    recipe = Recipe(f"shards-{task.name}", name, 2, {"context": model.row_context}, inputs)

    def make(folder: Path) -> Numbers:
        return encode_rows(folder, examples.path, Tokenizer.load(tokenizer.path / "tokenizer"), model.row_context)

    return run.stage(recipe, make, [examples, tokenizer])
