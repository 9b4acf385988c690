"""`gptcore backup` and `gptcore restore`: a home as one file, taken while runs may be at work, opened at another place.

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
import fcntl
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
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow

from flows.clean import upkeep
from flows.relocation import relocate
from gptcore.artifacts import MANIFEST, SCHEMA, open_home, sync
from gptcore.errors import ArtifactError, DiskFullError, is_disk_full
from gptcore.room import check_room

FORMAT = 1
_HEADER, _MANIFEST = "backup.json", "manifest.json"
_DATABASES = ("mlflow.db", "prefect/prefect.db")
_LEFT_OUT = {"cache", "scratch", "locks", "store", "mlartifacts", "runs"}
"""Folders of a home that can be made again, or that have their own place in the order."""
_PASSING = (".lock", ".new", ".partial", ".replaced", ".broken", ".log", "-wal", "-shm", "-journal", ".users", ".alive")
_NOT_COPIED = {*_DATABASES, "server.json", _HEADER, _MANIFEST}
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


# -------------------------------------------------------------------------------------------------------- backup --


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
    with upkeep(home), _clear(f"{home} cannot be saved in {file}"):
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
        _add_json(tar, _HEADER, {"format": FORMAT, "schema": schema, "home": str(home), "created": created})
        for name, path in _files(home, snapshot):
            with contextlib.suppress(FileNotFoundError):  # a run took it away meanwhile
                manifest[name] = _add(tar, name, path)
        _add_json(tar, _MANIFEST, manifest)
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
        reader = _Hashing(file)
        tar.addfile(member, reader)
    return {"size": member.size, "sha256": reader.sha256.hexdigest()}


def _add_json(tar: tarfile.TarFile, name: str, value: Any) -> None:
    content = json.dumps(value, ensure_ascii=False).encode()
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o600
    tar.addfile(member, io.BytesIO(content))


class _Hashing:
    """A file that is hashed while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        block = self._file.read(size)
        self.sha256.update(block)
        return block


# ------------------------------------------------------------------------------------------------------- restore --


def restore(file: Path, home: Path) -> Summary:
    """Make the home that `file` holds at `home`, which must not be there or be empty; all or nothing.

    Every file is compared with its sha256, and what names the old place names the new one. What lies in the file is data:
    nothing but plain files inside the home comes out of it. Raises `ArtifactError` or `DiskFullError`.
    """
    home = home.absolute()
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise ArtifactError(f"{home} is not empty and nothing is restored over it: set GPTCORE_HOME to a new folder")
    if os.path.ismount(home):
        raise ArtifactError(f"{home} is a mount point, which cannot be replaced: set GPTCORE_HOME to a new folder inside it")
    if not file.is_file():
        raise ArtifactError(f"there is no file {file} to restore from")
    with _clear(f"{home} cannot be made"), _own_folder(home.with_name(f"{home.name}.restoring")) as folder:
        header, manifest = _unpack(file, folder)
        relocate(folder, Path(header["home"]), home)
        os.sync()  # a home that is there after a power cut is there whole
        folder.rename(home)
    total = sum(entry["size"] for entry in manifest.values())
    return Summary(file.absolute(), home, len(manifest), total, file.stat().st_size, header["created"])


@contextlib.contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that is this process's alone, whatever a killed restore left in it; gone at the end unless renamed."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"another gptcore restore is at work in {folder}; wait until it is done") from None
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _unpack(file: Path, folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Header and manifest of a backup whose files now lie in `folder`, as they were saved. Raises `ArtifactError`."""
    found: dict[str, dict[str, Any]] = {}
    documents: dict[str, Any] = {}
    try:
        with (
            pyarrow.CompressedInputStream(pyarrow.OSFile(str(file), "rb"), "zstd") as packed,
            tarfile.open(fileobj=packed, mode="r|") as tar,
        ):
            for member in tar:
                if member.name in (_HEADER, _MANIFEST):
                    documents[member.name] = json.load(_content(tar, member))
                    _check_header(documents[_HEADER], file)
                elif _HEADER in documents and _is_plain(member) and member.name not in found:
                    check_room(folder, member.size, f"{member.name} of {file}")
                    found[member.name] = _extract(_content(tar, member), member, folder)
                else:
                    raise tarfile.TarError(f"it holds {member.name!r}")
        manifest = documents[_MANIFEST]
        wrong = sorted(name for name in found.keys() | manifest.keys() if found.get(name) != manifest.get(name))
    except OSError as error:
        if is_disk_full(error):
            raise
        raise _damaged(file, error.strerror or str(error)) from error  # zstd's own have no number
    except (tarfile.TarError, ValueError, LookupError, TypeError, AttributeError, OverflowError, EOFError) as error:
        raise _damaged(file, str(error)) from error
    if wrong:
        raise _damaged(file, f"{wrong[0]} is not the file that was saved")
    return documents[_HEADER], manifest


def _check_header(header: dict[str, Any], file: Path) -> None:
    if header["format"] != FORMAT or header["schema"] > SCHEMA:
        raise ArtifactError(
            f"{file} was written by a newer gptcore (format {header['format']}, schema {header['schema']}): "
            "use that one to restore it"
        )


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether it is a file that lies inside the folder it is extracted to."""
    path = PurePosixPath(member.name)
    return member.isreg() and not path.is_absolute() and ".." not in path.parts and path.parts != () and "\\" not in member.name


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    if content is None:
        raise tarfile.TarError(f"{member.name} is no file")
    return content


def _extract(content: IO[bytes], member: tarfile.TarInfo, folder: Path) -> dict[str, Any]:
    target = folder / member.name
    target.parent.mkdir(parents=True, exist_ok=True)
    reader = _Hashing(content)
    with target.open("xb") as file:
        shutil.copyfileobj(reader, file, 1 << 20)
        size = file.tell()
    target.chmod(member.mode & 0o755)
    os.utime(target, (member.mtime, member.mtime))
    return {"size": size, "sha256": reader.sha256.hexdigest()}


def _damaged(file: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{file} is no backup of a gptcore home, or is damaged or cut short ({why}); nothing was restored")


@contextlib.contextmanager
def _clear(what: str) -> Iterator[None]:
    """Turn what the system refuses, such as a folder that may not be written, into one sentence."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise DiskFullError(f"{what}, no space is left: free some, then try again; what was there is untouched") from error
        raise ArtifactError(f"{what}: {error.strerror or error} ({error.filename or 'no file'})") from error
