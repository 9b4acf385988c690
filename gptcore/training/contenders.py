"""Who takes turns in `gptcore bench train`: this engine, transformers, and the matrix product of the machine."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptcore.config import OptimizerConfig
from gptcore.errors import TrainingError
from gptcore.model import GPT
from gptcore.model.folder import default_dtype, pick_device
from gptcore.model.inputs import Inputs
from gptcore.model.loss import mean_loss
from gptcore.training.answers import compiled, deterministic
from gptcore.training.bench import _MATRIX, BenchConfig
from gptcore.training.budget import dtype_of, precision_for, seconds_of
from gptcore.training.optimizers import Optimizers
from gptcore.training.step import LossFunction, update
from gptcore.turns import Contender


def make(name: str, config: BenchConfig) -> Contender:
    """The contender of this name."""
    makers: dict[str, Callable[[BenchConfig], Contender]] = {
        "ours": Ours, "muon": Muon, "peer": Transformers, "matrix": Matrix,
    }  # fmt: skip
    return makers[name](config)


def _dtype(config: BenchConfig) -> torch.dtype:
    return dtype_of(precision_for(config.training.precision, pick_device(config.training.device)))


def _tokens(config: BenchConfig, extra: int = 0) -> Tensor:
    """(B, T + extra) of random ids, always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.training.batch, config.model.context + extra)
    return torch.randint(config.vocabulary, shape, generator=generator, device="cpu").to(pick_device(config.training.device))


def _finish(device: torch.device) -> None:
    """Wait until a card has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Ours:
    """A step of the training loop."""

    def __init__(self, config: BenchConfig) -> None:
        training, dtype = config.training, _dtype(config)
        self.device = pick_device(training.device)
        torch.set_float32_matmul_precision("high")
        self.model = GPT(config.model, config.vocabulary, device=self.device).initialise(training.seed).train()
        self.model.compute_dtype = dtype
        self.optimizers, self.clip = Optimizers(self.model, training.optimizer), training.optimizer.clip
        tokens = _tokens(config, 1)
        self.parts = [Inputs(tokens[:, :-1], tokens[:, 1:])]
        self.count = float(self.parts[0].labels.numel())
        tried = {"auto": (True, False), True: (True,), False: (False,)}[training.compile]
        self.loss, how = self._best(tried)
        self.setting = f"{str(dtype).removeprefix('torch.')}, {how}, {training.optimizer.algorithm}, {_threads(self.device)}"

    def _best(self, settings: tuple[bool, ...]) -> tuple[LossFunction, str]:
        """The faster one, as a run that is long enough would choose it."""
        tried = []
        for wanted in sorted(settings):
            self.loss = compiled(mean_loss, self.device) if wanted else mean_loss
            name = "compiled" if wanted else "eager"
            try:
                self.step()
                tried.append((seconds_of(lambda _: self.step(), 3), self.loss, name))
            except Exception as error:
                warnings.warn(f"{name}: {error}", stacklevel=1)
        _, loss, name = min(tried, key=lambda entry: entry[0])
        if name == "eager":
            deterministic(False)
        return loss, name

    def step(self) -> None:
        """Forward, backward, update."""
        update(self.model, self.loss, self.optimizers, self.parts, self.count, share=1.0, clip_to=self.clip)
        _finish(self.device)


class Muon(Ours):
    """The same with the default optimizer."""

    def __init__(self, config: BenchConfig) -> None:
        training = config.training.model_copy(update={"optimizer": OptimizerConfig()})
        super().__init__(config.model_copy(update={"training": training}))


class Transformers:
    """`GPT2LMHeadModel` with AdamW, at whichever of its settings is the fastest here."""

    def __init__(self, config: BenchConfig) -> None:
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError as error:
            raise TrainingError("the peer of this benchmark is not installed: pip install transformers") from error
        model, self.device = config.model, pick_device(config.training.device)
        shape = GPT2Config(
            vocab_size=config.vocabulary, n_positions=model.context, n_embd=model.width, n_layer=model.layers,
            n_head=model.heads, n_inner=model.inner_width, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        self.tokens, self.clip = _tokens(config), config.training.optimizer.clip
        self.model = GPT2LMHeadModel(shape).to(self.device).train()  # type: ignore[arg-type]
        optimizer = config.training.optimizer.suited(model.width)
        assert optimizer.rate is not None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=optimizer.rate, betas=optimizer.betas, weight_decay=optimizer.weight_decay, fused=True
        )
        native = default_dtype(self.device) == torch.bfloat16
        dtypes = [torch.bfloat16] if native else [torch.float32]
        self.dtype, self.run = self._best([(dtype, compiled) for dtype in dtypes for compiled in (True, False)])

    def _best(self, settings: list[tuple[torch.dtype, bool]]) -> tuple[torch.dtype, Callable[..., Any]]:
        tried = []
        for dtype, wanted in settings:
            self.dtype, self.run = dtype, torch.compile(self.model) if wanted else self.model
            name = f"{str(dtype).removeprefix('torch.')}{' autocast' if dtype != torch.float32 else ''}, "
            name += f"{'compiled' if wanted else 'eager'}, adamw, {_threads(self.device)}"
            try:
                self.step()
                tried.append((seconds_of(lambda _: self.step(), 3), name, self.dtype, self.run))
            except Exception as error:
                warnings.warn(f"{name}: {error}", stacklevel=1)
        _, self.setting, dtype, run = min(tried, key=lambda entry: entry[0])
        return dtype, run

    def step(self) -> None:
        """Forward, backward, update."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.run(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        _finish(self.device)


class Matrix:
    """A product of square matrices in the type that ours computes in."""

    def __init__(self, config: BenchConfig) -> None:
        self.device, dtype = pick_device(config.training.device), _dtype(config)
        self.a, self.b, self.out = (torch.randn(_MATRIX, _MATRIX, device=self.device).to(dtype) for _ in range(3))
        self.setting = f"{_MATRIX} x {_MATRIX} in {str(dtype).removeprefix('torch.')}, {_threads(self.device)}"

    def step(self) -> None:
        """One product."""
        torch.mm(self.a, self.b, out=self.out)
        _finish(self.device)


def _threads(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
