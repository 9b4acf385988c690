"""`gptcore backup`: a home as one file, taken while runs may be at work.

    backup.json      format, schema and path of the home; the first member
    tracking/ …      the home's files; databases and what is being written are snapshots
    manifest.json    size and sha256 of every file; the last member, so that a file that was cut short has none

The file is a tar in one zstd stream (pyarrow brings zstd; `tar --zstd -tf FILE` lists it). In it are what has been finished
and, of trainings that are not, what they need to go on. It holds the key of the private Prefect server, so only its owner may
read it.

The order matters: what MLflow was told is noted after it was told, so the notes come first, MLflow's database after them, and
the files that the database names last. Then a note or a row never speaks of what is not there.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sqlite3
import stat
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import pyarrow

from flows.operations.clean import upkeep
from gptcore.artifacts import MANIFEST, open_home, sync
from gptcore.errors import ArtifactError, DiskFullError, is_disk_full

FORMAT = 1
HEADER, FILES = "backup.json", "manifest.json"
_DATABASES = ("mlflow.db", "prefect/prefect.db")
_LEFT_OUT = {"cache", "scratch", "locks", "store", "mlartifacts", "runs"}
"""Folders of a home that can be made again, or that have their own place in the order."""
_PASSING = (".lock", ".new", ".partial", ".replaced", ".broken", ".log", "-wal", "-shm", "-journal", ".users", ".alive")
_NOT_COPIED = {*_DATABASES, "server.json", "services/state.json", "services/mlflow-users.db", HEADER, FILES}
_TRAINER = {"trainer.json", "trainer.lock", "model.partial"}
"""What in a workspace belongs to a process."""


@dataclass(frozen=True)
class Summary:
    """What a backup holds."""

    file: Path
    home: Path
    files: int
    bytes: int
    """Of the home's files."""
    size: int
    """Bytes of the backup."""
    created: str

    def as_row(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**vars(self), "file": str(self.file), "home": str(self.home)}


def backup(home: Path, file: Path) -> Summary:
    """Write a backup of `home` to the new file `file`. Runs may go on meanwhile. Raises `ArtifactError`, `DiskFullError`."""
    if not (home / "schema").exists():
        raise ArtifactError(f"there is no home of gptcore in {home} yet: set GPTCORE_HOME to the one that is to be saved")
    home, file = open_home(home), file.absolute()
    if file.exists():
        raise ArtifactError(f"{file} is there already and is not overwritten: name another file, or delete it first")
    if not file.parent.is_dir():
        raise ArtifactError(f"{file.parent} is no folder: make it, or name a file in another one")
    if file.resolve().is_relative_to(home.resolve()):
        raise ArtifactError(f"{file} lies inside the home {home}, which it is to save: name a file elsewhere")
    with upkeep(home), plainly(f"{home} cannot be saved in {file}"):
        snapshot = home / "scratch" / f"backup-{time.time_ns()}"
        partial = file.with_name(f"{file.name}.partial")
        try:
            summary = _write(partial, file, home, snapshot)
            partial.rename(file)
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)
            partial.unlink(missing_ok=True)
    return summary


def _write(partial: Path, file: Path, home: Path, snapshot: Path) -> Summary:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest: dict[str, dict[str, Any]] = {}
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with (
        pyarrow.CompressedOutputStream(os.fdopen(handle, "wb"), "zstd") as packed,
        tarfile.open(fileobj=packed, mode="w|") as tar,
    ):
        schema = json.loads((home / "schema").read_text())
        _add_json(tar, HEADER, {"format": FORMAT, "schema": schema, "home": str(home), "created": created})
        for name, path in _files(home, snapshot):
            with contextlib.suppress(FileNotFoundError):  # a run took it away meanwhile
                manifest[name] = _add(tar, name, path)
        _add_json(tar, FILES, manifest)
    sync(partial)
    total = sum(entry["size"] for entry in manifest.values())
    return Summary(file, home, len(manifest), total, partial.stat().st_size, created)


