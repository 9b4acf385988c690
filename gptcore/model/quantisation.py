"""Weights in eight bits: a whole number from -127 to 127 and one scale for each row, so a product reads a quarter of the bytes.

Every matrix that meets an activation is stored so, the table of tokens included; norms, biases and positions stay as they are.
Activations are not quantised (weight-only, per channel, symmetric: Dettmers et al. 2022, section 2.1, without the outliers).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.model.transformer import GPT, Linear

INT8 = "int8"
_FEW = 32
"""Rows up to which the product reads the bytes as they are; above, making floats of them once is cheaper."""


class Int8Linear(nn.Module):
    """x W^T + b, where row i of W is `scale[i] * weight[i]`."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] > _FEW or x.dtype == torch.float64 or x.device.type == "meta":
            return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype).unsqueeze(1), bias)
        product: Tensor = torch._weight_int8pack_mm(rows, self.weight, self.scale.to(x.dtype))
        product = product.view(*x.shape[:-1], -1)
        return product if bias is None else product + bias


class Int8Embedding(nn.Module):
    """Rows `scale[i] * weight[i]`."""

    def __init__(self, weight: nn.Parameter, scale: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.scale = weight, scale

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (…) -> rows (…, D), float32."""
        return self.weight[ids].float() * self.scale[ids].float().unsqueeze(-1)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> int8 of the same shape and a scale (out): the largest of each row becomes 127, ties go to even."""
    scale = weight.detach().float().abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    return torch.round(weight.detach().float() / scale.unsqueeze(1)).to(torch.int8), scale


def quantise(model: GPT) -> GPT:
    """The same model with int8 matrices, in place; for inference only. A tied head and its table share their bytes."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, Int8Linear(*rounded(module.weight), module.bias))
    table = Int8Linear(*rounded(model.embedding.weight), None)
    model.embedding = Int8Embedding(table.weight, table.scale)  # type: ignore[assignment]
    if model.head is None:
        model.head = table  # type: ignore[assignment]
    return model


def quantised_empty(model: GPT, device: torch.device | str) -> GPT:
    """A model on the meta device -> its quantised form on `device`, not yet filled."""
    quantise(model).to_empty(device=device)
    if model.config.tied:
        assert isinstance(model.head, Int8Linear)
        model.head.weight, model.head.scale = model.embedding.weight, model.embedding.scale  # moving made two of them
    return model


def weight_bytes(model: GPT) -> int:
    """Bytes of all weights; those that two parts share count once."""
    return sum(weight.nbytes for weight in model.parameters())
