"""Muon for the matrices of the blocks, AdamW for everything else; their state as plain named tensors."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from gptcore.config import OptimizerConfig
from gptcore.errors import CorruptArtifactError
from gptcore.model import GPT


class Optimizers:
    """Both optimizers as one. State has names, so that it can be stored without pickle."""

    def __init__(self, model: GPT, config: OptimizerConfig) -> None:
        named = dict(model.named_parameters())
        matrices = {name: weight for name, weight in named.items() if name.startswith("blocks") and weight.dim() == 2}
        tables = {name: weight for name, weight in named.items() if weight.dim() == 2 and name not in matrices}
        vectors = {name: weight for name, weight in named.items() if weight.dim() == 1}
        muon = Muon(
            matrices.values(), lr=config.matrix_rate, weight_decay=config.weight_decay, momentum=config.momentum,
            adjust_lr_fn="original",
        )  # fmt: skip
        groups = [
            {"params": list(tables.values()), "weight_decay": config.weight_decay},
            {"params": list(vectors.values()), "weight_decay": 0.0},
        ]
        adamw = AdamW(
            [group for group in groups if group["params"]],
            lr=config.rate, betas=config.betas, eps=config.epsilon, fused=True,
        )  # fmt: skip
        self._members: dict[str, Optimizer] = {"muon": muon, "adamw": adamw}
        self._peaks = {"muon": config.matrix_rate, "adamw": config.rate}
        self._names: dict[Tensor, str] = {weight: name for name, weight in named.items()}

    def step(self, share: float) -> None:
        """One update at `share` of the peak rates; gradients are freed."""
        for key, optimizer in self._members.items():
            for group in optimizer.param_groups:
                group["lr"] = self._peaks[key] * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """`<optimizer>/<parameter>/<entry>` -> tensor."""
        return {
            f"{key}/{self._names[weight]}/{entry}": value
            for key, optimizer in self._members.items()
            for weight, entries in optimizer.state.items()
            for entry, value in entries.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state()` gave. Raises `CorruptArtifactError` for a tensor that belongs nowhere."""
        weights = {name: weight for weight, name in self._names.items()}
        for path, value in state.items():
            key, name, entry = path.split("/")
            if key not in self._members or name not in weights:
                raise CorruptArtifactError(f"the checkpoint's optimizer holds {path}, which this model does not have")
            weight = weights[name]
            # AdamW keeps its step count as a float32 scalar on the weight's device.
            self._members[key].state[weight][entry] = value.to(weight.device)


def named_gradients(model: GPT) -> Iterator[Tensor]:
    """The gradients that a backward pass left."""
    for weight in model.parameters():
        if weight.grad is not None:
            yield weight.grad


def clip(model: GPT, largest: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `largest`; returns the norm before, a scalar."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), largest, foreach=True)
