"""Where text comes from: one file per type of source, each with a way to identify it cheaply and a way to read it."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from gptcore.config import FilesSource, HubSource, Source
from gptcore.corpus.document import Document, SetAside
from gptcore.corpus.sources.files import identify_files, read_files
from gptcore.corpus.sources.hub import identify_hub, read_hub
from gptcore.corpus.sources.python_docs import identify_python_docs, read_python_docs


def identify(source: Source, home: Path) -> dict[str, Any]:
    """What a source holds right now, as plain values: equal values mean equal text.

    files: {name: sha256}; python_docs: {package: version and a digest of what is installed}; hub: the commit, or the
    files of a local folder. sha256s are remembered in `<home>/cache`. Raises `SourceError` when there is nothing to read.
    """
    if isinstance(source, FilesSource):
        return identify_files(source, home)
    if isinstance(source, HubSource):
        return identify_hub(source, home)
    return identify_python_docs(source, home)


def read_source(
    source: Source, workers: int = 1, home: Path | None = None, skip: Collection[str] = ()
) -> Iterator[Document | SetAside]:
    """Read a source in a fixed order; what cannot be read is set aside with its reason.

    That files, packages or a data set are missing is raised by the call itself, as `SourceError`; a missing column with the
    first row. `workers` processes parse Python; with a `home`, what they found is kept in `<home>/cache` for the next time.
    Files whose names are in `skip` are not read. Texts come as they are, not cleaned.
    """
    if isinstance(source, FilesSource):
        return read_files(source, skip)
    if isinstance(source, HubSource):
        return read_hub(source)
    return read_python_docs(source, workers, home)


__all__ = ["identify", "read_source"]
