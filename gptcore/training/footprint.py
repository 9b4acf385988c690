"""How much memory a training takes, before it starts: a step on the meta device, where tensors have shapes and no bytes.

    weights, their average, optimizer state    stay; what a checkpoint holds
    activations                                from where forward makes them to where backward has used them
    gradients                                  grow while backward goes through the blocks; stay between micro-batches
    working space                              what one operation needs for its moment

No activation is guessed by formula: the very model, loss and optimizer run on batches of the training's own layout, and every
storage is counted from the operation that makes it until nothing refers to it. A block takes what the block before took, and so
does a sequence: few are counted, the rest lies on a line. It is the eager step that is counted: a compiled one needs less.
"""

import bisect
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gptcore.config import ModelConfig, TrainingConfig
from gptcore.model import GPT
from gptcore.model.inputs import inputs
from gptcore.model.loss import LOGITS_AT_ONCE, mean_loss
from gptcore.tokens.objectives import Batch
from gptcore.training.optimizers import Optimizers, named_gradients
from gptcore.training.room import count_weights
from gptcore.training.step import exchanged_at_once

PROCESS = {"cpu": 340 << 20, "cuda": 600 << 20}
"""Bytes of a trainer without its tensors: Python, torch and its libraries; on a card CUDA's context and workspaces, assumed."""
_HOLES = {"cpu": 0.6, "cuda": 0.1}
"""Room between tensors that come and go, as a share of them. Measured with glibc, whose heap keeps what is below 32 MB: 0.4 to
0.9, of small models more (with every tensor in pages of its own there is none, and a step takes a fifth longer). Assumed for
torch's allocator on cards."""

Peaks = tuple[int, ...]
"""Bytes, one number per part of a step."""

_FUSED = {torch.ops.aten._fused_adam_, torch.ops.aten._fused_adamw_, torch.ops.aten._fused_sgd_}
"""Updates in place that hold nothing for their moment, and of which not all are made for the meta device."""
_BACK = 3
"""Which part of a step goes back through the blocks."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one trainer process, by what holds them."""

    process: int
    """Python, torch and its libraries; on a card CUDA's context."""
    kept: int
    """Weights, their average and the optimizer's state."""
    moment: int
    """Gradients, activations and working space, together at the fullest moment of a step."""
    holes: int
    """Between those of the moment: what the allocator cannot use again."""

    @property
    def training(self) -> int:
        """All but the process itself."""
        return self.kept + self.moment + self.holes

    @property
    def total(self) -> int:
        """At the fullest moment."""
        return self.process + self.training