def _files(home: Path, snapshot: Path) -> Iterator[tuple[str, Path]]:
    """Name and place of every file that belongs into the backup, in the order that keeps it consistent."""
    tops = sorted(path for path in home.iterdir() if path.name not in _LEFT_OUT)
    yield from _below(tops, home, whole=False)
    yield from _below([home / "runs"], home, whole=False)
    for name in _DATABASES:
        if (home / name).is_file():
            yield name, _copy_database(home / name, snapshot / name)
    yield from _below([home / "mlartifacts"], home)
    for path in sorted((home / "store").glob("*/*/*")):
        if (
            path.is_dir()
            and path.suffix == ""
            and not path.name.startswith(".")
            and _link_artifact(path, snapshot / "artifact")
        ):
            yield from _below([snapshot / "artifact"], snapshot / "artifact", f"{path.relative_to(home)}/")
        elif path.suffix == ".run" and not (path.with_suffix("") / MANIFEST).exists():
            _copy_workspace(path, snapshot / "workspace")
            yield from _below([snapshot / "workspace"], snapshot / "workspace", f"{path.relative_to(home)}/")


def _below(places: list[Path], root: Path, prefix: str = "", *, whole: bool = True) -> Iterator[tuple[str, Path]]:
    """Regular files under `places`, not `whole`: without what passes; a folder of the home may be a link to a larger disk."""
    for place in places:
        found = [place] if place.is_file() else [Path(top, name) for top, _, names in os.walk(place) for name in names]
        for path in sorted(found):
            name = path.relative_to(root).as_posix()
            if path.is_file() and (whole or not (name.endswith(_PASSING) or name in _NOT_COPIED)):
                yield prefix + name, path


def _copy_database(database: Path, copy: Path) -> Path:
    """A consistent copy of an SQLite database, whoever writes to it."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with (
        contextlib.closing(sqlite3.connect(database, timeout=60)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    return copy


def _link_artifact(path: Path, place: Path) -> bool:
    """Hold a finished artifact fast with hard links, so that building it anew cannot mix old and new; whether it is one."""
    while (path / MANIFEST).exists():
        shutil.rmtree(place, ignore_errors=True)
        try:
            before = (path / MANIFEST).stat().st_ino
            shutil.copytree(path, place, copy_function=_link)
            if before == (path / MANIFEST).stat().st_ino:
                return True
        except FileNotFoundError:
            continue  # removed or built anew meanwhile
        except shutil.Error as error:
            if not all("[Errno 2]" in str(why) for _, _, why in error.args[0]):
                raise OSError(f"{path} cannot be copied: {error.args[0][0][2]}") from error
    return False


def _copy_workspace(path: Path, place: Path) -> None:
    """What an unfinished training needs to go on: its checkpoints are published whole, its journal is written right now."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with contextlib.suppress(FileNotFoundError):
        for item in sorted(path.iterdir()):
            if item.is_file() and item.name not in _TRAINER and not item.name.endswith(_PASSING):
                shutil.copy2(item, place / item.name)
    for checkpoint in sorted((path / "checkpoints").glob("step-*"), reverse=True):
        if checkpoint.suffix == "":
            kept = place / "checkpoints" / checkpoint.name
            try:
                shutil.copytree(checkpoint, kept, copy_function=_link)
            except (FileNotFoundError, shutil.Error):
                shutil.rmtree(kept, ignore_errors=True)  # pruned by the trainer meanwhile; a newer one is there


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or one without hard links
        shutil.copy2(source, target)


def _add(tar: tarfile.TarFile, name: str, path: Path) -> dict[str, Any]:
    """Put a file into the tar; its size and sha256 are of the very bytes that went in."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.mode = status.st_size, status.st_mtime, stat.S_IMODE(status.st_mode) & 0o755
        reader = Hashing(file)
        tar.addfile(member, reader)
    return {"size": member.size, "sha256": reader.sha256.hexdigest()}


def _add_json(tar: tarfile.TarFile, name: str, value: Any) -> None:
    content = json.dumps(value, ensure_ascii=False).encode()
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o600
    tar.addfile(member, io.BytesIO(content))


class Hashing:
    """A file that is hashed while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        block = self._file.read(size)
        self.sha256.update(block)
        return block


@contextlib.contextmanager
def plainly(what: str) -> Iterator[None]:
    """Turn what the system refuses, such as a folder that may not be written, into one sentence."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise DiskFullError(f"{what}, no space is left: free some, then try again; what was there is untouched") from error
        raise ArtifactError(f"{what}: {error.strerror or error} ({error.filename or 'no file'})") from error
