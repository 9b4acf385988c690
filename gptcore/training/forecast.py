"""What a training would take, before anything is built: time, memory, energy and money, for shapes and for places to train.

    seconds = (tokens x FLOPs per token + steps x FLOPs of Muon) / (peak FLOP/s x utilisation)
    energy  = board power x seconds

Tokens hold the evaluations, which go forward only: a third of a training token each. The utilisation is an assumption (below);
tokenizing, saving and fine-tuning are not counted.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from gptcore.cards import card
from gptcore.config import CostConfig, ModelConfig, PipelineConfig, TrainingConfig
from gptcore.cost import price
from gptcore.model import GPT
from gptcore.model.folder import pick_device
from gptcore.tokens.objectives import Symbols, blank, objective
from gptcore.training.bench import flops_per_token
from gptcore.training.budget import EVALUATION_SHARE, ROOM, dtype_of, most_rows, precision_for, processor
from gptcore.training.footprint import PROCESS, Footprint, Memory
from gptcore.training.job import Precision
from gptcore.training.machine import free_memory, matrix_speed
from gptcore.training.muon import orthogonal_flops
from gptcore.training.optimizers import block_matrices
from gptcore.training.room import count_weights

HERE = "here"
UTILISATION = {"card": 0.35, "cuda": 0.5, "cpu": 0.75}
"""Share of the peak that a training reaches. Of a card's data sheet: published runs on one card with models of 100 M parameters
and more (nanoGPT on an A100: 0.35 to 0.4); smaller models reach less. Of this machine's own matrix product: on a card, where
that reaches some 0.7 of the data sheet, half; on a CPU what was measured, 0.75 at a width of 384 and 0.65 at 192."""


@dataclass(frozen=True)
class Place:
    """Where one could train, with all its processes together."""

    name: str
    """As it was asked for."""
    title: str
    """In words."""
    device: Literal["cpu", "cuda"]
    precision: Precision
    flops: float
    """Peak of all, per second."""
    muon_flops: float
    """The same in what Muon computes in: with float16 that is float32."""
    utilisation: float
    memory: int
    """Bytes that one process may take."""
    watts: float | None
    """Of all; None where nothing tells it."""


def places(names: Sequence[str], training: TrainingConfig, utilisation: float | None = None) -> list[Place]:
    """Cards by name, and "here", which is measured for a second. Raises `SettingsError` for an unknown name."""
    for name in names:
        if name != HERE:
            card(name)  # a mistake is told before anything is measured
    return [_here(training, utilisation) if name == HERE else _card(name, training, utilisation) for name in names]


def _card(name: str, training: TrainingConfig, utilisation: float | None) -> Place:
    known, count = card(name), training.world
    half: Precision = "bfloat16" if known.bfloat16 else "float16"
    precision = half if training.precision == "auto" else training.precision
    flops, wide = (1e12 * count * tera for tera in (known.half, known.float32))
    return Place(
        name, name, "cuda", precision, wide if precision == "float32" else flops, flops if precision == "bfloat16" else wide,
        utilisation or UTILISATION["card"], int(known.memory * 2**30), count * known.watts,
    )  # fmt: skip


def _here(training: TrainingConfig, utilisation: float | None) -> Place:
    device = pick_device(training.device)
    cuda, precision = device.type == "cuda", precision_for(training.precision, device)
    count = training.world if cuda else training.nodes  # processes share a CPU; each has a card
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads((training.threads or 0) * training.processes or len(os.sched_getaffinity(0)))
    speed = matrix_speed(device, dtype_of(precision))
    wide = matrix_speed(device, torch.float32) if precision == "float16" else speed
    return Place(
        HERE, torch.cuda.get_device_name(device) if cuda else processor(), "cuda" if cuda else "cpu", precision,
        count * speed.flops, count * wide.flops, utilisation or UTILISATION[device.type],
        free_memory(device, training.processes), speed.watts and count * speed.watts,
    )  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """One shape in one place."""

    shape: str
    place: Place
    parameters: int
    flops_per_token: int
    speed: float
    """Training tokens per second."""
    tokens: float
    """Of training."""
    seconds: float
    micro_batch: int
    """0 when not one sequence fits."""
    memory: Memory
    """With that micro-batch, or one sequence."""
    money: float | None
    """None without a price."""

    @property
    def joules(self) -> float | None:
        """None where nobody knows the power."""
        return None if self.place.watts is None else self.place.watts * self.seconds

    @property
    def missing(self) -> int:
        """Bytes that are too few."""
        return 0 if self.micro_batch else self.memory.total - int(ROOM * self.place.memory)

    def as_row(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        place = self.place
        return {
            "shape": self.shape, "on": place.name, "device": place.title,
            "parameters": self.parameters, "flops_per_token": self.flops_per_token,
            "tokens": round(self.tokens), "seconds": round(self.seconds, 1), "tokens_per_second": round(self.speed, 1),
            "peak_tflops": round(place.flops / 1e12, 3), "mfu": place.utilisation,
            "precision": place.precision, "fits": self.micro_batch > 0,
            "micro_batch": self.micro_batch or None, "memory_mb": self.memory.total >> 20,
            "memory_there_mb": place.memory >> 20, "missing_mb": self.missing >> 20,
            "kwh": None if self.joules is None else self.joules / 3.6e6, "money": self.money,
        }  # fmt: skip


def forecasts(
    config: PipelineConfig, shapes: Mapping[str, ModelConfig], there: Sequence[Place], per_hour: Mapping[str, float]
) -> Iterator[Forecast]:
    """Every shape in every place, with the vocabulary, the budget and the optimizer of `config`.

    `per_hour`: price of a place for an hour by its name, before `config.cost`'s.
    """
    training, vocabulary = config.training, config.tokenizer.vocabulary
    symbols = Symbols(mask=0, begin=1, end=2, pad=3, control=np.arange(4), vocabulary=vocabulary)  # any: shapes count alone
    for name, model in shapes.items():
        text = objective(model, training.masking, symbols, 0)
        footprints: dict[tuple[str, Precision], Footprint] = {}  # counted once for all cards alike
        for place in there:
            key = place.device, place.precision
            if key not in footprints:
                footprints[key] = Footprint(
                    model, vocabulary, training, partial(blank, text), place.device, dtype_of(place.precision)
                )
            prices = config.cost.model_copy(update={"per_hour": per_hour.get(place.name, config.cost.per_hour)})
            yield _forecast(name, footprints[key], place, prices, training.batch * text.reads)


def _forecast(name: str, footprint: Footprint, place: Place, prices: CostConfig, tokens_per_step: int) -> Forecast:
    model, vocabulary, training = footprint.config, footprint.vocabulary, footprint.training
    flops, in_a_step = flops_per_token(model, vocabulary), training.batch * model.context  # some tokens only hide others
    learning = in_a_step * flops / (place.flops * place.utilisation)
    updating = training.world * update_flops(model, vocabulary, training) / (place.muon_flops * place.utilisation)
    speed = tokens_per_step / (learning + updating)
    tokens, seconds = budget(training, tokens_per_step, speed, 3 * tokens_per_step / learning)
    joules = None if place.watts is None else place.watts * seconds
    parameters = count_weights(model, vocabulary).total
    return Forecast(
        name, place, parameters, flops, speed, tokens, seconds, *_fit(footprint, place), price(seconds, joules, prices)
    )


def update_flops(model: ModelConfig, vocabulary: int, training: TrainingConfig) -> int:
    """FLOPs of an optimizer step, which every process does for itself: of Muon's products; all else is little."""
    if training.optimizer.algorithm != "muon":
        return 0
    return sum(orthogonal_flops(*weight.shape) for weight in block_matrices(GPT(model, vocabulary, device="meta")))


def _fit(footprint: Footprint, place: Place) -> tuple[int, Memory]:
    """The micro-batch, 0 when not even one sequence or the one that was asked for fits, and the memory that it takes."""
    asked = footprint.training.micro_batch and min(footprint.rows, footprint.training.micro_batch)
    found = footprint.largest(asked or most_rows(footprint), int(ROOM * place.memory) - PROCESS[place.device])
    if asked and found < asked:
        found = 0
    return found, footprint.at(found or asked or 1)


def budget(training: TrainingConfig, tokens_per_step: int, speed: float, forward: float) -> tuple[float, float]:
    """Training tokens and seconds of a base's training with its evaluations.

    `speed`: training tokens per second; `forward`: evaluation tokens.
    """
    evaluations = training.evaluations * training.evaluation_tokens / forward
    if training.minutes is not None:
        seconds = training.minutes * 60
        return speed * (seconds - min(evaluations, EVALUATION_SHARE * seconds)), seconds
    tokens = training.tokens or (training.steps or 0) * tokens_per_step
    return tokens, tokens / speed + evaluations
