"""Read the documents of a corpus as a stream, so that memory does not grow with the corpus."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from gptcore.corpus.splitting import SplitName
from gptcore.errors import ArtifactError

_ROWS = 2000


def read_documents(corpus: Path, split: SplitName, columns: Sequence[str]) -> Iterator[list[list[str]]]:
    """Batches of the documents of a split, in their order, as one list per column.

    Raises `ArtifactError` when the corpus has no such file.
    """
    import pyarrow.parquet  # half a second, which whoever only encodes text does without

    path = corpus / "data" / f"{split}.parquet"
    if not path.is_file():
        raise ArtifactError(f"{corpus} is no corpus, it has no {split}.parquet; rebuild it with: gptcore run --rebuild corpus")
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=_ROWS, columns=list(columns)):
        yield [batch.column(name).to_pylist() for name in columns]
