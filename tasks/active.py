"""Who is running in a home right now, and what the ones that died have left behind.

Every run writes `<home>/runs/<id>.json` (pid, process start time, the ids of its Prefect and MLflow runs) and holds a lock
on that file for as long as it lives. The kernel drops the lock with the process, so a record that can be locked belongs to a
process that is gone: no clock and no reused pid can mislead us.
"""

import contextlib
import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil

PREFECT = "prefect_flow_run_id"
MLFLOW = "mlflow_run_id"


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run that lives."""

    path: Path
    pid: int
    started: float
    """When its process started, in seconds since 1970."""
    config: str
    prefect_flow_run_id: str | None
    mlflow_run_id: str | None


class ActiveRun:
    """The record of this process's run, held for the length of a `with` block.

    Left normally, or with any exception, the record goes away; killed, it stays for `settle_dead_runs`.
    """

    def __init__(self, home: Path, config: str = "") -> None:
        self.path = home / "runs" / f"{uuid.uuid4().hex}.json"
        self._values: dict[str, Any] = {
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "config": config,
        }
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Locked before it has its name, and written in place ever after: the lock belongs to this very file.
        unnamed = self.path.with_suffix(".new")
        self._file = unnamed.open("w", encoding="utf-8")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self.note()
        unnamed.rename(self.path)
        return self

    def note(self, **ids: str | None) -> None:
        """Add ids, for example `note(prefect_flow_run_id=..., mlflow_run_id=...)`."""
        assert self._file is not None, "the record is open inside its with block only"
        self._values |= ids
        self._file.seek(0)
        self._file.truncate()
        json.dump(self._values, self._file)
        self._file.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._file is not None
        self.path.unlink(missing_ok=True)
        self._file.close()
        self._file = None


def active_runs(home: Path) -> list[RunRecord]:
    """The runs of this home that live, the oldest first."""
    records = []
    for path in (home / "runs").glob("*.json"):
        with _claimed(path) as claim:
            values = None if claim else _read(path)
        if values:
            known = {key: values.get(key) for key in (PREFECT, MLFLOW)}
            records.append(RunRecord(path, values["pid"], values["started"], values.get("config", ""), **known))
    return sorted(records, key=lambda record: record.started)


def has_dead_runs(home: Path) -> bool:
    """Whether a run that is gone left something to settle."""
    for path in (home / "runs").glob("*.json"):
        with _claimed(path) as claim:
            if claim is not None:
                return True
    return False


def settle_dead_runs(home: Path, key: str, settle: Callable[[str], None], *, keep_days: float = 30) -> int:
    """Call `settle(id)` for the id that every dead run left under `key` (`PREFECT` or `MLFLOW`); return how many there were.

    An id is forgotten once `settle` returned, the record once it holds no id any more or is older than `keep_days`.
    What `settle` raises goes up; the record then stays for the next time.
    """
    count = 0
    for path in (home / "runs").glob("*.json"):
        with _claimed(path) as file:
            if file is None:
                continue
            values = _read(path) or {}
            if values.get(key):
                settle(str(values[key]))
                count += 1
                values[key] = None
                file.seek(0)
                file.truncate()
                json.dump(values, file)
                file.flush()
            too_old = time.time() - path.stat().st_mtime > keep_days * 86_400
            if too_old or not (values.get(PREFECT) or values.get(MLFLOW)):
                path.unlink(missing_ok=True)
    return count


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[IO[str] | None]:
    """The record, locked, if its owner is gone; else None."""
    try:
        file = path.open("r+", encoding="utf-8")
    except FileNotFoundError:
        yield None
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        # Between opening and locking, its owner may have ended well and taken the record away.
        yield file if path.exists() else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # gone, or being written right now
    return values
