"""The order of things: every noun is built or reused when it is first asked for, after those that it is made of."""

from functools import cached_property

from gptcore.artifacts import Artifact
from gptcore.config import PipelineConfig, TaskConfig
from tasks.base import train_base
from tasks.corpus import prepare_corpus, prepare_examples
from tasks.evaluation import evaluate
from tasks.finetune import finetune
from tasks.promotion import Outcome, promote, write_results
from tasks.run import Run
from tasks.shards import encode_corpus, encode_examples
from tasks.tokenizer import learn_tokenizer


class Chain:
    """The nouns of one pipeline. With a planning run nothing is built, and the run notes what would be."""

    def __init__(self, run: Run, config: PipelineConfig) -> None:
        self.run, self.config, self.name = run, config, config.name

    @cached_property
    def examples(self) -> dict[str, Artifact]:
        """The rows of each task."""
        split, workers = self.config.split, self.config.corpus.workers
        return {task.name: prepare_examples(self.run, self.name, task, split, workers) for task in self.config.tasks}

    @cached_property
    def corpus(self) -> Artifact:
        """Cleaned documents, none of which stands in a test set."""
        return prepare_corpus(self.run, self.name, self.config.corpus, self.config.split, self.examples)

    @cached_property
    def tokenizer(self) -> Artifact:
        """Pieces learned from the corpus."""
        return learn_tokenizer(self.run, self.name, self.config.tokenizer, self.corpus)

    @cached_property
    def shards(self) -> Artifact:
        """The corpus as token ids."""
        return encode_corpus(self.run, self.name, self.config.shards, self.corpus, self.tokenizer)

    @cached_property
    def base(self) -> Artifact:
        """The model pretrained on the shards."""
        return train_base(self.run, self.name, self.config.model, self.config.training, self.shards, self.tokenizer)

    @cached_property
    def models(self) -> dict[str, Artifact]:
        """The base, and for each task the base trained further on its rows."""
        return {what: self.model(what) for what in ("base", *(task.name for task in self.config.tasks))}

    def model(self, what: str) -> Artifact:
        """The base, or the model of one task."""
        if what == "base":
            return self.base
        return self.task_model(next(task for task in self.config.tasks if task.name == what))

    def task_shards(self, task: TaskConfig) -> Artifact:
        """The rows of one task as token ids."""
        return encode_examples(self.run, self.name, task, self.config.model, self.examples[task.name], self.tokenizer)

    def task_model(self, task: TaskConfig) -> Artifact:
        """The base trained further on the rows of one task."""
        rows = self.task_shards(task)
        return finetune(self.run, self.name, task, self.config.model, self.base, self.examples[task.name], rows)

    @cached_property
    def evaluations(self) -> dict[str, Artifact]:
        """Each model on its own test set."""
        return {what: self.evaluation(what, model) for what, model in self.models.items()}

    def evaluation(self, what: str, model: Artifact) -> Artifact:
        """One model, the base or a task's, on its test set."""
        return evaluate(self.run, self.name, self.config.evaluation, model, self._test_set(what))

    def noun(self, stage: str) -> Artifact:
        """The artifact of a stage; nothing is built that it is not made of."""
        task = next((task for task in self.config.tasks if stage.endswith(f"-{task.name}")), None)
        kind = stage if task is None else stage.removesuffix(f"-{task.name}")
        if kind == "evaluation-base":
            return self.evaluation("base", self.base)
        if task is None:
            noun: Artifact = getattr(self, kind)
            return noun
        if kind == "examples":
            return self.examples[task.name]
        if kind == "evaluation":
            return self.evaluation(task.name, self.task_model(task))
        return self.task_shards(task) if kind == "shards" else self.task_model(task)

    def promote(self) -> Outcome:
        """Register every model, promote what is better, and write the page for the whole run."""
        promotions = [
            promote(self.run, self.config.evaluation, model, self.evaluations[what], self._test_set(what), self.config.cost)
            for what, model in self.models.items()
        ]
        return write_results(self.run, self.name, self.evaluations, promotions)

    def _test_set(self, what: str) -> Artifact:
        return self.corpus if what == "base" else self.examples[what]
