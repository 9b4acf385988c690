"""What this machine has to offer: memory that is free, and how fast it multiplies matrices."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from gptcore.training.energy import Meter, nvml, rapl
from gptcore.training.memory import memory_groups

_SIZE = 2048
"""Rows of the matrices, as in `gptcore bench train`."""


def free_memory(device: torch.device, processes: int) -> int:
    """Bytes that one of `processes` trainers may take: of its card, or its share of the machine. All are told the same."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = min(psutil.virtual_memory().available, *_rooms()) // processes
    if dist.is_initialized():
        least = torch.tensor(free, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        free = int(least)
    return free


def _rooms(root: Path = Path("/")) -> Iterator[int]:
    """Bytes left in every control group around this process; page cache goes when room is needed."""
    for version, folder in memory_groups(root):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
        limit, used = (_text(folder / name) for name in names)
        if limit.isdigit() and used.isdigit():
            cached = {f"{'total_' if version == 1 else ''}{kind}_file" for kind in ("inactive", "active")}
            rows = (line.split() for line in _text(folder / "memory.stat").splitlines())
            yield max(0, int(limit) - int(used) + sum(int(size) for name, size in rows if name in cached))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class Speed:
    """What the product of large matrices showed."""

    flops: float
    """Per second."""
    watts: float | None
    """Of the packages or cards at work, where they tell it."""


def matrix_speed(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Speed:
    """Multiply matrices for about `seconds`; the fastest product counts: a busy machine makes none faster."""
    a, b, out = (torch.randn(_SIZE, _SIZE, device=device).to(dtype) for _ in range(3))
    card = [f"GPU-{torch.cuda.get_device_properties(device).uuid}"] if device.type == "cuda" else []
    times: list[float] = []
    meter, started = None, time.perf_counter()
    while not times or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if meter is None:  # the first one chooses a kernel
            meter, started = Meter(nvml(card) if card else rapl()), time.perf_counter()
        else:
            times.append(time.perf_counter() - before)
    assert meter is not None
    joules = meter.joules()
    took = time.perf_counter() - started
    return Speed(2 * _SIZE**3 / min(times), None if joules is None else joules / took)
