"""Source type `hub`: a dataset of the Hugging Face hub, or a local dataset folder, read as a stream."""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from gptcore.config import HubSource
from gptcore.corpus.document import Document, SetAside
from gptcore.corpus.sources.digests import file_digests
from gptcore.corpus.sources.files import search
from gptcore.corpus.sources.rows import check_columns, document_from
from gptcore.errors import SourceError

_COMMIT = re.compile(r"[0-9a-f]{40}")


def identify_hub(source: HubSource, home: Path) -> dict[str, Any]:
    """The commit that `revision` means now, or the files of a local folder. A `revision` that is a commit asks nobody."""
    if (folder := _local_folder(source)) is not None:
        files = {path.relative_to(folder).as_posix(): path for path in search(folder, [folder])}
        return {"files": file_digests(files, home, f"source {source.name}")}
    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return {"commit": source.revision}
    return {"commit": _resolve_commit(source)}


def read_hub(source: HubSource) -> Iterator[Document | SetAside]:
    """A document per row, called by the row's number from 1."""
    import datasets  # more than a second

    folder = _local_folder(source)
    # Resolving first: it fails at once where the download would try for half a minute.
    revision = None if folder is not None else _resolve_commit(source)
    try:
        rows = datasets.load_dataset(
            source.dataset if folder is None else str(folder),
            source.config,
            split=source.split,
            revision=revision,
            streaming=True,
        )
    except Exception as error:  # a zoo of types: builder, network, configuration, file format
        raise _cannot_read(source, error) from error
    return _read(source, rows)


def _read(source: HubSource, rows: Any) -> Iterator[Document | SetAside]:
    target = source.target
    # Labels may be stored as numbers, whose names the features know.
    name_of = getattr(rows.features[target], "int2str", None) if target and target in (rows.features or ()) else None
    needed = [name for name in (source.text, source.group, target) if name is not None]
    for number, row in enumerate(_guarded(source, islice(rows, source.limit)), 1):
        if number == 1:
            check_columns(row, needed, f"source {source.name}: {source.dataset}")
        if target and name_of is not None and row[target] is not None:
            row = {**row, target: name_of(row[target])}
        yield document_from(row, source, str(number), source.group)


def _guarded(source: HubSource, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows; what fails underneath while they are fetched and parsed becomes a `SourceError`."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _cannot_read(source, error) from error
        yield row


def _local_folder(source: HubSource) -> Path | None:
    """The folder that `dataset` names; None for a name of the hub. Raises `SourceError` for a path that is not there."""
    path = Path(source.dataset).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.is_absolute() or source.dataset.startswith((".", "~")) or source.dataset.count("/") > 1:
        raise SourceError(f"source {source.name}: there is no folder {source.dataset}; mend `dataset`")
    return None


def _resolve_commit(source: HubSource) -> str:
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(source.dataset, revision=source.revision, timeout=10).sha
    except Exception as error:
        raise _cannot_read(source, error) from error
    assert commit is not None  # set for every dataset_info of one revision
    return commit


def _cannot_read(source: HubSource, error: Exception) -> SourceError:
    why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return SourceError(
        f"source {source.name}: cannot read the dataset {source.dataset} (split {source.split}): {why.rstrip('.')}; "
        "check its name, `config`, `split` and `revision`, and that the hub can be reached"
    )
