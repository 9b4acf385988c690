"""From a row of a table to a document; shared by every source that reads tables."""

from collections.abc import Iterable, Mapping
from typing import Any

from gptcore.config import FilesSource, HubSource
from gptcore.corpus.document import Document, SetAside, excerpt
from gptcore.errors import SourceError


def check_columns(columns: Iterable[str], needed: Iterable[str], where: str) -> None:
    """Raise `SourceError` when a column that the settings name is not there."""
    there = list(columns)
    for name in needed:
        if name not in there:
            raise SourceError(
                f"{where} has no column {name!r}, its columns are: {', '.join(there) or 'none'}; "
                "set `text`, `group` or `target` of the source to one of them"
            )


def document_from(
    row: Mapping[str, Any],
    source: FilesSource | HubSource,
    identity: str,
    group_column: str | None,
    *,
    group: str | None = None,
    meta: dict[str, str] | None = None,
) -> Document | SetAside:
    """A row as a document, or why it is none. Its group is the value in `group_column`, else `group`, else the row itself."""
    text = row.get(source.text)
    if not isinstance(text, str):
        return SetAside(identity, source.name, "no_text", excerpt("" if text is None else str(text)))
    value = row.get(group_column) if group_column is not None else None
    target = row.get(source.target) if source.target is not None else None
    document = Document(
        id=identity,
        text=text,
        source=source.name,
        group=str(value) if value is not None else group or identity,
        meta=meta or {},
        target=str(target) if target is not None else None,
    )
    return SetAside.of(document, "no_target") if source.target is not None and target is None else document
