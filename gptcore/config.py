"""Every setting: frozen, strict, checked once at the door. YAML + `--set section.key=value` -> `PipelineConfig`.

A section is what one stage is given; it enters the stage's fingerprint (`cost` is for none). Facts are not settings: the
vocabulary a tokenizer ended up with belongs to the tokenizer. The environment holds addresses and secrets only.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gptcore.errors import SettingsError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]


class Section(BaseModel):
    """A group of settings. Unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------------------- text --


class FilesSource(Section):
    """Text files and tables: .txt .md .jsonl .csv .parquet, each plain or .gz."""

    type: Literal["files"] = "files"
    name: Name = "files"
    """How tables and metrics call this source."""
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders (searched through) or globs."""
    text: str = "text"
    """Column that holds the text, in .jsonl, .csv and .parquet."""
    group: str | None = None
    """What stays together in one split: `file`, `row`, `part` (each chunk of a text for itself) or the name of a column.
    Unset: the file for .txt and .md, the row for tables."""
    target: str | None = None
    """Column that holds the answer, when the source feeds a task."""


class HubSource(Section):
    """A dataset of the Hugging Face hub, or a local dataset folder, read as a stream by `datasets.load_dataset`."""

    type: Literal["hub"] = "hub"
    name: Name = "hub"
    """How tables and metrics call this source."""
    dataset: str
    """Hub name (`owner/name`) or a folder that `datasets.load_dataset` opens."""
    config: str | None = None
    """Configuration of the dataset, if it has several."""
    split: str = "train"
    """Which of the dataset's own splits is read."""
    revision: str | None = None
    """Commit, tag or branch; the commit it resolves to enters the fingerprint."""
    text: str = "text"
    """Column that holds the text."""
    group: str | None = None
    """Column whose equal values stay together in one split. Unset: the row."""
    target: str | None = None
    """Column that holds the answer, when the source feeds a task."""
    limit: Count | None = None
    """Read at most this many rows."""


class PythonDocsSource(Section):
    """The docstrings of installed Python packages, parsed with `ast`; nothing is imported."""

    type: Literal["python_docs"] = "python_docs"
    name: Name = "python-docs"
    """How tables and metrics call this source."""
    packages: tuple[str, ...] = Field(min_length=1)
    """Import names of installed packages; `stdlib` is Python's own library."""


Source = Annotated[FilesSource | HubSource | PythonDocsSource, Field(discriminator="type")]


class SplitConfig(Section):
    """How groups are dealt to train, valid and test. Corpus and tasks share it, so that a group has one split everywhere."""

    valid: Share = 0.05
    """Share of the groups that measure progress during training."""
    test: Share = 0.05
    """Share of the groups that only the final evaluation sees."""
    seed: int = 0
    """Deals the groups anew."""
    ngram: Count = 13
    """Length in words of the n-grams that tell whether two texts overlap (Brown et al. 2020, appendix C)."""
    max_overlap: Share = 0.2
    """A held-out text that shares more than this share of its n-grams with train is set aside."""
    minimum: Count = 20
    """Fewest documents, or rows of a task, that each split must hold."""

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> Self:
        if self.valid + self.test >= 1.0:
            raise ValueError(f"valid ({self.valid}) and test ({self.test}) leave nothing to train on; lower them")
        return self


class CorpusConfig(Section):
    """Which text, and what is done to it before anything is learned."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Where the text comes from."""
    min_characters: Count = 50
    """Shorter documents are set aside as `too_short`."""
    max_characters: Count = 2000
    """Longer documents are cut into chunks of at most this length, at paragraph or sentence ends where there are any."""
    workers: Count = 2
    """Processes that read and clean; does not change the result."""

    @model_validator(mode="after")
    def _bounds_and_names(self) -> Self:
        if self.min_characters > self.max_characters:
            raise ValueError(f"min_characters ({self.min_characters}) is above max_characters ({self.max_characters})")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources need different names, these are {names}: set `name`")
        return self