@dataclass
class Footprint:
    """One process of a training."""

    config: ModelConfig
    vocabulary: int
    training: TrainingConfig
    batch_of: Callable[[int], Batch]
    """So many sequences, each as long as any."""
    device: str
    """"cpu" or "cuda"."""
    dtype: torch.dtype
    """What is computed in."""
    _counts: dict[tuple[int, int], Peaks] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        weights = count_weights(self.config, self.vocabulary)
        self.rows = self.training.batch // self.training.world
        """Sequences of a step."""
        self.length: int = self.batch_of(1).tokens.shape[1]
        """Tokens of one."""
        self._kept, self._gradients = weights.checkpoint_bytes(self.training), weights.model_bytes
        # With so many sequences there are as many logits as are ever held at once, and the rest grows evenly.
        self._even = max(1, -(-LOGITS_AT_ONCE // self.vocabulary // self.length))
        several = self.training.world > 1
        self._exchange = exchanged_at_once(list(self._model(self.config.layers).parameters())) if several else 0
        self._update = max(_along(self._updated, self.config.layers, 1))

    def at(self, rows: int) -> Memory:
        """With micro-batches of `rows` sequences."""
        before = self._gradients if rows < self.rows else 0  # those of the micro-batch before
        moment = max(
            max(self._peaks(self.config.layers, rows)) + before,  # where backward begins
            max(self._peaks(1, rows)[_BACK:]) + self._gradients,  # where it ends
            max(self._update, self._exchange) + self._gradients,
        )
        return Memory(PROCESS[self.device], self._kept, moment, round(_HOLES[self.device] * moment))

    def largest(self, most: int, there: int) -> int:
        """The largest micro-batch, at most `most` sequences, that fits into `there` bytes; 0: none does."""

        def need(rows: int) -> int:
            return self.at(rows).training

        return most if need(most) <= there else bisect.bisect_right(range(1, most), there, key=need)

    def _peaks(self, layers: int, rows: int) -> Peaks:
        kinds = len(self.config.windows)  # of blocks, which take turns
        return _along(lambda few: _along(lambda depth: self._counted(depth, few), layers, kinds), rows, self._even)

    def _counted(self, layers: int, rows: int) -> Peaks:
        """Most bytes in every part of a step, beside the weights and their gradients.

        The parts go through the blocks, through the head, back through the head, back through the blocks, back through the
        table. Each one's bytes lie on a line of their own; which of them is the highest depends on the size.
        """
        if (layers, rows) not in self._counts:
            model, training = self._model(layers), self.training
            for weight in model.parameters():
                weight.register_post_accumulate_grad_hook(_forget)  # type: ignore[no-untyped-call]
            with _On(self.device), _Live(model.parameters()) as live:
                last = model.blocks[-1] if model.norm is None else model.norm
                last.register_forward_hook(lambda _module, _inputs, out: live.part_ends(out, forward=True))
                model.embedding.register_forward_hook(lambda _module, _inputs, out: live.part_ends(out, forward=False))
                tokens, labels, layout = inputs(self.batch_of(rows), torch.device("meta"))
                loss = mean_loss(model, tokens, labels, 1.0, layout, smoothing=training.label_smoothing, z=training.z_loss)
                live.mark()
                loss.backward()  # type: ignore[no-untyped-call]
                live.mark()
            self._counts[layers, rows] = tuple(live.peaks)
        return self._counts[layers, rows]

    def _updated(self, layers: int) -> Peaks:
        """Most bytes that the optimizers hold for their moment."""
        model = self._model(layers)
        with _On(self.device):
            optimizers = Optimizers(model, self.training.optimizer)
            for _ in range(2):  # the first time the state is made
                for weight in model.parameters():
                    weight.grad = torch.zeros_like(weight)
                gradients = named_gradients(model)
                with _Live([*model.parameters(), *gradients, *optimizers.state().values()]) as live:
                    optimizers.step(1.0)
                    live.mark()
        return tuple(live.peaks)

    def _model(self, layers: int) -> GPT:
        model = GPT(self.config.model_copy(update={"layers": layers}), self.vocabulary, device="meta").train()
        model.compute_dtype = self.dtype
        return model


def _along(count: Callable[[int], Peaks], size: int, first: int) -> Peaks:
    """`count(size)`; above twice `first`, what the lines through `count(first)` and `count(2 first)` say."""
    if size <= 2 * first:
        return count(size)
    pairs = zip(count(first), count(2 * first), strict=True)
    return tuple(high + (size - 2 * first) * (high - low) // first for low, high in pairs)


def _forget(weight: Tensor) -> None:
    weight.grad = None


class _On(TorchFunctionMode):
    """Tensors of the meta device say that they are on another, so that a model goes the way that it goes there."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function == torch.Tensor.device.__get__:
            return self.device
        if kwargs.get("device") == self.device:
            kwargs = {**kwargs, "device": "meta"}
        fuses = function is F.scaled_dot_product_attention and self._has_kernel(args[0].dtype, **kwargs)
        return (_fused if fuses else function)(*args, **kwargs)

    def _has_kernel(self, dtype: torch.dtype, attn_mask: Tensor | None, enable_gqa: bool, **_: Any) -> bool:
        """Whether attention is fused: always but on cards, where groups of heads have a kernel in bfloat16 without a mask."""
        return self.device.type == "cpu" or not enable_gqa or (attn_mask is None and dtype == torch.bfloat16)


def _fused(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, is_causal: bool, **_: Any) -> Tensor:
    """What the meta device has no kernel for: whatever the device, it keeps these inputs, the output and a number per query."""
    seen = None if attn_mask is None else torch.zeros_like(attn_mask, dtype=q.dtype)  # is added to the scores
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=seen)[0]
    return out


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations make, while they live."""

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        """What is `there` already is not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peaks: list[int] = []
        """Most bytes up to each mark, since the one before."""
        self._now = self._most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def mark(self) -> None:
        """A part of the step ends here."""
        self.peaks.append(self._most)
        self._most = self._now

    def part_ends(self, out: Tensor, *, forward: bool) -> None:
        """Mark when the gradient of `out` is there and, if `forward`, now."""
        if forward:
            self.mark()
        out.register_hook(lambda _: self.mark())  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.nonzero.default:  # what is learned from, in a shape unknown without numbers: all of it
            made = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        elif function.overloadpacket in _FUSED:
            return None
        else:
            made = function(*args, **(kwargs or {}))
        for part in made if isinstance(made, list | tuple) else (made,):
            if isinstance(part, Tensor):
                self._add(part.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._now += size
        self._most = max(self._most, self._now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
