"""What a training cost: every trainer process of a run folder, also one that was killed, in `attempts.jsonl`. No torch here.

    {"attempt": 2, "started": 1767225600.0, "energy_source": "", "energy_missing": "/sys/class/powercap has no CPU package", …}
    {"attempt": 2, "micro_batch": 8}
    {"attempt": 2, "device": "AMD EPYC", "from_step": 20, "tokens_per_step": 2048.0}
    {"attempt": 2, "seconds": 41.3, "step": 31, "joules": null}
    {"attempt": 2, "seconds": 96.0, "step": 60, "joules": null, "ended": "finished"}

Lines are only appended, a few facts at a time, at least every five seconds: a later line of an attempt overrules an earlier
one, and a kill loses what happened since the last. The journal cannot tell this: it is cut back when a training is resumed.
Of several processes the first one writes; the others add at most that memory ran out.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from gptcore.training.energy import Meter, Source
from gptcore.training.memory import Kills

_EVERY = 5.0
"""Longest time in seconds between two lines."""
_READ_EVERY = 1.0
"""Shortest time in seconds between two readings of the energy."""


class Attempt(BaseModel):
    """One trainer process, as far as it told."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    started: float
    """In seconds since 1970."""
    seconds: float = 0.0
    """From when it held the run folder to its last line: loading, probing, compiling, training, evaluating, saving."""
    device: str = ""
    from_step: int | None = None
    """Where it went on; None: it ended before it got there."""
    step: int = 0
    """The last step it did."""
    tokens_per_step: float = 0.0
    joules: float | None = None
    """None where nothing tells any."""
    energy_source: str = ""
    """What was measured, in words."""
    energy_missing: str = ""
    """What was not measured and why, in words."""
    ended: str = "killed"
    """`finished`, `stopped` (asked to, after a save), `failed` (with an error), or `killed`: without a word, or because another
    of its processes was gone."""
    micro_batch: int | None = None
    """Sequences that it computed at a time; None: it ended before it knew."""
    out_of_memory: bool = False
    """Whether one of its processes could not get any more memory."""
    oom_kills: int | None = None
    """What the kernel had counted in `memory_group` when it began; None where nothing tells."""
    memory_group: str = ""

    @property
    def steps(self) -> int:
        """How many it did, whether or not they were kept."""
        return 0 if self.from_step is None else max(0, self.step - self.from_step)

    def ran_out(self, now: Kills | None) -> bool:
        """Whether it ended for want of memory; `now`: what the kernel has counted since."""
        if self.out_of_memory:
            return True
        if self.ended != "killed" or self.oom_kills is None or now is None or now.group != self.memory_group:
            return False
        return now.count > self.oom_kills

    def as_row(self) -> dict[str, Any]:
        """For `cost.json`."""
        return {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)), "ended": self.ended,
            "seconds": round(self.seconds, 1), "device": self.device, "from_step": self.from_step, "steps": self.steps,
            "tokens": round(self.steps * self.tokens_per_step), "energy_joules": _rounded(self.joules),
        }  # fmt: skip