class TokenizerConfig(Section):
    """The tokenizer that is learned from the corpus."""

    algorithm: Literal["unigram", "bpe"] = "unigram"
    """sentencepiece's algorithm."""
    vocabulary: Annotated[int, Field(ge=300)] = 8192
    """Pieces in all: 256 bytes, the control symbols and the learned ones."""
    sample_characters: Count = 5_000_000
    """Learn from at most this many characters, drawn evenly and deterministically from train."""
    character_coverage: Annotated[float, Field(ge=0.98, le=1.0)] = 0.9995
    """Share of the sample's characters that get a piece of their own; the rest is spelled in bytes."""
    seed: int = 0
    """Draws another sample."""


class ShardsConfig(Section):
    """How token ids are laid out on disk."""

    tokens_per_shard: Count = 100_000_000
    """Tokens in one file; documents are never cut at a file's end."""


# --------------------------------------------------------------------------------------------------------- model --


class ModelConfig(Section):
    """The Transformer decoder. The default is the modern block in the Qwen3 layout; `preset("gpt2")` is the GPT-2 block."""

    layers: Count = 6
    """Blocks."""
    width: Count = 384
    """Size of the residual stream."""
    heads: Count = 6
    """Attention heads."""
    kv_heads: Count | None = None
    """Key and value heads, shared by groups of query heads (Ainslie et al. 2023). Unset: as many as heads."""
    head_size: Count | None = None
    """Size of one head. Unset: width / heads."""
    ffn_width: Count | None = None
    """Inner width of the feed-forward network. Unset: 4 x width, for SwiGLU 8/3 x width rounded up to 64."""
    context: Count = 256
    """Tokens the model sees at once."""
    objective: Literal["causal", "masked", "prefix"] = "causal"
    """What it learns to predict, and so what a token may see. `causal`: the next token, from those before it. `masked`: hidden
    tokens, from all around them (Devlin et al. 2019). `prefix`: hidden spans, one token after the other, from the text around
    them, which sees all of itself (Du et al. 2022)."""
    document_mask: bool = False
    """A token sees only its own document, and positions begin anew with each; unset, a text is read as one stream."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm."""
    norm_epsilon: Positive = 1e-6
    """Added to the variance inside the norm."""
    positions: Literal["rotary", "learned", "sinusoidal"] = "rotary"
    """How a token knows its place."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary frequencies."""
    activation: Literal["swiglu", "gelu_tanh", "relu"] = "swiglu"
    """Of the feed-forward network."""
    qk_norm: bool = True
    """Normalise queries and keys per head (Henry et al. 2020)."""
    biases: bool = False
    """Bias vectors in linear layers."""
    tied: bool = True
    """The head that predicts shares its matrix with the token embedding."""
    embedding_norm: bool = False
    """A norm between the embedding and the first block (Le Scao et al. 2022): a small embedding would drown in what the blocks
    add. Not a part of the Qwen3 layout."""
    value_embeddings: bool = False
    """A table per block, whose row of a token is added to what attention reads of it (modded-nanogpt, 2024):
    weights that cost no products. Not a part of the Qwen3 layout."""
    smear: bool = False
    """Add the embedding of the token before, times a gate that reads the token's own (modded-nanogpt, 2025). Not a part of the
    Qwen3 layout."""
    dropout: Share = 0.0
    """Share of activations dropped while training (embeddings and residual branches)."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        problems = []
        if self.head_size is None and self.width % self.heads:
            problems.append(f"heads ({self.heads}) do not divide width ({self.width}); change one or set head_size")
        if self.heads % self.key_value_heads:
            problems.append(f"kv_heads ({self.kv_heads}) do not divide heads ({self.heads})")
        if self.positions == "rotary" and not problems and self.size_of_head % 2:
            problems.append(f"rotary positions need an even head size, this one is {self.size_of_head}")
        if self.positions == "sinusoidal" and self.width % 2:
            problems.append(f"sinusoidal positions need an even width, this one is {self.width}")
        if self.objective == "prefix" and self.context < 8:
            problems.append(
                f"the prefix objective needs a context of 8 or more for a text and its span, this one is {self.context}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def key_value_heads(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def size_of_head(self) -> int:
        """Size of one attention head."""
        return self.head_size or self.width // self.heads

    @property
    def row_context(self) -> int:
        """Most tokens of a task's row; with the prefix objective two more hide and begin its answer."""
        return self.context - 2 if self.objective == "prefix" else self.context

    @property
    def inner_width(self) -> int:
        """Inner width of the feed-forward network."""
        if self.ffn_width is not None:
            return self.ffn_width
        return -(-self.width * 8 // 3 // 64) * 64 if self.activation == "swiglu" else 4 * self.width


_GPT2 = {
    "context": 1024, "norm": "layer", "norm_epsilon": 1e-5, "positions": "learned", "activation": "gelu_tanh",
    "qk_norm": False, "biases": True, "tied": True,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    # Radford et al. 2019. The paper prints 117 M, 345 M, 762 M and 1,542 M; counted: 124.44, 354.8, 774.0 and 1,557.6 M.
    "gpt2": {"layers": 12, "width": 768, "heads": 12, **_GPT2},
    "gpt2-medium": {"layers": 24, "width": 1024, "heads": 16, **_GPT2},
    "gpt2-large": {"layers": 36, "width": 1280, "heads": 20, **_GPT2},
    "gpt2-xl": {"layers": 48, "width": 1600, "heads": 25, **_GPT2},
    # Ours, in the Qwen3 layout; named after the parameters with a vocabulary of 8,192.
    "modern-5m": {"layers": 4, "width": 256, "heads": 4, "context": 256},
    "modern-14m": {"layers": 6, "width": 384, "heads": 6, "context": 256},
    "modern-33m": {"layers": 8, "width": 576, "heads": 9, "kv_heads": 3, "context": 512},
    "modern-107m": {"layers": 16, "width": 768, "heads": 12, "kv_heads": 4, "context": 1024, "rope_theta": 100_000.0},
}


def preset(name: str) -> ModelConfig:
    """The settings of a known shape. Raises `SettingsError` for an unknown name."""
    if name not in PRESETS:
        raise SettingsError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
    return ModelConfig(**PRESETS[name])


# ------------------------------------------------------------------------------------------------------ training --


_MEASURED_AT = 256
_RATES = {"muon": (0.03, 0.5), "adamw": (0.0015, 1.0), "adam": (0.0015, 1.0), "sgd": (0.1, 0.0)}
"""The peak rate that was best at that width, and the power of 1 / width that it goes with (DECISIONS.md)."""


class OptimizerConfig(Section):
    """How weights learn. The default is Muon for the matrices of the blocks, AdamW for embeddings, norms and biases."""

    algorithm: Literal["muon", "adamw", "adam", "sgd"] = "muon"
    """`muon` (Jordan et al. 2024) with AdamW for all but matrices; `adamw` (Loshchilov and Hutter 2019), `adam` (Kingma and Ba
    2015) or `sgd` with Nesterov's momentum for everything."""
    matrix_rate: Positive = 0.01
    """Peak learning rate of Muon, whatever the width: its updates are as large in every direction."""
    rate: Positive | None = None
    """Peak learning rate of all that Muon does not have. Unset: what suits the algorithm and the width of the model, and for
    tasks a tenth of it."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Of matrices and embeddings; norms and biases have none. Decoupled from the gradient in `muon` and `adamw`; `adam` and
    `sgd` add it to the gradient."""
    table_decay: Annotated[float, Field(ge=0.0)] | None = None
    """The same for embeddings, positions and the head alone. Unset: as `weight_decay`."""
    l1: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the sum of absolute weights in the loss; of matrices and embeddings. Enters after the gradient was clipped."""
    l2: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of half the sum of squared weights in the loss; likewise."""
    momentum: Share = 0.95
    """Of Muon and SGD."""
    betas: tuple[Share, Share] = (0.8, 0.95)
    """Of AdamW and Adam."""
    epsilon: Positive = 1e-10
    """Of AdamW and Adam."""
    clip: Positive = 1.0
    """Largest norm of the whole gradient."""
    schedule: Literal["wsd", "cosine", "linear"] = "wsd"
    """After the warm-up: flat and then linearly down (warm-up, stable, decay), half a cosine, or linearly down all the way."""
    warmup: Share = 0.02
    """Share of the steps over which the rate rises from zero."""
    decay: Share = 0.5
    """wsd: share of the steps, at the end, over which the rate falls."""
    final_rate: Share = 0.0
    """What is left of the peak rate at the last step."""

    def suited(self, width: int, share: float = 1.0) -> Self:
        """The same with a rate, where none is set: `share` of what suits a model of `width` that begins from nothing."""
        if self.rate is not None:
            return self
        best, power = _RATES[self.algorithm]
        return self.model_copy(update={"rate": share * best * (_MEASURED_AT / width) ** power})


class BaseConfig(Section):
    """Where the base begins."""

    init_from: Annotated[str, Field(min_length=1)] | None = None
    """A finished base that is trained on with the corpus and `training` of these settings: a registered one
    (`docs-gpt@champion`, `docs-gpt/3`), or the folder of an artifact, a model or a checkpoint. Its shape and its tokenizer are
    kept: leave `model` and `tokenizer` out. With a champion of this pipeline's own `name`, every promoted run begins the next.
    Unset: random weights."""


class MaskingConfig(Section):
    """What the masked and the prefix objective hide."""

    share: Annotated[float, Field(gt=0.0, le=0.5)] = 0.15
    """Share of the tokens that are hidden; of the prefix objective's rows with short spans."""
    anew: bool = True
    """Hide others in every epoch (Liu et al. 2019); unset, always the same ones (Devlin et al. 2019)."""
    short: Share = 0.5
    """prefix: share of the rows in which short spans are hidden; in the others it is one long one, to the end of the text."""


class TrainingConfig(Section):
    """One training run, of the base or of a task. Exactly one budget: minutes, steps or tokens."""

    minutes: Positive | None = None
    """Wall time of training and its evaluations; this machine is probed and the steps picked before step 1."""
    steps: Count | None = None
    """Optimizer steps."""
    tokens: Count | None = None
    """Training tokens, padding left out; rounded up to whole steps."""
    batch: Count = 8
    """Sequences in one optimizer step, over all micro-batches and processes."""
    mixture: dict[str, Annotated[float, Field(ge=0.0)]] | None = None
    """Share of the training tokens that each source of the corpus gives, by its name; scaled to sum to 1, 0 leaves a source
    out. Validation reads all of them. Of the base only, not of its rounds or of tasks. Unset: of each as much as there is."""
    micro_batch: Count | None = None
    """Sequences in one forward and backward pass per process. Unset: as many as fit into memory, as it is predicted, and at
    most 8,192 tokens on a CPU, 65,536 on a card. Halved where memory runs out all the same. Changes the result by rounding
    only, with dropout by what is dropped: in no fingerprint."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Learning rates and all that belongs to them."""
    masking: MaskingConfig = MaskingConfig()
    """Of models whose objective is `masked` or `prefix`."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of every target that is spread over the whole vocabulary (Szegedy et al. 2016)."""
    z_loss: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the squared log of the softmax's denominator (Chowdhery et al. 2022); 1e-4 keeps logits small."""
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay of a moving average of the weights, which is then what is evaluated and published; 0: the weights themselves."""
    patience: Count | None = None
    """Stop when so many evaluations in a row brought no lower validation loss, and publish the weights of the best one."""
    max_spike: Positive = 3.0
    """Nats by which a loss may always stand above the usual; one that stands higher, and ten times outside of the usual spread,
    or is no number, takes the training back to the last checkpoint and past the batches that caused it."""
    evaluations: Count = 10
    """Times the validation loss is measured, evenly spread; the last time after the last step."""
    evaluation_tokens: Count = 65_536
    """Validation tokens read each time."""
    keep: Count = 2
    """Newest checkpoints that are kept, beside the best."""
    checkpoint_seconds: Positive = 60.0
    """Longest time between two checkpoints, as long as a save costs less than 1 % of it."""
    nodes: Count = 1
    """Machines that train together and share the home's file system. The first runs the pipeline; on each of the others
    `python -m gptcore.training.process RUN_FOLDER` joins. `GPTCORE_RENDEZVOUS` names the first as host:port. Like `processes`
    and `threads`, it changes the result by rounding only, with dropout by what is dropped: in no fingerprint."""
    processes: Count = 1
    """Trainer processes on each node, one per card or per half of a CPU. A training may go on with another number of them."""
    threads: Count | None = None
    """CPU threads per process. Unset: the cores divided by the processes."""
    restarts: Annotated[int, Field(ge=0)] = 2
    """Times that trainers are started again, from the last checkpoint, when one of them was killed or ran out of memory. In no
    fingerprint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it computes; `auto` takes a card when there is one."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of activations; weights stay in float32. `auto`: bfloat16 wherever the hardware has it, CPUs included, and float16, with
    its loss scaled so that no gradient vanishes, on cards without."""
    compile: Literal["auto"] | bool = "auto"
    """`torch.compile`; `auto` when the run is long enough to pay for its start."""
    profile: bool = False
    """Leave a trace and a table of where the time of four steps went (`torch.profiler`) with the artifacts. Switched
    on, it trains anew."""
    seed: int = 0
    """Of the initial weights and of the order of the text."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [name for name in ("minutes", "steps", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of minutes, steps and tokens; set are: {', '.join(given) or 'none'}")
        return self

    @model_validator(mode="after")
    def _mixture_leaves_something(self) -> Self:
        if self.mixture is not None and not any(self.mixture.values()):
            raise ValueError("mixture leaves every source out: give at least one of them a share above 0")
        return self

    @model_validator(mode="after")
    def _as_many_rows_for_everyone(self) -> Self:
        if self.batch % self.world:
            raise ValueError(
                f"{self.nodes} node(s) with {self.processes} process(es) each do not divide batch ({self.batch}): change one "
                "of them, so that every process has as many rows"
            )
        return self

    @property
    def world(self) -> int:
        """Trainer processes on all nodes."""
        return self.nodes * self.processes

    def suited(self, width: int, share: float = 1.0) -> Self:
        """The same with a learning rate, as `OptimizerConfig.suited` says."""
        return self.model_copy(update={"optimizer": self.optimizer.suited(width, share)})


