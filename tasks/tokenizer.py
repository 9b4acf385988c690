"""tokenizer: from documents to pieces."""

from functools import partial

from gptcore.artifacts import Artifact, Recipe
from gptcore.config import TokenizerConfig
from gptcore.tokens import learn_tokenizer as learn
from tasks.run import Run, stage_task


@stage_task("tokenizer")
def learn_tokenizer(run: Run, name: str, config: TokenizerConfig, corpus: Artifact) -> Artifact:
    """A tokenizer learned from the training documents."""
    recipe = Recipe("tokenizer", name, 2, config.model_dump(mode="json"), {"corpus": corpus.digest})
    return run.stage(recipe, partial(learn, config=config, corpus=corpus.path), [corpus])