class Recorder:
    """Writes the attempt that this process is, inside `with`. Nothing that goes wrong here fails or slows training."""

    def __init__(self, file: Path, *sources: Source, kills: Kills | None = None) -> None:
        self.ended = "failed"
        """How it ended, unless somebody says better."""
        self.step = 0
        self._began, self._read_at = time.monotonic(), 0.0
        self._meter = Meter(*sources)
        self._joules = self._meter.joules()
        self._number = 1 + max(_read(file), default=0)
        self._kills = kills
        self.micro_batch: int | None = None
        before = read_attempts(file)
        self.too_much = before[-1].micro_batch if before and before[-1].ran_out(kills) else None
        """The micro-batch of the attempt before, if it ended for want of memory."""
        self._lock, self._leaving = threading.Lock(), threading.Event()
        self._handle: int | None = None
        with contextlib.suppress(OSError):
            self._handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._thread = threading.Thread(target=self._beat, daemon=True, name="attempts")

    def __enter__(self) -> Self:
        # A line feed first: the last line of an attempt before this one may have been cut off by a full disk or a power cut.
        counted = {} if self._kills is None else {"oom_kills": self._kills.count, "memory_group": self._kills.group}
        self._write({"started": round(time.time(), 3), **self._energy(), **counted}, begin="\n" if self._number > 1 else "")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._thread.join()
        self._read_at = 0.0
        self.note(ended=self.ended)
        if self._handle is not None:
            os.close(self._handle)

    def measure(self, source: Source) -> None:
        """Count the energy that `source` tells, too."""
        with self._lock:
            self._meter.add(source)
        self._write(self._energy())

    def compute(self, micro_batch: int) -> None:
        """So many sequences are computed at a time."""
        self.micro_batch = micro_batch
        self._write({"micro_batch": micro_batch})

    def begin(self, step: int, tokens_per_step: float, device: str) -> None:
        """The steps begin after `step`."""
        self.step = step
        self._write({"device": device, "from_step": step, "step": step, "tokens_per_step": tokens_per_step})

    def note(self, **facts: Any) -> None:
        """Write down how far it got."""
        now = time.monotonic()
        with self._lock:
            if now - self._read_at >= _READ_EVERY:
                self._joules, self._read_at = self._meter.joules(), now
            self._write({"seconds": round(now - self._began, 3), "step": self.step, "joules": _rounded(self._joules), **facts})

    def _beat(self) -> None:
        while not self._leaving.wait(_EVERY):
            self.note()

    def _energy(self) -> dict[str, str]:
        return {"energy_source": self._meter.source, "energy_missing": self._meter.missing}

    def _write(self, facts: dict[str, Any], begin: str = "") -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.write(self._handle, f"{begin}{json.dumps({'attempt': self._number, **facts})}\n".encode())


def note_out_of_memory(file: Path) -> None:
    """Any process of the newest attempt says that it got no more memory."""
    with contextlib.suppress(OSError), file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"attempt": max(_read(file), default=1), "out_of_memory": True}) + "\n")


def read_attempts(file: Path) -> list[Attempt]:
    """Every attempt of a run folder, oldest first; lines that cannot be read are left out."""
    attempts = []
    for _, facts in sorted(_read(file).items()):
        with contextlib.suppress(ValidationError):
            attempts.append(Attempt.model_validate(facts))
    return attempts


def training_cost(attempts: Sequence[Attempt], before: int = 0) -> dict[str, Any]:
    """What `cost.json` of a training says. The first `before` attempts belong to runs before the one that published it."""
    began = [attempt for attempt in attempts if attempt.from_step is not None]
    again = [(one, max(0, one.step - (after.from_step or 0))) for one, after in pairwise(began)]
    told = [attempt.joules for attempt in attempts if attempt.joules is not None]
    silent = sorted({attempt.energy_missing for attempt in attempts if attempt.energy_missing})
    if told and len(told) < len(attempts):
        silent.append(f"{len(attempts) - len(told)} of {len(attempts)} attempts told none")
    return {
        "seconds": round(sum(attempt.seconds for attempt in attempts), 1),
        "seconds_of_earlier_runs": round(sum(attempt.seconds for attempt in attempts[:before]), 1),
        "tokens": round(sum(attempt.steps * attempt.tokens_per_step for attempt in attempts)),
        "repeated_steps": sum(steps for _, steps in again),
        "repeated_tokens": round(sum(steps * attempt.tokens_per_step for attempt, steps in again)),
        "energy_joules": _rounded(sum(told)) if told else None,
        "energy_source": "; ".join(sorted({attempt.energy_source for attempt in attempts if attempt.energy_source})),
        "energy_missing": "; ".join(silent),
        "attempts": len(attempts),
        "failed_attempts": sum(attempt.ended != "finished" for attempt in attempts),
        "each": [attempt.as_row() for attempt in attempts],
    }


def _read(file: Path) -> dict[int, dict[str, Any]]:
    """Number of each attempt -> what its lines say together."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    except OSError:
        lines = []
    attempts: dict[int, dict[str, Any]] = {}
    for text in lines:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("attempt"), int):
                attempts.setdefault(line["attempt"], {}).update(line)
    return attempts


def _rounded(joules: float | None) -> float | None:
    return None if joules is None else round(joules, 3)
