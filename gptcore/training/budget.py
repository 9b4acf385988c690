"""What the settings leave open is decided here, before step 1: device, precision, threads, micro-batch, compile, steps."""

import math
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gptcore.config import ModelConfig, TrainingConfig
from gptcore.errors import TrainingError
from gptcore.model.folder import default_dtype, pick_device
from gptcore.room import amount
from gptcore.tokens.batches import Batches
from gptcore.training.job import Resolved
from gptcore.training.machine import free_memory
from gptcore.training.memory import Footprint, Memory

TOKENS_AT_ONCE = {"cpu": 8192, "cuda": 65_536}
"""Largest micro-batch in tokens: more are not faster."""
ROOM = 0.9
"""Share of the free memory that a training may be predicted to take."""
EVALUATION_SHARE = 0.1
"""Most that evaluations may have of a budget in minutes."""
_WORTH_A_TRY = {"cpu": 1200.0, "cuda": 180.0}
"""Seconds of training from which both ways are tried: compiling the quickstart's model took 20 s on two cores, 2 % of that."""
_GAIN = 0.98
"""A compiled step has to take at most this share of an eager one."""


def resolve(training: TrainingConfig, model: ModelConfig, vocabulary: int, batches: Batches) -> Resolved:
    """All answers but those that need a measurement: with a budget in minutes, `steps` is still 0.

    Raises `TrainingError` when the processes do not divide the batch or not one sequence fits into memory.
    """
    device = pick_device(training.device)
    dtype = dtype_on(device, training)
    cores = len(os.sched_getaffinity(0))
    rows = rows_of_a_process(training)
    micro_batch, memory = _fit(training, model, vocabulary, rows, device, dtype)
    steps = training.steps or 0
    if training.tokens is not None:
        steps = math.ceil(training.tokens / batches.tokens_per_step)
    return Resolved(
        steps=steps,
        batch=training.batch,
        micro_batch=micro_batch,
        processes=training.processes,
        threads=training.threads or max(1, cores // training.processes),
        device="cuda" if device.type == "cuda" else "cpu",
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        precision="bfloat16" if dtype == torch.bfloat16 else "float32",
        compiled=False,
        compile_reason="not asked for" if training.compile is False else "",
        seed=training.seed,
        tokens_per_step=batches.tokens_per_step,
        tokens_per_second=None,
        evaluate_every=0,
        torch=torch.__version__,
        memory_mb=memory.total >> 20,
    )


def dtype_on(device: torch.device, training: TrainingConfig) -> torch.dtype:
    """What a training computes in."""
    return {"auto": default_dtype(device), "float32": torch.float32, "bfloat16": torch.bfloat16}[training.precision]


def rows_of_a_process(training: TrainingConfig) -> int:
    """Sequences that one process has of a batch. Raises `TrainingError` when they do not all have as many."""
    if training.batch % training.processes:
        raise TrainingError(
            f"processes ({training.processes}) do not divide batch ({training.batch}): change one of them, "
            "so that every process has as many rows"
        )
    return training.batch // training.processes


def _fit(
    training: TrainingConfig, model: ModelConfig, vocabulary: int, rows: int, device: torch.device, dtype: torch.dtype
) -> tuple[int, Memory]:  # fmt: skip
    """The micro-batch that was asked for, or else the largest that fits, and the memory it takes; `rows` are a step's."""
    footprint = Footprint(model, vocabulary, training, device.type, dtype)
    micro_batch = training.micro_batch and min(rows, training.micro_batch)
    if micro_batch is None:
        there = int(ROOM * free_memory(device, training.processes))
        micro_batch = footprint.largest(most_rows(device.type, model.context, rows), rows, there)
        if micro_batch == 0:
            need = footprint.at(1, repeated=rows > 1).training
            raise TrainingError(
                f"training this model takes {amount(need)} of memory with one sequence of {model.context} tokens at a time "
                f"and {amount(there)} are there for it: lower model.context, model.width or model.layers, free some memory, or "
                "set training.micro_batch=1 to try it all the same"
            )
    return micro_batch, footprint.at(micro_batch, repeated=micro_batch < rows)


def most_rows(device: str, context: int, rows: int) -> int:
    """The largest micro-batch that is worth it, of a step with `rows` sequences."""
    return min(rows, max(1, TOKENS_AT_ONCE[device] // context))


def follow_here(answers: Resolved) -> tuple[Resolved, list[str]]:
    """The answers of another day or machine, as far as this one can follow them, and in words what is not the same here.

    Without such words equal answers give equal bits on a CPU.
    """
    changed: dict[str, object] = {}
    missing = []
    if answers.device == "cuda" and not torch.cuda.is_available():
        missing.append(f"it was trained on {answers.device_name}, and torch sees no NVIDIA card here, so the CPU trains")
        changed = {"device": "cpu", "device_name": processor()}
    elif (here := torch.cuda.get_device_name() if answers.device == "cuda" else processor()) != answers.device_name:
        missing.append(f"it was trained on {answers.device_name}, this is {here}")
        if answers.precision == "bfloat16" and default_dtype(torch.device(answers.device)) != torch.bfloat16:
            missing.append("it was trained in bfloat16, which this machine has to emulate")
    cores = len(os.sched_getaffinity(0))
    if answers.device == "cpu" and answers.threads * answers.processes > cores:
        missing.append(
            f"it was trained with {answers.threads} thread(s) in {answers.processes} process(es), here are {cores} cores"
        )
    if answers.torch != torch.__version__:
        missing.append(f"it was trained with torch {answers.torch}, this is {torch.__version__}")
    if answers.compiled and (reason := _missing_toolchain(str(changed.get("device", answers.device)))) is not None:
        missing.append(f"it was compiled, which is not possible here: {reason}")
        changed |= {"compiled": False, "compile_reason": f"eager, because {reason}"}
    return answers.model_copy(update=changed), missing


def decide_compile(wanted: bool | str, device: str, seconds: float | None) -> tuple[bool, str]:
    """Whether to compile a run of about `seconds` (None: unknown), or with "auto" to try it, and why in words."""
    if wanted is False:
        return False, "not asked for"
    if (missing := _missing_toolchain(device)) is not None:
        return False, f"eager, because {missing}"
    if wanted is True:
        return True, "asked for"
    if seconds is None or seconds < _WORTH_A_TRY[device]:
        return False, f"eager, because a run of less than {_WORTH_A_TRY[device]:.0f} s does not pay for trying to compile"
    return True, "the run is long enough to try it"


def pays(eager: float, compiled: float) -> tuple[bool, str]:
    """Whether a compiled step is enough faster than an eager one, both in seconds, and why in words."""
    if compiled > _GAIN * eager:
        return False, f"eager, because compiled is not faster here ({compiled:.3f} s a step against {eager:.3f})"
    return True, f"compiled, {eager / compiled:.2f} times as fast as eager"


def steps_in(seconds: float, step: float, evaluation: float, evaluations: int) -> tuple[int, int]:
    """Steps that fit into `seconds` when a step and an evaluation take that long, and evaluations.

    At most a tenth of the time goes to evaluations; where they are dearer, there are fewer of them.
    """
    affordable = max(1, min(evaluations, int(EVALUATION_SHARE * seconds / evaluation)))
    return max(1, int((seconds - affordable * evaluation) / step)), affordable


def seconds_of(work: Callable[[int], object], repeat: int) -> float:
    """Median seconds of `work(i)`; the first third of the calls, in which kernels are chosen, is left out."""
    times = []
    warm = repeat // 2
    for index in range(repeat + warm):
        started = time.perf_counter()
        work(index)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[warm:])[repeat // 2]


def _missing_toolchain(device: str) -> str | None:
    """What `torch.compile` needs and this machine lacks, in words."""
    if device == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")):
        return "there is no C++ compiler on this machine"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.exists() else "Python's headers are not installed (Debian: python3-dev)"


def processor() -> str:
    """The name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
