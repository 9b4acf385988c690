"""`gptcore restore`: the home that a backup holds, at any place, whole or not at all. What lies in the file is data."""

import contextlib
import fcntl
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow

from flows.operations.backup import FILES, FORMAT, HEADER, Hashing, Summary, plainly
from flows.operations.relocation import relocate
from gptcore.artifacts import SCHEMA
from gptcore.errors import ArtifactError, is_disk_full
from gptcore.room import check_room


def restore(file: Path, home: Path) -> Summary:
    """Make the home that `file` holds at `home`, which must not be there or be empty; all or nothing.

    Every file is compared with its sha256, and what names the old place names the new one. What lies in the file is data:
    nothing but plain files inside the home comes out of it. Raises `ArtifactError` or `DiskFullError`.
    """
    home = home.absolute()
    if not file.is_file():
        raise ArtifactError(f"there is no file {file} to restore from")
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise ArtifactError(f"{home} is not empty and nothing is restored over it: set GPTCORE_HOME to a new folder")
    if os.path.ismount(home):
        raise ArtifactError(f"{home} is a mount point, which cannot be replaced: set GPTCORE_HOME to a new folder inside it")
    with plainly(f"{home} cannot be made"), _own_folder(home.with_name(f"{home.name}.restoring")) as folder:
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
                if member.name in (HEADER, FILES):
                    documents[member.name] = json.load(_content(tar, member))
                    _check_header(documents[HEADER], file)
                elif HEADER in documents and _is_plain(member) and member.name not in found:
                    check_room(folder, member.size, f"{member.name} of {file}")
                    found[member.name] = _extract(_content(tar, member), member, folder)
                else:
                    raise tarfile.TarError(f"it holds {member.name!r}")
        manifest = documents[FILES]
        wrong = sorted(name for name in found.keys() | manifest.keys() if found.get(name) != manifest.get(name))
    except OSError as error:
        if is_disk_full(error):
            raise
        raise _damaged(file, error.strerror or str(error)) from error  # zstd's own have no number
    except (tarfile.TarError, ValueError, LookupError, TypeError, AttributeError, OverflowError, EOFError) as error:
        raise _damaged(file, str(error)) from error
    if wrong:
        raise _damaged(file, f"{wrong[0]} is not the file that was saved")
    return documents[HEADER], manifest


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
    reader = Hashing(content)
    with target.open("xb") as file:
        shutil.copyfileobj(reader, file, 1 << 20)
        size = file.tell()
    target.chmod(member.mode & 0o755)
    os.utime(target, (member.mtime, member.mtime))
    return {"size": size, "sha256": reader.sha256.hexdigest()}


def _damaged(file: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{file} is no backup of a gptcore home, or is damaged or cut short ({why}); nothing was restored")
