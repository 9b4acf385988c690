"""A home at another place: whatever names the old one names the new one.

Paths of the home stand in MLflow's and Prefect's databases, in the notes of what was shipped, in jobs and in MLflow's model
cards. They are found by looking everywhere, not by knowing where: a path plainly written, one inside a `file:` address
(percent-encoded) or inside JSON (with escapes). What was published with a sha256 holds none and is left alone.
"""

import contextlib
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

_MAGIC = b"SQLite format 3\0"
_TEXTS = {".json", ".yaml", ".yml", ".toml"}


def relocate(folder: Path, old: Path, new: Path) -> int:
    """Let the files under `folder`, a home that was at `old` and will be at `new`, name `new`; how many were changed."""
    if old == new:
        return 0
    move = mover(str(old), str(new))
    count = 0
    for file in _texts(folder):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # nothing of ours
        if (moved := move(text)) != text:
            status = file.stat()
            file.write_text(moved, encoding="utf-8")
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # of two notes the newer one counts
            count += 1
    for database in (*folder.glob("*.db"), *folder.glob("*/*.db")):
        if database.open("rb").read(len(_MAGIC)) == _MAGIC:
            count += _rewrite(database, spellings(str(old)), move)
    return count


def mover(old: str, new: str) -> Callable[[Any], Any]:
    """What puts `new` in the place of `old` in a text, wherever `old` stands as a whole path or as the beginning of one."""
    escaped = json.dumps(old)[1:-1]
    known = "|".join(map(re.escape, spellings(old)))
    # Not the tail of a longer path, and not the head of a longer name.
    pattern = re.compile(rf"(file://)?(?<![\w.-])({known})(?=[/\"'\s?#]|$)")

    def replaced(match: re.Match[str]) -> str:
        if match[1]:
            return match[1] + quote(new)
        return json.dumps(new)[1:-1] if match[2] == escaped != old else new

    return lambda value: pattern.sub(replaced, value) if isinstance(value, str) else value


def spellings(path: str) -> list[str]:
    """A path as it is, as it stands in an address, and as it stands in JSON."""
    return list(dict.fromkeys((path, quote(path), json.dumps(path)[1:-1])))


def _texts(folder: Path) -> Iterator[Path]:
    """Files that may name the home. An artifact's own were published as they are; MLflow's are records, but for model cards."""
    for top, _, names in os.walk(folder):
        place = Path(top)
        parts = place.relative_to(folder).parts
        published = parts[:1] == ("store",) and len(parts) > 3 and not parts[3].endswith(".run")
        if published:
            continue
        for name in names:
            if name == "MLmodel" or (Path(name).suffix in _TEXTS and parts[:1] != ("mlartifacts",)):
                yield place / name


def _rewrite(database: Path, old: list[str], move: Callable[[Any], Any]) -> int:
    """Rows of an SQLite database that were changed, whatever their table and column."""
    count = 0
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.create_function("moved", 1, move, deterministic=True)
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            if table.startswith("sqlite_"):
                continue
            for row in connection.execute(f"PRAGMA table_info({_quoted(table)})").fetchall():
                column = _quoted(row[1])
                # instr() first: it passes over millions of numbers without calling Python.
                holds = " OR ".join(f"instr({column}, ?)" for _ in old)
                update = f"UPDATE {_quoted(table)} SET {column} = moved({column}) WHERE {holds}"
                changed = connection.execute(update, old)
                count += changed.rowcount
    return count


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
