"""What the base is fine-tuned for, how results are measured and paid, and all of it together."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gptcore.config.model import ModelConfig
from gptcore.config.section import Count, Name, Positive, Section, Share
from gptcore.config.text import CorpusConfig, ShardsConfig, Source, SplitConfig, TokenizerConfig
from gptcore.config.training import BaseConfig, TrainingConfig


class TaskConfig(Section):
    """A task the base is fine-tuned for."""

    type: Literal["summarize", "classify"]
    """`summarize`: a text -> its summary. `classify`: a text -> one of the labels seen in the training rows."""
    name: Name = ""
    """How the store and the registry call it. Unset: its type."""
    source: Source
    """Where its rows come from."""
    max_rows: Count | None = None
    """Use at most this many training rows, drawn deterministically."""
    max_test_rows: Count = 500
    """Evaluate on at most this many test rows, drawn deterministically."""
    min_label_share: Share = 0.01
    """classify: labels rarer than this share of the rows are left out."""
    mask_names: bool = True
    """classify, python_docs: replace the package's own names in the text, so that the label is not spelled out."""
    max_new_tokens: Count = 40
    """summarize: longest answer."""
    training: TrainingConfig
    """Its fine-tuning."""

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_type(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and not values.get("name"):
            return {**values, "name": values.get("type", "")}
        return values

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if self.training.mixture is not None:
            raise ValueError("training.mixture is for the base, a task has one source: take it out")
        return self


class EvaluationConfig(Section):
    """How results are measured."""

    resamples: Count = 1000
    """Bootstrap resamples behind every 95 % interval."""
    seed: int = 0
    """Of the resamples and of the samples that are shown."""
    prompts: tuple[str, ...] = ()
    """Beginnings that the base continues, shown in the results. Unset: beginnings of test documents."""
    samples: Count = 8
    """Rows and continuations that are shown."""
    batch: Count = 32
    """Windows of a base that are evaluated at once; does not change the result beyond rounding."""


class CostConfig(Section):
    """Prices, for the cost card of every registered version. In no fingerprint: another price rebuilds nothing."""

    per_hour: Annotated[float, Field(ge=0.0)] | None = None
    """Price of this machine for an hour. Unset: the card holds no money for the machine."""
    per_kwh: Annotated[float, Field(ge=0.0)] | None = None
    """Price of a kilowatt-hour, on top: leave it unset where the price of the machine holds the electricity. Only the energy of
    trainings is measured."""
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "EUR"
    """In which both prices are, as a code of three letters (ISO 4217)."""


class ContinualConfig(Section):
    """How a champion is trained on when there is new text. Its shape and its tokenizer stay what they are."""

    replay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Share of a round's text, in bytes, that is old: drawn from all that the champion and those before it were trained on."""
    passes: Positive = 2.0
    """Times that a round reads its text, unless `minutes`, `steps` or `tokens` gives it another budget."""
    minutes: Positive | None = None
    """Wall time of a round's training, as in `training`."""
    steps: Count | None = None
    """Optimizer steps of a round."""
    tokens: Count | None = None
    """Training tokens of a round."""
    rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Peak learning rates of a round, as a share of those in `training.optimizer`: high ones learn faster and forget more."""
    min_gain: Share = 0.001
    """A candidate whose bits per byte on the new test set are lower than the champion's by less than this share is not
    promoted, however sure the difference is: the paired interval of a model that hardly moved is very small."""
    max_forgetting: Share = 0.02
    """A candidate whose bits per byte on the old test set may be higher than the champion's by more than this share, by the
    upper end of the 95 % interval, is not promoted."""
    tasks: bool = True
    """Fine-tune the tasks again from a base that was promoted, each through a gate of its own; not those that were not there
    when the first base was made, since its text was not cleaned of their test rows."""
    seed: int = 0
    """Draws the old text."""

    @model_validator(mode="after")
    def _one_budget_at_most(self) -> Self:
        given = [name for name in ("minutes", "steps", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"set at most one of minutes, steps and tokens; set are: {', '.join(given)}")
        return self

    def training(self, config: TrainingConfig, text_tokens: int) -> TrainingConfig:
        """The settings of a round's training: `config`, whose rates are set, with this budget and a share of its rates.

        `text_tokens`: tokens to read once. `replay` says what a round's text is mixed of, so the mixture of the base is none of
        its own.
        """
        optimizer = config.optimizer
        assert optimizer.rate is not None
        rates = {"matrix_rate": optimizer.matrix_rate * self.rate, "rate": optimizer.rate * self.rate}
        budget = {name: getattr(self, name) for name in ("minutes", "steps", "tokens")}
        if not any(budget.values()):
            budget["tokens"] = max(1, round(self.passes * text_tokens))
        return config.model_copy(update={**budget, "mixture": None, "optimizer": optimizer.model_copy(update=rates)})


class PipelineConfig(Section):
    """From raw text to promoted models: the only parameter of the pipeline."""

    name: Name = "docs-gpt"
    """Of the registered base model, the experiment and the artifacts; a task model is called `<name>-<task>`."""
    corpus: CorpusConfig
    """Which text."""
    split: SplitConfig = SplitConfig()
    """How text is dealt to train, valid and test."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text becomes tokens."""
    shards: ShardsConfig = ShardsConfig()
    """How tokens are stored."""
    model: ModelConfig = ModelConfig()
    """The shape of the model."""
    base: BaseConfig = BaseConfig()
    """Where the base begins: from nothing, or from a finished one."""
    training: TrainingConfig
    """Pretraining of the base."""
    tasks: tuple[TaskConfig, ...] = ()
    """What the base is fine-tuned for; may be empty."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How results are measured."""
    cost: CostConfig = CostConfig()
    """What the machine and its electricity cost."""
    continual: ContinualConfig = ContinualConfig()
    """How `gptcore continual` trains the champion on with new text."""

    @model_validator(mode="after")
    def _context_fits_a_shard(self) -> Self:
        if self.model.context > self.shards.tokens_per_shard:
            raise ValueError(
                f"model.context ({self.model.context}) is longer than shards.tokens_per_shard "
                f"({self.shards.tokens_per_shard}); lower one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _tasks_have_different_names(self) -> Self:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks need different names, these are {names}: set `name`")
        return self

    @model_validator(mode="after")
    def _a_masked_model_answers_nothing(self) -> Self:
        if self.model.objective == "masked" and self.tasks:
            raise ValueError(
                "tasks are answered one token after the other, which a masked model cannot do: "
                "set model.objective to causal or prefix, or leave tasks empty"
            )
        return self

    @model_validator(mode="after")
    def _mixture_names_the_sources(self) -> Self:
        mixture, sources = self.training.mixture, {source.name for source in self.corpus.sources}
        if mixture is not None and mixture.keys() != sources:
            raise ValueError(
                f"training.mixture names {', '.join(sorted(mixture))}, the sources of the corpus are "
                f"{', '.join(sorted(sources))}: give each of them a share, 0 leaves one out"
            )
        return self
