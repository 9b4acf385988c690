"""Whether memory ran out: what an error says, and what the kernel counts. No torch here.

The kernel counts, per control group, the processes that its out-of-memory killer took (memory.events of cgroup v2,
memory.oom_control of v1). A kill -9 by hand does not count: that is how the two are told apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PHRASES = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "alloc_failed")
"""What torch.OutOfMemoryError, the CPU's allocator, C++ and cuBLAS say; both allocators' errors are RuntimeErrors."""

ONE_IS_TOO_MUCH = (
    "memory ran out with one sequence at a time, which cannot be halved: set a shorter model.context or a smaller model, or "
    "take a machine with more memory; the last checkpoint is kept"
)


@dataclass(frozen=True)
class Kills:
    """What the kernel counted so far."""

    group: str
    """Boot and control group: counts of two groups say nothing about each other."""
    count: int


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, of a card or of the machine."""
    return isinstance(error, MemoryError) or any(phrase in str(error).lower() for phrase in _PHRASES)


def oom_kills(root: Path = Path("/")) -> Kills | None:
    """The kills in this process's control group; None where nothing tells. `root`: where /proc and /sys are."""
    try:
        boot = (root / "proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    for version, folder in memory_groups(root):
        file = folder / ("memory.oom_control" if version == 1 else "memory.events")
        if (count := _count(file)) is not None:
            return Kills(f"{boot} {file}", count)
    return None


def memory_groups(root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """The control groups around this process that count memory, from its own outwards: version (1 or 2) and folder."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        # Inside of a container the path may be the host's; what is mounted is then, at the top, the container's own group.
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top):
                yield (1 if controllers else 2), folder


def _count(file: Path) -> int | None:
    try:
        facts = dict(line.split() for line in file.read_text(encoding="utf-8").splitlines())
        return int(facts["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None
