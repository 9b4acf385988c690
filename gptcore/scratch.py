"""Folders under `<home>/scratch/` for work that leaves nothing behind, however it ends.

Whoever works in one holds a lock on it, which the kernel drops with the process: a folder that can be locked was left by
one that was killed. A folder that a person wants to keep holds a file `kept`.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK, _KEPT = "in-use.lock", "kept"


@contextmanager
def scratch_folder(home: Path, purpose: str, *, keep: bool = False) -> Iterator[Path]:
    """A new folder `<home>/scratch/<purpose>-<time>`, removed at the end unless `keep`; what the dead left goes first."""
    root = home / "scratch"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{purpose}-{time.time_ns()}"
    lock = FileLock(folder / _LOCK)
    with FileLock(root / ".lock"):  # nobody sweeps it between its making and its locking
        _sweep(root)
        folder.mkdir()
        if keep:
            (folder / _KEPT).touch()
        lock.acquire()
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def sweep_scratch(home: Path) -> list[Path]:
    """Remove the scratch folders whose process is gone; those that were removed."""
    root = home / "scratch"
    if not root.is_dir():
        return []
    with FileLock(root / ".lock"):
        return _sweep(root)


def _sweep(root: Path) -> list[Path]:
    removed = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not (path / _KEPT).exists()):
        try:
            with FileLock(folder / _LOCK).acquire(timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
        except Timeout:
            continue
    return removed
