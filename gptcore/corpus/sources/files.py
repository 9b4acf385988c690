"""Source type `files`: .txt and .md are a document each, .jsonl, .csv and .parquet are tables with a document per row."""

import codecs
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptcore.config import FilesSource
from gptcore.corpus.cleaning import has_utf8
from gptcore.corpus.document import Document, SetAside, excerpt
from gptcore.corpus.sources.digests import file_digests
from gptcore.corpus.sources.rows import check_columns, document_from
from gptcore.errors import SourceError

TYPES = (".txt", ".md", ".jsonl", ".csv", ".parquet")
_READ = f"{', '.join(TYPES)}, each plain or .gz"


def identify_files(source: FilesSource, home: Path) -> dict[str, str]:
    """{name: sha256} of every file that will be read."""
    files = {name: path for name, path in find_files(source).items() if type_of(path)}
    return file_digests(files, home, f"source {source.name}")


def read_files(source: FilesSource, skip: Collection[str] = ()) -> Iterator[Document | SetAside]:
    """Every text of every file but those whose names are in `skip`, in the order of the settings and of the names."""
    return _read_all(source, {name: path for name, path in find_files(source).items() if name not in skip})


# ------------------------------------------------------------------------------------------------------- finding --


def find_files(source: FilesSource) -> dict[str, Path]:
    """Every file that the settings mean, by a name that is short, unique and the same wherever its folder lies.

    Folders are searched through; what is hidden (`.git`) is left out. A file that two patterns find is read once.
    Raises `SourceError` for a path or glob that finds nothing, and when nothing found is of a type that is read.
    """
    files: dict[str, Path] = {}
    seen: set[Path] = set()
    for pattern in source.paths:
        root, paths = _expand(Path(pattern).expanduser().absolute(), f"source {source.name}")
        for path in paths:
            if (real := path.resolve()) not in seen:
                seen.add(real)
                files[_name(path, root, files)] = path
    if not any(type_of(path) for path in files.values()):
        raise SourceError(f"source {source.name}: no file in {', '.join(source.paths)} is of a type that is read ({_READ})")
    return files


def type_of(path: Path) -> str | None:
    """`.txt`, `.md`, `.jsonl`, `.csv` or `.parquet`, with or without .gz; None for what is not read."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in TYPES if name.endswith(suffix)), None)


def _expand(path: Path, where: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files below it."""
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        return path, search(path, [path])
    first = next((number for number, part in enumerate(path.parts) if set("*?[") & set(part)), None)
    if first is None:
        raise SourceError(f"{where}: there is no file or folder {path}; mend `paths`")
    root = Path(*path.parts[:first])
    found = search(root, sorted(root.glob(str(Path(*path.parts[first:])))))
    if not found:
        raise SourceError(f"{where}: no file matches {path}; mend `paths`")
    return root, found


def search(root: Path, places: Iterable[Path]) -> list[Path]:
    """The files among `places` and in folders among them, each in the order of paths, without what is hidden below `root`."""
    found = [path for place in places for path in (sorted(_below(place)) if place.is_dir() else [place])]
    return [path for path in found if path.is_file() and not any(part[0] == "." for part in path.relative_to(root).parts)]


def _below(folder: Path) -> Iterator[Path]:
    """Every file below a folder. Raises `SourceError` for one that may not be read: nothing is lost silently."""

    def refuse(error: OSError) -> None:
        raise SourceError(f"cannot read the folder {error.filename}: {error.strerror}; make it readable or leave it out")

    for place, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(place, name) for name in names)


def _name(path: Path, root: Path, taken: dict[str, Path]) -> str:
    """The path below `root`, with as many of the folders above as it takes to be unique."""
    while (name := path.relative_to(root).as_posix()) in taken:
        if root == root.parent:
            return str(path)
        root = root.parent
    return name


# ------------------------------------------------------------------------------------------------------- reading --


class _Broken(NamedTuple):
    """A row that could not be read."""

    reason: str
    text: str


_Row = dict[str, Any] | _Broken


def _read_all(source: FilesSource, files: dict[str, Path]) -> Iterator[Document | SetAside]:
    for name, path in files.items():
        try:
            if (suffix := type_of(path)) is None:
                reason = "unknown_type"
            elif suffix in (".txt", ".md"):
                yield _read_text(source, name, path)
                continue
            else:
                yield from _read_table(source, name, path, _TABLES[suffix])
                continue
        except UnicodeError:
            reason = "broken_encoding"
        except (EOFError, zlib.error, csv.Error, ValueError, NotImplementedError):  # the last two are pyarrow's
            reason = "broken_file"
        except OSError as error:
            if error.errno is not None:  # gzip and pyarrow raise theirs without a number
                raise SourceError(f"source {source.name}: cannot read {path}: {error.strerror}; make it readable") from error
            reason = "broken_file"
        yield SetAside(name, source.name, reason, bytes=path.stat().st_size)


def _read_text(source: FilesSource, name: str, path: Path) -> Document | SetAside:
    with _open_text(path) as file:
        document = Document(name, file.read(), source.name, group=name, meta={"file": name})
    if "\0" not in document.text and not has_utf8(document.text):
        return SetAside.of(document, "broken_encoding")
    return document


def _read_table(
    source: FilesSource, name: str, path: Path, read_rows: Callable[[Path, list[str]], Iterator[_Row]]
) -> Iterator[Document | SetAside]:
    """A document per row, called `<file>:<row>` with rows counted from 1."""
    column = None if source.group in (None, "file", "row", "part") else source.group
    needed = [wanted for wanted in (source.text, column, source.target) if wanted is not None]
    checked = False
    for number, row in enumerate(read_rows(path, needed), 1):
        identity = f"{name}:{number}"
        if isinstance(row, _Broken):
            yield SetAside(identity, source.name, row.reason, excerpt(row.text), len(row.text.encode("utf-8", "replace")))
            continue
        if not checked:
            check_columns(row, needed, f"source {source.name}: {path}")
            checked = True
        group = name if source.group == "file" else None
        yield document_from(row, source, identity, column, group=group, meta={"file": name})


def _jsonl_rows(path: Path, _: list[str]) -> Iterator[_Row]:
    with _open_text(path) as file:
        for line in file:
            if not line.strip():
                continue
            if not has_utf8(line):
                yield _Broken("broken_encoding", line)
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else _Broken("broken_row", line)


def _csv_rows(path: Path, _: list[str]) -> Iterator[_Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KiB
    with _open_text(path) as file:
        for row in csv.DictReader(file):
            text = ",".join(value for value in row.values() if isinstance(value, str))
            if None in row:  # more fields than columns
                yield _Broken("broken_row", text)
            elif not has_utf8(text):
                yield _Broken("broken_encoding", text)
            else:
                yield row


def _parquet_rows(path: Path, needed: list[str]) -> Iterator[_Row]:
    import pyarrow.parquet as parquet  # half a second, for this type only

    with _open(path) as file:
        table = parquet.ParquetFile(io.BytesIO(file.read()) if path.suffix.lower() == ".gz" else path)
        columns = needed if set(needed) <= set(table.schema_arrow.names) else None
        for batch in table.iter_batches(columns=columns):
            yield from batch.to_pylist()


_TABLES = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _open_text(path: Path) -> io.TextIOWrapper:
    """Open as UTF-8, or UTF-16 where a byte order mark says so; bytes that are neither become lone surrogates."""
    file = _open(path)
    if file.peek(2).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return io.TextIOWrapper(file, encoding="utf-16", newline="")
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
