"""`gptcore bench train`: this engine beside transformers' GPT-2 on the same machine, in turns.

    parent ──"5"──▶ ours     a step of the training loop, as it is
           ──"5"──▶ muon     the same with Muon
           ──"5"──▶ peer     transformers, at its best setting here
           ──"5"──▶ matrix   the machine's matrix product

Every contender is a process of its own, so that its peak memory is its own. They take turns of a few steps each, so that a
machine that is busy for a while is busy for all of them; what is told are medians. Text is random tokens: speed does not
depend on it.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

from pydantic import ValidationError

from gptcore.config import Count, ModelConfig, Section, TrainingConfig, apply_override, preset, settings_error
from gptcore.errors import TrainingError

GPT2_BLOCK = preset("gpt2").model_copy(update={"layers": 6, "width": 384, "heads": 6, "context": 256})
"""The GPT-2 block at a size that two cores train: 13.9 M parameters with 8,192 pieces."""
_MATRIX = 2048
_WARM = 3
"""Steps before anything is timed; compiling happens in the first."""


class BenchConfig(Section):
    """What is measured."""

    model: ModelConfig = GPT2_BLOCK
    """The shape of both; the peer is built of the GPT-2 block's settings only."""
    vocabulary: Count = 8192
    """Pieces."""
    training: TrainingConfig = TrainingConfig(
        steps=1000, batch=8, optimizer={"algorithm": "adamw"},  # type: ignore[arg-type]
    )  # fmt: skip
    """Batch, optimizer, precision and compile of ours."""
    rounds: Count = 7
    """Turns of everybody."""
    steps: Count = 4
    """Steps of a turn."""


def bench_config(shape: str | None = None, overrides: Sequence[str] = ()) -> BenchConfig:
    """The settings, with a preset's shape and `section.key=value` in their place. Raises `SettingsError`."""
    values: dict[str, Any] = BenchConfig().model_dump()
    if shape is not None:
        values["model"] = preset(shape).model_dump()
    for override in overrides:
        apply_override(values, override)
    try:
        return BenchConfig.model_validate(values)
    except ValidationError as error:
        raise settings_error(error, "the benchmark") from error


class Contender(Protocol):
    """Whoever takes turns."""

    setting: str
    """In words."""

    def step(self) -> None:
        """Do the work of one optimizer step, to its end."""


