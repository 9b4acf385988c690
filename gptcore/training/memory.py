"""How much memory a training takes, before it starts: a step on the meta device, where tensors have shapes and no bytes.

    weights, their average, optimizer state    stay; what a checkpoint holds
    activations                                from where forward makes them to where backward has used them
    gradients                                  grow while backward goes through the blocks; stay between micro-batches
    working space                              what one operation needs for its moment

No activation is guessed by formula: the very model, loss and optimizer run, and every storage is counted from the operation
that makes it until nothing refers to it. A block takes what the block before took, and so does a sequence: few are counted, the
rest lies on a line. It is the eager step that is counted: a compiled one needs less.
"""

import bisect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptcore.config import ModelConfig, TrainingConfig
from gptcore.model import GPT
from gptcore.model.loss import LOGITS_AT_ONCE, mean_loss
from gptcore.model.transformer import Attention, attend_plainly, is_plain
from gptcore.training.muon import Muon
from gptcore.training.optimizers import block_matrices
from gptcore.training.room import count_weights

PROCESS = {"cpu": 300 << 20, "cuda": 600 << 20}
"""Bytes of a trainer without its tensors: Python, torch and its libraries; on a card CUDA's context and workspaces."""
_HOLES = {"cpu": 0.45, "cuda": 0.1}
"""Room between tensors that come and go, as a share of them. Measured with glibc, whose heap keeps what is below 32 MB: 0.3 to
0.7 (every tensor in pages of its own leaves none and takes a fifth longer). Assumed for torch's allocator on cards."""


Peaks = tuple[int, ...]
"""Bytes, one number per part of a step."""


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


class Footprint:
    """A training on the meta device, standing for one on `device` ("cpu" or "cuda") that computes in `dtype`."""

    def __init__(
        self, config: ModelConfig, vocabulary: int, training: TrainingConfig, device: str, dtype: torch.dtype
    ) -> None:  # fmt: skip
        self.config, self.vocabulary, self.training, self.device, self.dtype = config, vocabulary, training, device, dtype
        weights = count_weights(config, vocabulary)
        self._kept, self._gradients = weights.checkpoint_bytes(training), weights.model_bytes
        # With so many sequences there are as many logits as are ever held at once, and the rest grows evenly.
        self._even = max(1, -(-LOGITS_AT_ONCE // vocabulary // config.context))
        self._models: dict[int, GPT] = {}
        self._counts: dict[tuple[int, int], Peaks] = {}
        self._update = max(_along(self._updated, config.layers, 1)) if training.optimizer.algorithm == "muon" else 0

    def at(self, rows: int, *, repeated: bool = False) -> Memory:
        """With micro-batches of `rows` sequences; `repeated`: a step has several, so gradients are there from the second on."""
        moment = max(
            max(self._peaks(self.config.layers, rows)) + (self._gradients if repeated else 0),  # where backward begins
            max(self._peaks(1, rows)[-2:]) + self._gradients,  # where it ends
            self._update + self._gradients,
        )
        return Memory(PROCESS[self.device], self._kept, moment, round(_HOLES[self.device] * moment))

    def largest(self, rows: int, per_step: int, there: int) -> int:
        """The largest micro-batch, at most `rows` of the `per_step` sequences, that fits into `there` bytes; 0: none does."""

        def need(few: int) -> int:
            return self.at(few, repeated=few < per_step).training

        return rows if need(rows) <= there else bisect.bisect_right(range(1, rows), there, key=need)

    def _peaks(self, layers: int, rows: int) -> Peaks:
        return _along(lambda few: _along(lambda depth: self._counted(depth, few), layers, 1), rows, self._even)

    def _counted(self, layers: int, rows: int) -> Peaks:
        """Most bytes in every part of a step, without gradients of weights: blocks, head, and back through head, blocks, table.

        Each part's lies on a line of its own; which of them is the highest depends on the size.
        """
        if (layers, rows) not in self._counts:
            model, training = self._model(layers), self.training
            tokens = torch.zeros(rows, self.config.context, dtype=torch.long, device="meta")
            with _Live() as live:
                hooks = [
                    module.register_forward_hook(lambda _module, _inputs, out, forward=forward: live.watch(out, forward))
                    for module, forward in ((model.norm, True), (model.embedding, False))
                ]
                loss = mean_loss(model, tokens, tokens, 1.0, smoothing=training.label_smoothing, z=training.z_loss)
                live.mark()
                loss.backward()  # type: ignore[no-untyped-call]
                live.mark()
            for hook in hooks:
                hook.remove()
            self._counts[layers, rows] = tuple(peak + 2 * tokens.nbytes for peak in live.peaks)
        return self._counts[layers, rows]

    def _updated(self, layers: int) -> Peaks:
        """Most bytes that Muon holds for its moment. The others are fused and hold nothing."""
        matrices = block_matrices(self._model(layers))
        for weight in matrices:
            weight.grad = torch.zeros_like(weight)
        optimizer = Muon(matrices, lr=1.0, weight_decay=0.0, momentum=0.9, dtype=self.dtype)
        optimizer.step()  # makes its state
        with _Live() as live:
            optimizer.step()
            live.mark()
        optimizer.zero_grad()
        return tuple(live.peaks)

    def _model(self, layers: int) -> GPT:
        if layers not in self._models:
            model = GPT(self.config.model_copy(update={"layers": layers}), self.vocabulary, device="meta").train()
            model.compute_dtype = self.dtype
            for module in model.modules():
                if isinstance(module, Attention):
                    module.attend = _attention_on(self.device)
            for weight in model.parameters():
                weight.register_post_accumulate_grad_hook(_forget)  # type: ignore[no-untyped-call]
            self._models[layers] = model
        return self._models[layers]


def _along(count: Callable[[int], Peaks], size: int, first: int) -> Peaks:
    """`count(size)`; above twice `first`, what the lines through `count(first)` and `count(2 first)` say."""
    if size <= 2 * first:
        return count(size)
    pairs = zip(count(first), count(2 * first), strict=True)
    return tuple(high + (size - 2 * first) * (high - low) // first for low, high in pairs)


def _forget(weight: Tensor) -> None:
    weight.grad = None


def _attention_on(device: str) -> Callable[..., Tensor]:
    """What `attend` does on this kind of device, for shapes alone."""

    def attend(q: Tensor, k: Tensor, v: Tensor, _mask: None = None) -> Tensor:
        if is_plain(device, q.shape[2]):
            return attend_plainly(q, k, v)
        # Whatever fused kernel a device has, it keeps these inputs, the output and a number per query.
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]
        return out

    return attend


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peaks: list[int] = []
        """Most bytes up to each mark, since the one before."""
        self._now = self._most = 0
        self._known: set[int] = set()

    def mark(self) -> None:
        """A part of the step ends here."""
        self.peaks.append(self._most)
        self._most = self._now

    def watch(self, out: Tensor, forward: bool) -> None:
        """Mark when the gradient of `out` is there, and now, if `forward` ends a part, too."""
        if forward:
            self.mark()
        out.register_hook(lambda _: self.mark())  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