# --------------------------------------------------------------------------------------------------------- tasks --


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


# ------------------------------------------------------------------------------------------------------- loading --


def load_config(path: Path | str, overrides: Sequence[str] = (), texts: Sequence[str] = ()) -> PipelineConfig:
    """Read a YAML file, put the files `texts` in place of its text, apply `section.key=value` overrides, check everything.

    A `model` section may start from a preset: `model: {preset: modern-5m, context: 512}`.
    Raises `SettingsError` that names all problems at once.
    """
    values = read_yaml(Path(path))
    if texts:
        _use_texts(values, texts)
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, f"{path} with --set" if overrides else str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The plain values of a settings file. Raises `SettingsError` when it cannot be read or holds no settings."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot read the settings {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"the settings {path} are not UTF-8 text (byte {error.start}); save them as UTF-8") from error
    try:
        values = yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path} holds no settings: expected sections such as `corpus:` and `training:`")
    return values


def parse_config(values: Mapping[str, Any], where: str = "the settings") -> PipelineConfig:
    """Check plain values, as they come from YAML or JSON. Raises `SettingsError` that names all problems at once."""
    try:
        _refuse_credentials(values, where)
        expanded = dict(values)
        if isinstance(model := expanded.get("model"), dict) and "preset" in model:
            rest = {key: value for key, value in model.items() if key != "preset"}
            expanded["model"] = {**preset(str(model["preset"])).model_dump(exclude_unset=True), **rest}
        return PipelineConfig.model_validate(expanded)
    except ValidationError as error:
        raise settings_error(error, where) from error