@dataclass
class Measured:
    """What a contender's turns came to."""

    setting: str
    seconds: list[float]
    """Of one step, a number per turn."""
    memory_mb: float
    """Peak resident memory of its process."""

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return sorted(self.seconds)[len(self.seconds) // 2]


def bench_train(config: BenchConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all contenders in turns; the object that `gptcore bench train --json` prints."""
    names = ["ours", "peer", "matrix"] + (["muon"] if config.training.optimizer.algorithm != "muon" else [])
    found = _take_turns(config, names, say)
    ours, peer, matrix = found["ours"], found["peer"], found["matrix"]
    tokens = config.training.batch * config.model.context
    flops = flops_per_token(config.model, config.vocabulary)
    shared = {name: getattr(config.model, name) for name in ("layers", "width", "heads", "context")}
    block = GPT2_BLOCK.model_copy(update={**shared, "ffn_width": config.model.inner_width})  # what the peer is built of
    peak = 2 * _MATRIX**3 / matrix.median / 1e9

    def told(who: Measured, flops: int = flops) -> dict[str, Any]:
        speed = tokens / who.median
        gflops = speed * flops / 1e9
        return {
            "setting": who.setting, "tokens_per_second": round(speed, 1), "step_seconds": round(who.median, 4),
            "gflops": round(gflops, 1), "mfu": round(gflops / peak, 4), "memory_mb": round(who.memory_mb),
        }  # fmt: skip

    answer = {
        **told(ours), "flops_per_token": flops, "peak_gflops": round(peak, 1), "peak_setting": matrix.setting,
        "ratio": round(peer.median / ours.median, 3), "memory_ratio": round(ours.memory_mb / peer.memory_mb, 3),
        "peer": {"name": "transformers GPT2LMHeadModel", **told(peer, flops_per_token(block, config.vocabulary))},
        "shape": {"vocabulary": config.vocabulary, "batch": config.training.batch, **config.model.model_dump()},
    }  # fmt: skip
    if "muon" in found:
        answer["muon"] = told(found["muon"]) | {"ratio": round(peer.median / found["muon"].median, 3)}
    return answer


def flops_per_token(model: ModelConfig, vocabulary: int) -> int:
    """Forward and backward: 6 N + 12 layers context width (Chowdhery et al. 2022, appendix B).

    N are all weights but those that are only looked up: value embeddings, and the embedding where the head has its own. A block
    with a window counts with that and not with the context.
    """
    from gptcore.model import GPT

    looked_up = ("values", "embedding.") if not model.tied else ("values",)
    weights = GPT(model, vocabulary, device="meta").named_parameters()
    parameters = sum(weight.numel() for name, weight in weights if not name.startswith(looked_up))
    seen = sum(min(model.window(block) or model.context, model.context) for block in range(model.layers))
    return 6 * parameters + 12 * seen * model.heads * model.size_of_head


# --------------------------------------------------------------------------------------------------------- turns --


def _take_turns(config: BenchConfig, names: Sequence[str], say: Callable[[str], None]) -> dict[str, Measured]:
    processes: dict[str, subprocess.Popen[str]] = {}
    found: dict[str, Measured] = {}
    # Not pipes: nobody reads along, and they would fill up.
    errors = {name: tempfile.TemporaryFile("w+") for name in names}  # noqa: SIM115  (closed below)
    try:
        for name in names:
            processes[name] = subprocess.Popen(
                [sys.executable, "-m", "gptcore.training.bench", name, config.model_dump_json()],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors[name], text=True,
            )  # fmt: skip
            ready = _answer(
                name, processes[name], errors[name]
            )  # one after the other: starting is not measured, but it would disturb
            found[name] = Measured(ready["setting"], [], ready["memory_mb"])
            say(f"{name}: {ready['setting']}")
        for turn in range(config.rounds):
            for name in names:
                answer = _ask(name, processes[name], errors[name], config.steps)
                found[name].seconds.append(answer["seconds"])
                found[name].memory_mb = answer["memory_mb"]
            say(
                f"turn {turn + 1} of {config.rounds}: " + ", ".join(f"{name} {found[name].seconds[-1]:.3f} s" for name in names)
            )
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
        for file in errors.values():
            file.close()
    return found


def _ask(name: str, process: subprocess.Popen[str], errors: IO[str], steps: int) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    return _answer(name, process, errors)


def _answer(name: str, process: subprocess.Popen[str], errors: IO[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        process.wait()
        errors.seek(0)
        told = errors.read().strip().splitlines()
        raise TrainingError(f"the benchmark's process {name} ended: {told[-1] if told else 'it said nothing'}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _serve(contender: Contender) -> None:
    """Take the turns that are asked for on standard input."""
    for _ in range(_WARM):
        contender.step()
    _tell(setting=contender.setting)
    for line in sys.stdin:
        steps, started = int(line), time.perf_counter()
        for _ in range(steps):
            contender.step()
        _tell(seconds=(time.perf_counter() - started) / steps)


def _tell(**values: Any) -> None:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    os.write(_OUT, (json.dumps({**values, "memory_mb": memory}) + "\n").encode())


_OUT = 1


def main(name: str, config: BenchConfig) -> None:
    """Be one contender."""
    global _OUT
    _OUT = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    from gptcore.training import contenders

    _serve(contenders.make(name, config))


if __name__ == "__main__":
    main(sys.argv[1], BenchConfig.model_validate_json(sys.argv[2]))
