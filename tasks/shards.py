"""shards: from documents and rows to token ids on disk."""

from pathlib import Path

from gptcore.artifacts import Artifact, Numbers, Recipe
from gptcore.config import ModelConfig, ShardsConfig, TaskConfig
from gptcore.downstream import encode_examples as encode_rows
from gptcore.room import check_room
from gptcore.tokens import Tokenizer
from gptcore.tokens import encode_corpus as encode_documents
from tasks.run import Run, stage_task

_ROOM = 2 / 16
"""Bytes of shards per byte of text, at least: two for every token, and a token seldom has 16 bytes."""


@stage_task("shards")
def encode_corpus(run: Run, name: str, config: ShardsConfig, corpus: Artifact, tokenizer: Artifact) -> Artifact:
    """The corpus as token ids."""
    inputs = {"corpus": corpus.digest, "tokenizer": tokenizer.digest}
    recipe = Recipe("shards", name, 1, config.model_dump(mode="json"), inputs)

    def make(folder: Path) -> Numbers:
        text = sum(float(value) for key, value in corpus.numbers.items() if key.endswith("_bytes"))
        check_room(run.store.home, int(text * _ROOM), "encoding the corpus")
        return encode_documents(folder, config, corpus.path, Tokenizer.load(tokenizer.path / "tokenizer"))

    return run.stage(recipe, make, [corpus, tokenizer])


@stage_task("shards-{task.name}")
def encode_examples(
    run: Run, name: str, task: TaskConfig, model: ModelConfig, examples: Artifact, tokenizer: Artifact
) -> Artifact:
    """The rows of a task as token ids with a mask of what is learned."""
    inputs = {examples.stage: examples.digest, "tokenizer": tokenizer.digest}
    recipe = Recipe(f"shards-{task.name}", name, 1, {"context": model.context}, inputs)

    def make(folder: Path) -> Numbers:
        return encode_rows(folder, examples.path, Tokenizer.load(tokenizer.path / "tokenizer"), model.context)

    return run.stage(recipe, make, [examples, tokenizer])
