"""Weights in fewer bits than training has, for inference.

Eight bits: a whole number from -127 to 127 and one scale for each row, so a product reads a quarter of the bytes. Every matrix
that meets an activation is stored so, the table of tokens included; norms, biases and positions stay as they are. Activations
keep their precision (weight-only, per channel, symmetric: Dettmers et al. 2022, section 2.1, without the outliers).

Half precision: what CPUs without bfloat16 are fastest with. Weights are packed as float16 and become float32 inside of the
product (FBGEMM: Khudia et al. 2021), so activations and sums are those of float32.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.model.transformer import GPT, Attention, Linear, SwiGLU

INT8 = "int8"
_HALF_MAX = torch.finfo(torch.float16).max


class Int8Linear(nn.Module):
    """x W^T + b, where row i of W is `scale[i] * weight[i]`; the weights become floats for every product."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype).unsqueeze(1), bias)


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


# ---------------------------------------------------------------------------------------------- packed, for CPUs --


class PackedLinear(nn.Module):
    """A layer whose weights are in the order that FBGEMM reads them in; inference only."""

    nbytes: int
    """Bytes of its weights."""


class HalfLinear(PackedLinear):
    """x W^T + b with W in float16; x, b and the sums are float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach().float().clamp(-_HALF_MAX, _HALF_MAX)
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, None if bias is None else bias.detach().float())
        self.nbytes = 2 * weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return product


class PackedInt8Linear(PackedLinear):
    """`Int8Linear` as a product of whole numbers.

    FBGEMM multiplies seven bits of x by eight of W. So every row of x becomes two: its value over `step` in whole numbers up to
    63, and what that leaves out, 126 times larger. Fourteen bits of the largest are more than bfloat16 keeps of it; sums are
    exact, and so a row comes out the same whatever stands beside it.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        zeros = torch.zeros(len(scale), dtype=torch.int64, device="cpu")
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of its age; torch is pinned
            whole = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(whole, None)
        self.bias = bias if bias is None else bias.detach().float()
        self.nbytes = weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        x, dtype = x.float(), x.dtype
        step = torch.addcdiv(_TINY, x.abs().amax(-1, keepdim=True), _MOST)  # (…, 1), never 0
        parts = x / step
        parts = torch.stack((parts, (parts - parts.round()) * _FINER))  # (2, …, in), within -63 and 63
        sums = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(parts, 1.0, 64, self.packed)
        coarse, fine = sums.unbind()
        product = torch.addcdiv(coarse, fine, _FINER)  # (…, out)
        return (product * step if self.bias is None else torch.addcmul(self.bias, product, step)).to(dtype)


# Tensors, because a number of Python's would become one for every product.
_MOST = torch.tensor(63.0, device="cpu")
_FINER = torch.tensor(126.0, device="cpu")
_TINY = torch.tensor(torch.finfo(torch.float32).tiny, device="cpu")


class HalfEmbedding(nn.Module):
    """Rows of a table in float16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clamp(-_HALF_MAX, _HALF_MAX).half(), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (…) -> rows (…, D), float32."""
        return F.embedding(ids, self.weight).float()


def packs() -> bool:
    """Whether this machine's CPU has the products of packed weights."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def pack(model: GPT) -> GPT:
    """The same model with packed matrices, in place; for inference on CPUs only, and it cannot be saved.

    Weights in eight bits stay so, others become float16. What reads the same activations becomes one product.
    """
    for module in list(model.modules()):
        if isinstance(module, Attention):
            module.joint = _joined(module.query, module.key, module.value)
            del module.query, module.key, module.value  # and their weights
        elif isinstance(module, SwiGLU):
            module.joint = _joined(module.gate, module.up)
            del module.gate, module.up
    if model.head is None:
        model.head = HalfLinear(model.embedding.weight, None)  # type: ignore[assignment]
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear | Int8Linear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, _joined(module))
    if isinstance(model.embedding, nn.Embedding):
        model.embedding = HalfEmbedding(model.embedding.weight)  # type: ignore[assignment]
    return model


def _joined(*layers: nn.Module) -> PackedLinear:
    """Layers that read the same, side by side."""

    def together(name: str) -> Tensor | None:
        parts = [getattr(layer, name) for layer in layers]
        return None if parts[0] is None else torch.cat(parts).detach()

    weight, bias = together("weight"), together("bias")
    assert weight is not None
    if isinstance(layers[0], Linear):
        return HalfLinear(weight, bias)
    scale = together("scale")
    assert scale is not None
    return PackedInt8Linear(weight, scale, bias)


def weight_bytes(model: GPT) -> int:
    """Bytes of all weights; those that two parts share count once."""
    packed = sum(module.nbytes for module in model.modules() if isinstance(module, PackedLinear))
    return packed + sum(weight.nbytes for weight in model.parameters())
