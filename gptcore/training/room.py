"""How much a model weighs and how much room its training takes on the disk, counted from the settings. No torch here."""

from dataclasses import dataclass

from gptcore.config import ModelConfig, TrainingConfig

_FLOAT = 4
"""Bytes of a weight, and of every entry of an optimizer's state: both are float32."""


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters, as the optimizers divide them."""

    matrices: int
    """Of the blocks."""
    others: int
    """Embeddings, head, norms, biases."""

    @property
    def total(self) -> int:
        """All parameters; a tied head counts once."""
        return self.matrices + self.others

    @property
    def model_bytes(self) -> int:
        """Of `model.safetensors`."""
        return _FLOAT * self.total

    def checkpoint_bytes(self, training: TrainingConfig) -> int:
        """Of one checkpoint: the weights, their average, and one momentum of each (Muon, SGD) or two moments (Adam)."""
        matrices, others = {"muon": (1, 2), "sgd": (1, 1)}.get(training.optimizer.algorithm, (2, 2))
        return (2 if training.ema else 1) * self.model_bytes + _FLOAT * (matrices * self.matrices + others * self.others)


def count_weights(config: ModelConfig, vocabulary: int) -> Weights:
    """The parameters of `GPT(config, vocabulary)`."""
    width, inner, size = config.width, config.inner_width, config.size_of_head
    queries, keys = config.heads * size, config.key_value_heads * size
    ups = 2 if config.activation == "swiglu" else 1
    norm = 2 if config.norm == "layer" else 1  # vectors per norm: scale, and shift
    block = width * (2 * queries + 2 * keys) + (ups + 1) * width * inner
    vectors = 2 * norm * width + (2 * norm * size if config.qk_norm else 0)
    if config.biases_of_queries:
        vectors += queries + 2 * keys
    if config.biases:
        vectors += width + ups * inner + width  # the output of attention and the way down each write into the residual stream
    places = config.context + config.position_offset if config.positions == "learned" else 0
    places += config.context + 1 if config.objective == "prefix" else 0
    tables = vocabulary * width * (1 if config.tied else 2) + (places + config.segments) * width
    tables += config.layers * vocabulary * keys if config.value_embeddings else 0
    around = norm * width * (config.embedding_norm + (config.residual != "post")) + (width if config.smear else 0)
    if config.head_transform:
        around += width * width + (width if config.biases else 0) + norm * width
    around += vocabulary if config.head_bias else 0
    return Weights(config.layers * block, tables + around + config.layers * vectors)


def training_bytes(config: ModelConfig, training: TrainingConfig, vocabulary: int, copies: int) -> int:
    """The least that a training has on the disk at its fullest moment; `copies` of the model are made for MLflow.

    That moment is either a save, when the newest checkpoint is there and the oldest not yet gone, or the end, when the model
    lies beside the checkpoints. Whether the best is one of the newest nobody knows beforehand; it is not counted.
    """
    weights = count_weights(config, vocabulary)
    saves = min(training.evaluations, training.steps or training.evaluations)
    kept = min(training.keep, saves)
    checkpoint = weights.checkpoint_bytes(training)
    at_a_save = min(kept + 1, saves) * checkpoint
    at_the_end = kept * checkpoint + (1 + copies) * weights.model_bytes
    return max(at_a_save, at_the_end)
