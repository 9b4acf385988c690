"""What the settings leave open is decided here, before step 1: device, precision, threads, micro-batch, compile, steps."""

import math
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gptcore.config import TrainingConfig
from gptcore.errors import TrainingError
from gptcore.model.folder import default_dtype, pick_device
from gptcore.room import amount
from gptcore.tokens.batches import Batches
from gptcore.training.footprint import Footprint
from gptcore.training.job import Job, Precision, Resolved
from gptcore.training.machine import free_memory
from gptcore.training.memory import ONE_IS_TOO_MUCH

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


@dataclass(frozen=True)
class Change:
    """An answer that is not what it was; for the journal."""

    event: Literal["adapted", "memory"]
    text: str
    """A sentence for people."""


def resolve(job: Job, vocabulary: int, batches: Batches) -> Resolved:
    """All answers but those that need a measurement: with a budget in minutes, `steps` is still 0.

    Raises `TrainingError` when not one sequence fits into memory.
    """
    training, device = job.training, pick_device(job.training.device)
    precision = precision_for(training.precision, device)
    footprint = Footprint(job.model, vocabulary, training, batches.longest, device.type, dtype_of(precision))
    micro_batch = _micro_batch(footprint, free_memory(device, training.processes))
    steps = training.steps or 0
    if training.tokens is not None:
        steps = math.ceil(training.tokens / batches.tokens_per_step)
    return Resolved(
        steps=steps,
        batch=training.batch,
        micro_batch=micro_batch,
        nodes=training.nodes,
        processes=training.processes,
        threads=threads_for(training),
        device="cuda" if device.type == "cuda" else "cpu",
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        precision=precision,
        compiled=False,
        compile_reason="not asked for" if training.compile is False else "",
        seed=training.seed,
        tokens_per_step=batches.tokens_per_step,
        tokens_per_second=None,
        evaluate_every=0,
        torch=torch.__version__,
        memory_mb=footprint.at(micro_batch).total >> 20,
    )


def _micro_batch(footprint: Footprint, free: int) -> int:
    """What the settings ask for, or else the largest that is worth it and fits into `free` bytes."""
    if asked := footprint.training.micro_batch:
        return min(footprint.rows, asked)
    there = int(ROOM * free)
    if found := footprint.largest(most_rows(footprint), there):
        return found
    need, length = amount(footprint.at(1).training), footprint.length
    raise TrainingError(
        f"training this model takes {need} of memory with one sequence of {length} tokens at a time and {amount(there)} are "
        "there for it: lower model.context, model.width or model.layers, free some memory, or set training.micro_batch=1 to "
        "try it all the same"
    )


def most_rows(footprint: Footprint) -> int:
    """The largest micro-batch that is worth it."""
    return min(footprint.rows, max(1, TOKENS_AT_ONCE[footprint.device] // footprint.length))


def precision_for(wanted: Precision | Literal["auto"], device: torch.device) -> Precision:
    """What activations are computed in: with `auto` two bytes where the hardware multiplies them natively."""
    if wanted != "auto":
        return wanted
    if default_dtype(device) == torch.bfloat16:
        return "bfloat16"
    return "float16" if device.type == "cuda" else "float32"


def dtype_of(precision: Precision) -> torch.dtype:
    """torch's name of it."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def threads_for(training: TrainingConfig) -> int:
    """CPU threads of one process."""
    return training.threads or max(1, len(os.sched_getaffinity(0)) // training.processes)


def adapt(answers: Resolved, training: TrainingConfig, too_much: int | None) -> tuple[Resolved, list[Change]]:
    """The answers of an earlier trainer for what the settings ask for by now, and what is another than before.

    All of it changes the result by rounding only. `too_much`: the micro-batch with which memory ran out last time. Raises
    `TrainingError` when that was a single sequence.
    """
    if too_much == 1:
        raise TrainingError(ONE_IS_TOO_MUCH)
    changes = []
    moved = (answers.nodes, answers.processes) != (training.nodes, training.processes)
    # Unset, the threads of a machine with other cores, maybe: equal bits come first.
    threads = threads_for(training) if moved or training.threads is not None else answers.threads
    rows = training.batch // training.world
    size = min(rows, training.micro_batch or answers.micro_batch, answers.micro_batch)
    placed = {"nodes": training.nodes, "processes": training.processes, "threads": threads, "micro_batch": size}
    adapted = answers.model_copy(update=placed)
    if adapted != answers:
        changes.append(Change("adapted", f"goes on with {_placed(adapted)}; it was {_placed(answers)}"))
    if too_much is not None and size > too_much // 2:
        half = too_much // 2
        adapted = adapted.model_copy(update={"micro_batch": half})
        text = f"memory ran out with {too_much} sequences at a time: {half} from here on, in a step {training.batch} as before"
        changes.append(Change("memory", text))
    return adapted, changes


def _placed(answers: Resolved) -> str:
    return (
        f"{answers.nodes} node(s) x {answers.processes} process(es) x {answers.threads} thread(s), "
        f"{answers.micro_batch} sequences at a time"
    )


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
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
