"""Muon for the matrices of the blocks and AdamW for everything else, or one algorithm for all; state as plain named tensors."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from gptcore.config import OptimizerConfig
from gptcore.errors import CorruptArtifactError
from gptcore.model import GPT
from gptcore.training.muon import Muon


class Optimizers:
    """All optimizers of a model as one. State has names, so that it can be stored without pickle."""

    def __init__(self, model: GPT, config: OptimizerConfig) -> None:
        config = config.suited(model.config.width)
        assert config.rate is not None
        self._names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
        matrices = block_matrices(model)
        tables = [weight for weight, name in self._names.items() if weight.dim() == 2 and not name.startswith("blocks")]
        vectors = [weight for weight in self._names if weight.dim() == 1]
        self._penalised = [*matrices, *tables] if config.l1 or config.l2 else []
        self._l1, self._l2 = config.l1, config.l2
        table_decay = config.weight_decay if config.table_decay is None else config.table_decay
        groups = [(tables, table_decay), (vectors, 0.0)]
        self._members: dict[str, Optimizer] = {}
        self._peaks: dict[str, float] = {}
        if config.algorithm == "muon":
            self._members["muon"] = Muon(
                matrices, lr=config.matrix_rate, weight_decay=config.weight_decay, momentum=config.momentum,
                # The squares of its iteration leave float16's range.
                dtype=torch.float32 if model.compute_dtype == torch.float16 else model.compute_dtype,
            )  # fmt: skip
            self._peaks["muon"] = config.matrix_rate
        else:
            groups.insert(0, (matrices, config.weight_decay))
        name = "adamw" if config.algorithm == "muon" else config.algorithm
        self._members[name] = _one_for_all(name, groups, config.rate, config)
        self._peaks[name] = config.rate

    def step(self, share: float) -> None:
        """One update at `share` of the peak rates; gradients are freed."""
        self._penalise()
        for key, optimizer in self._members.items():
            for group in optimizer.param_groups:
                group["lr"] = self._peaks[key] * share
            optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Free the gradients."""
        for optimizer in self._members.values():
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _penalise(self) -> None:
        for weight in self._penalised:
            if weight.grad is not None:
                weight.grad.add_(weight, alpha=self._l2).add_(weight.sign(), alpha=self._l1)

    def state(self) -> dict[str, Tensor]:
        """`<optimizer>/<parameter>/<entry>` -> tensor."""
        return {
            f"{key}/{self._names[weight]}/{entry}": value
            for key, optimizer in self._members.items()
            for weight, entries in optimizer.state.items()
            for entry, value in entries.items()
            if isinstance(value, Tensor)  # SGD without momentum keeps a None
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state()` gave. Raises `CorruptArtifactError` for a tensor that belongs nowhere."""
        weights = {name: weight for weight, name in self._names.items()}
        for path, value in state.items():
            key, name, entry = path.split("/")
            if key not in self._members or name not in weights:
                raise CorruptArtifactError(f"the checkpoint's optimizer holds {path}, which this model does not have")
            weight = weights[name]
            # Adam keeps its step count as a float32 scalar on the weight's device.
            self._members[key].state[weight][entry] = value.to(weight.device)


def block_matrices(model: GPT) -> list[Tensor]:
    """What Muon is for."""
    return [weight for name, weight in model.named_parameters() if name.startswith("blocks") and weight.dim() == 2]


def _one_for_all(
    name: str, groups: Sequence[tuple[list[Tensor], float]], rate: float, config: OptimizerConfig
) -> Optimizer:  # fmt: skip
    """AdamW, Adam or SGD for groups of weights, each with its decay."""
    parameters: list[dict[str, Any]] = [{"params": weights, "weight_decay": decay} for weights, decay in groups if weights]
    if name == "sgd":
        return SGD(parameters, lr=rate, momentum=config.momentum, nesterov=config.momentum > 0.0, fused=True)
    kind = AdamW if name == "adamw" else Adam
    return kind(parameters, lr=rate, betas=config.betas, eps=config.epsilon, fused=True)


def named_gradients(model: GPT) -> Iterator[Tensor]:
    """The gradients that a backward pass left."""
    for weight in model.parameters():
        if weight.grad is not None:
            yield weight.grad


def clip(model: GPT, largest: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `largest`; returns the norm before, a scalar."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), largest, foreach=True)
