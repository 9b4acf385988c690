"""Who takes turns in `gptcore bench generate`: this engine, transformers, and the machine's memory."""

import gc
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from gptcore.inference.bench import BenchConfig
from gptcore.inference.generate import generate
from gptcore.model import GPT
from gptcore.model.folder import default_dtype, fastest_dtype, pick_device, ready
from gptcore.model.huggingface import export_model
from gptcore.model.quantisation import quantise
from gptcore.turns import Contender

_READ = 1 << 30


def make(name: str, config: BenchConfig) -> Contender:
    """The contender of this name."""
    who, _, batch = name.partition("-")
    if who == "read":
        return Read()
    makers: dict[str, Callable[[BenchConfig, int], Contender]] = {"ours": Ours, "int8": Int8, "peer": Transformers}
    return makers[who](config, int(batch))


def _prompts(config: BenchConfig, batch: int) -> Tensor:
    """(B, prompt) of random ids, always the same."""
    return torch.randint(config.vocabulary, (batch, config.prompt), generator=torch.Generator().manual_seed(0), device="cpu")


def _first(work: Callable[[int], object]) -> float:
    """Seconds to the first token, the middle one of three."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work(1)
        times.append(time.perf_counter() - started)
    return sorted(times)[1]


def _held() -> float:
    """What this process holds once its model is loaded and has spoken, in MB; on a card, the most that it held there."""
    gc.collect()
    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else psutil.Process().memory_info().rss / 1e6


class Ours:
    """`gptcore.inference.generate`, greedy."""

    bytes_per_weight: int | None = None
    """Unset: those of the type."""

    def __init__(self, config: BenchConfig, batch: int) -> None:
        device = pick_device("auto")
        model = GPT(config.model, config.vocabulary, device=device).initialise(0)
        dtype = fastest_dtype(model) if config.precision == "auto" else getattr(torch, config.precision)
        self.model = ready(self.prepared(model), dtype)
        self.new, self.prompts = config.new_tokens, _prompts(config, batch).tolist()
        kind = {torch.float16: "float16 weights", torch.bfloat16: "bfloat16", torch.float32: "float32"}[dtype]
        self.setting = f"{'int8 weights' if self.bytes_per_weight == 1 else kind}, {torch.get_num_threads()} threads"
        self.facts = {
            "bytes_per_weight": self.bytes_per_weight or dtype.itemsize,
            "first_token_seconds": _first(self.work),
            "memory_mb": _held(),
        }

    def prepared(self, model: GPT) -> GPT:
        """As it is measured."""
        return model

    def work(self, new: int) -> object:
        """Continue the prompts by so many tokens."""
        return generate(self.model, self.prompts, max_new_tokens=new)

    def step(self) -> None:
        """One continuation."""
        self.work(self.new)


class Int8(Ours):
    """The same with weights in eight bits."""

    bytes_per_weight = 1

    def prepared(self, model: GPT) -> GPT:
        """Quantised."""
        return quantise(model)


class Transformers:
    """`generate` of transformers with the same weights, at whichever of its settings is the fastest here."""

    def __init__(self, config: BenchConfig, batch: int) -> None:
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        device, self.new = pick_device("auto"), config.new_tokens
        with tempfile.TemporaryDirectory() as folder:
            export_model(GPT(config.model, config.vocabulary, device="cpu").initialise(0), Path(folder))
            load: Any = transformers.AutoModelForCausalLM.from_pretrained
            # Where the hardware has no bfloat16, its GPT-2 is five times slower in it, and in float16.
            native = default_dtype(device) == torch.bfloat16
            dtypes = [torch.bfloat16, torch.float32] if native else [torch.float32]
            models: dict[torch.dtype, Any] = {dtype: load(folder, dtype=dtype).to(device) for dtype in dtypes}
        self.prompts = _prompts(config, batch).to(device)
        tried = []
        for dtype in dtypes:
            for cache in (None, "static"):
                self.model, self.cache = models[dtype], cache
                if cache is not None:  # which is what can be compiled
                    self.model.forward = torch.compile(self.model.forward)
                name = f"{str(dtype).removeprefix('torch.')}, {'eager' if cache is None else 'compiled, static cache'}"
                try:
                    tried.append((self._seconds(), name, dtype, cache, self.model.forward))
                except Exception as error:
                    warnings.warn(f"{name}: {error}", stacklevel=1)
        _, name, dtype, self.cache, forward = min(tried, key=lambda entry: entry[0])
        self.model = models[dtype]
        self.model.forward = forward
        del models, tried  # of memory the chosen one counts
        self.setting = f"{name}, {torch.get_num_threads()} threads"
        self.facts = {"bytes_per_weight": dtype.itemsize, "first_token_seconds": _first(self.work), "memory_mb": _held()}

    def _seconds(self) -> float:
        self.work(min(16, self.new))
        started = time.perf_counter()
        self.work(min(16, self.new))
        return time.perf_counter() - started

    def work(self, new: int) -> Any:
        """Continue the prompts by so many tokens."""
        return self.model.generate(
            self.prompts, attention_mask=torch.ones_like(self.prompts), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            cache_implementation=self.cache, pad_token_id=0,
        )  # fmt: skip

    def step(self) -> None:
        """One continuation."""
        self.work(self.new)


class Read:
    """A sum over more memory than any cache holds."""

    def __init__(self) -> None:
        self.numbers = torch.ones(_READ // 4, dtype=torch.float32, device=pick_device("auto"))
        self.setting = f"the sum of {_READ >> 20} MiB, {torch.get_num_threads()} threads"
        self.facts = {"bytes": float(_READ)}

    def step(self) -> None:
        """One reading."""
        self.numbers.sum().item()
