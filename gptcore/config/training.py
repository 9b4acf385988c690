"""How a model learns."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gptcore.config.section import Count, Positive, Section, Share

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
    import_from: Annotated[str, Field(min_length=1)] | None = None
    """A model of transformers that takes the place of tokenizer and pretraining, `base: {import: gpt2}`: a local folder, or a
    name of the hub. Its shape and its tokenizer are kept: leave `model` and `tokenizer` out. It is not trained on: for that,
    `gptcore import` makes an artifact of it, which `init_from` begins with."""

    @model_validator(mode="before")
    @classmethod
    def _import_is_a_word_of_python(cls, values: Any) -> Any:
        # Not an alias: Prefect checks what was written against the names of what is asked.
        if isinstance(values, Mapping) and "import" in values and "import_from" not in values:
            return {"import_from" if key == "import" else key: value for key, value in values.items()}
        return values

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.init_from is not None and self.import_from is not None:
            raise ValueError("set init_from or import, not both: one is trained on, the other is the base itself")
        return self


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
