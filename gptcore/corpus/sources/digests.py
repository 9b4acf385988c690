"""sha256 of files, remembered by path, size, modification time and inode, so that a second run reads none of them."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from gptcore.artifacts import sha256_file, write_json
from gptcore.errors import SourceError

# A file that was written within this many seconds may change again without a new modification time.
_TOO_FRESH = 2.0


def file_digests(files: Mapping[str, Path], home: Path, where: str) -> dict[str, str]:
    """{name: sha256} of {name: path}. Raises `SourceError`, beginning with `where`, for a file that cannot be read."""
    memory = home / "cache" / "sha256.json"
    memory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(memory.with_suffix(".lock")):
        remembered = _recall(memory)
        known = dict(remembered)
        try:
            digests = {name: _digest(path.absolute(), known) for name, path in files.items()}
        except OSError as error:
            raise SourceError(
                f"{where}: cannot read {error.filename}: {error.strerror}; make it readable or leave it out"
            ) from error
        if known != remembered:
            write_json(memory, known)
    return digests


def _digest(path: Path, known: dict[str, list[int | str]]) -> str:
    state = path.stat()
    stamp: list[int | str] = [state.st_size, state.st_mtime_ns, state.st_ino]
    entry = known.get(str(path))
    if entry is None or entry[:3] != stamp:
        entry = [*stamp, sha256_file(path)]
        if time.time() - state.st_mtime > _TOO_FRESH:
            known[str(path)] = entry
    return str(entry[3])


def _recall(memory: Path) -> dict[str, list[int | str]]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
