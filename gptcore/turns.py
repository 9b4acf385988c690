"""Contenders that take turns: measured side by side, so that a machine that is busy for a while is busy for all of them.

    parent ──"5"──▶ ours     five steps, and how long one of them took
           ──"5"──▶ peer     the same

Every contender is a process of its own, so that its peak memory is its own; what is told are medians of the turns.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, TypeVar

from pydantic import ValidationError

from gptcore.config import Section, apply_override, preset, settings_error
from gptcore.errors import GptcoreError

Kind = TypeVar("Kind", bound=Section)


def bench_config(kind: type[Kind], shape: str | None = None, overrides: Sequence[str] = ()) -> Kind:
    """What is measured, with a preset as `model` and `section.key=value` in their place. Raises `SettingsError`."""
    values = kind().model_dump()
    if shape is not None:
        values["model"] = preset(shape).model_dump()
    for override in overrides:
        apply_override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise settings_error(error, "the benchmark") from error


class Contender(Protocol):
    """Whoever takes turns."""

    setting: str
    """In words."""

    def step(self) -> None:
        """Do the work that is measured once, to its end."""


@dataclass
class Measured:
    """What a contender's turns came to."""

    setting: str
    seconds: list[float] = field(default_factory=list)
    """Of one step, a number per turn."""
    memory_mb: float = 0.0
    """Peak resident memory of its process."""
    facts: dict[str, float] = field(default_factory=dict)
    """Whatever else a contender tells of itself (`facts`), as it was at the end."""

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return sorted(self.seconds)[len(self.seconds) // 2]


def take_turns(
    module: str, names: Sequence[str], config: str, rounds: int, steps: int, say: Callable[[str], None]
) -> dict[str, Measured]:
    """Run `python -m module NAME CONFIG` for every name, each of which calls `serve`, and let them take turns.

    Raises `GptcoreError` with the last line of a process that ended.
    """
    processes: dict[str, subprocess.Popen[str]] = {}
    found: dict[str, Measured] = {}
    # Not pipes: nobody reads along, and they would fill up.
    errors = {name: tempfile.TemporaryFile("w+") for name in names}  # noqa: SIM115  (closed below)
    try:
        for name in names:
            processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, name, config],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors[name], text=True,
            )  # fmt: skip
            # One after the other: starting is not measured, but it would disturb.
            ready = _answer(name, processes[name], errors[name])
            found[name] = Measured(ready["setting"], [], ready["memory_mb"])
            say(f"{name}: {ready['setting']}")
        for turn in range(rounds):
            for name in names:
                answer = _ask(name, processes[name], errors[name], steps)
                found[name].seconds.append(answer["seconds"])
                found[name].memory_mb, found[name].facts = answer["memory_mb"], answer["facts"]
            say(f"turn {turn + 1} of {rounds}: " + ", ".join(f"{name} {found[name].seconds[-1]:.3f} s" for name in names))
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
        raise GptcoreError(f"the benchmark's process {name} ended: {told[-1] if told else 'it said nothing'}")
    answer: dict[str, Any] = json.loads(line)
    return answer


# ---------------------------------------------------------------------------------------------- in the process of one --


def serve(make: Callable[[], Contender], warm: int) -> None:
    """Be a contender: take the turns that are asked for on standard input, after `warm` steps that are not measured."""
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    contender = make()
    for _ in range(warm):
        contender.step()
    _tell(out, setting=contender.setting)
    for line in sys.stdin:
        steps, started = int(line), time.perf_counter()
        for _ in range(steps):
            contender.step()
        seconds = (time.perf_counter() - started) / steps
        _tell(out, seconds=seconds, facts=getattr(contender, "facts", {}))


def _tell(out: int, **values: Any) -> None:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    os.write(out, (json.dumps({**values, "memory_mb": memory}) + "\n").encode())