def settings_error(error: ValidationError, where: str) -> SettingsError:
    """All problems that pydantic found, a line each, in words for people."""
    problems = [f"  {_place(problem['loc'])}: {_say(problem)}" for problem in error.errors()]
    return SettingsError(f"{where}: {len(problems)} problem(s) in the settings\n" + "\n".join(problems))


class _Loader(yaml.SafeLoader):
    """YAML without keys that stand twice: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(problem=f"the key {twice!r} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _use_texts(values: dict[str, Any], texts: Sequence[str]) -> None:
    """Other text makes another model: with a name of its own, without tasks, prompts and a mixture that belong to the old."""
    if not all(text.strip() for text in texts):
        raise SettingsError("--text is empty: name a file or a folder, such as --text my-texts")
    first = Path(texts[0]).absolute()
    stem = re.sub(r"[^a-z0-9]+", "-", first.name.split(".")[0].lower()).strip("-") or "text"
    own = f"{stem[:51]}-gpt"
    values["name"] = own if own != values.get("name") else f"{stem[:51]}-text-gpt"  # never the name of the old text's model
    source = {"type": "files", "paths": [str(Path(text).absolute()) for text in texts]}
    corpus = values.get("corpus") or {}
    if isinstance(corpus, dict):
        values["corpus"] = {**corpus, "sources": [source]}
    for section, old in (("evaluation", "prompts"), ("training", "mixture")):
        if isinstance(part := values.get(section), dict):
            values[section] = {key: value for key, value in part.items() if key != old}
    values["tasks"] = []


_BUDGETS = ("minutes", "steps", "tokens")


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key in place; list items are addressed by number: `tasks.0.training.steps=5`."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise SettingsError(f"--set {override}: expected section.key=value, for example training.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {override}: {text!r} is not a valid value") from error
    set_value(values, key.strip(), value, f"--set {override}")


def set_value(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set one dotted key in place; list items are addressed by number. Raises `SettingsError` that begins with `where`."""
    parts = key.split(".")
    place: Any = values
    for part in parts[:-1]:
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise SettingsError(f"{where}: there are {len(place)} items, {part!r} is none of their numbers")
            place = place[int(part)]
        elif isinstance(place, dict):
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        else:
            raise SettingsError(f"{where}: {part!r} lies inside a value that has no parts")
    last = parts[-1]
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        # One budget replaces another: `--set training.steps=40` on a config that says `minutes: 3` means 40 steps.
        if last in _BUDGETS and value is not None:
            for other in _BUDGETS:
                place.pop(other, None)
        place[last] = value
    else:
        raise SettingsError(f"{where}: {last!r} cannot be set there")


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "settings"


def _say(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        known = sorted({name for section in Section.__subclasses__() for name in section.model_fields})
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
        return f"unknown setting; did you mean {near[0]}?" if near else "unknown setting"
    if problem["type"] == "missing":
        return "missing"
    text = str(problem["msg"]).removeprefix("Value error, ")
    return text if problem["type"] == "value_error" else f"{text} (is {problem.get('input')!r})"


def _refuse_credentials(value: Any, place: str) -> None:
    """A secret in the settings would travel to MLflow, Prefect and every artifact."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_credentials(inner, f"{place}: {key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_credentials(inner, place)
    elif isinstance(value, str) and re.search(r"://[^/\s]*@", value):
        raise SettingsError(f"{place} holds a URL with a user or password; put credentials into the environment instead")
