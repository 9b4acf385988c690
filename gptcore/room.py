"""Room on a disk: how much there is, how much something takes, and saying so before work that cannot fit."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from gptcore.errors import DiskFullError


def check_room(folder: Path, need: int, what: str, instead: str = "", free: int | None = None) -> None:
    """Raise `DiskFullError` where `need` bytes are clearly more than the disk of `folder` has; `what` needs them.

    `instead` is another way out than making room; `free` are the free bytes, if they are known.
    """
    if free is None:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free
    if need > free:
        others = f", or {instead}" if instead else ""
        raise DiskFullError(
            f"{what} needs at least {amount(need)} and only {amount(free)} are free in {folder}: make room "
            f"(gptcore clean shows what may go), set GPTCORE_HOME to a larger disk{others}"
        )


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files under a folder; what vanishes meanwhile counts nothing."""
    return sum(status.st_size for status in _files(path))


def freed_by(paths: Iterable[Path]) -> int:
    """Bytes that removing all of `paths` gives back: a file with another hard link elsewhere gives none."""
    seen: dict[tuple[int, int], int] = {}
    freed = 0
    for path in paths:
        for status in _files(path):
            key = (status.st_dev, status.st_ino)
            seen[key] = seen.get(key, 0) + 1
            freed += status.st_size if seen[key] == status.st_nlink else 0
    return freed


def last_change(path: Path) -> float:
    """When something in a folder changed last, in seconds since 1970; 0 for what is gone."""
    return max((status.st_mtime for status in _files(path)), default=_mtime(path))


def amount(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _files(path: Path) -> Iterator[os.stat_result]:
    places = [path] if not path.is_dir() else (Path(top, name) for top, _, names in os.walk(path) for name in names)
    for place in places:
        try:
            yield place.lstat()
        except FileNotFoundError:
            continue


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
