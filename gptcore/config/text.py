"""Which text, and how it becomes tokens on the disk."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gptcore.config.section import Count, Name, Section, Share


class FilesSource(Section):
    """Text files and tables: .txt .md .jsonl .csv .parquet, each plain or .gz."""

    type: Literal["files"] = "files"
    name: Name = "files"
    """How tables and metrics call this source."""
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders (searched through) or globs."""
    text: str = "text"
    """Column that holds the text, in .jsonl, .csv and .parquet."""
    group: str | None = None
    """What stays together in one split: `file`, `row`, `part` (each chunk of a text for itself) or the name of a column.
    Unset: the file for .txt and .md, the row for tables."""
    target: str | None = None
    """Column that holds the answer, when the source feeds a task."""


class HubSource(Section):
    """A dataset of the Hugging Face hub, or a local dataset folder, read as a stream by `datasets.load_dataset`."""

    type: Literal["hub"] = "hub"
    name: Name = "hub"
    """How tables and metrics call this source."""
    dataset: str
    """Hub name (`owner/name`) or a folder that `datasets.load_dataset` opens."""
    config: str | None = None
    """Configuration of the dataset, if it has several."""
    split: str = "train"
    """Which of the dataset's own splits is read."""
    revision: str | None = None
    """Commit, tag or branch; the commit it resolves to enters the fingerprint."""
    text: str = "text"
    """Column that holds the text."""
    group: str | None = None
    """Column whose equal values stay together in one split. Unset: the row."""
    target: str | None = None
    """Column that holds the answer, when the source feeds a task."""
    limit: Count | None = None
    """Read at most this many rows."""


class PythonDocsSource(Section):
    """The docstrings of installed Python packages, parsed with `ast`; nothing is imported."""

    type: Literal["python_docs"] = "python_docs"
    name: Name = "python-docs"
    """How tables and metrics call this source."""
    packages: tuple[str, ...] = Field(min_length=1)
    """Import names of installed packages; `stdlib` is Python's own library."""


Source = Annotated[FilesSource | HubSource | PythonDocsSource, Field(discriminator="type")]


class SplitConfig(Section):
    """How groups are dealt to train, valid and test. Corpus and tasks share it, so that a group has one split everywhere."""

    valid: Share = 0.05
    """Share of the groups that measure progress during training."""
    test: Share = 0.05
    """Share of the groups that only the final evaluation sees."""
    seed: int = 0
    """Deals the groups anew."""
    ngram: Count = 13
    """Length in words of the n-grams that tell whether two texts overlap (Brown et al. 2020, appendix C)."""
    max_overlap: Share = 0.2
    """A held-out text that shares more than this share of its n-grams with train is set aside."""
    minimum: Count = 20
    """Fewest documents, or rows of a task, that each split must hold."""

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> Self:
        if self.valid + self.test >= 1.0:
            raise ValueError(f"valid ({self.valid}) and test ({self.test}) leave nothing to train on; lower them")
        return self


class CorpusConfig(Section):
    """Which text, and what is done to it before anything is learned."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Where the text comes from."""
    min_characters: Count = 50
    """Shorter documents are set aside as `too_short`."""
    max_characters: Count = 2000
    """Longer documents are cut into chunks of at most this length, at paragraph or sentence ends where there are any."""
    workers: Count = 2
    """Processes that read and clean; does not change the result."""

    @model_validator(mode="after")
    def _bounds_and_names(self) -> Self:
        if self.min_characters > self.max_characters:
            raise ValueError(f"min_characters ({self.min_characters}) is above max_characters ({self.max_characters})")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources need different names, these are {names}: set `name`")
        return self


class TokenizerConfig(Section):
    """The tokenizer that is learned from the corpus."""

    algorithm: Literal["unigram", "bpe"] = "unigram"
    """sentencepiece's algorithm."""
    vocabulary: Annotated[int, Field(ge=300)] = 8192
    """Pieces in all: 256 bytes, the control symbols and the learned ones."""
    sample_characters: Count = 5_000_000
    """Learn from at most this many characters, drawn evenly and deterministically from train."""
    character_coverage: Annotated[float, Field(ge=0.98, le=1.0)] = 0.9995
    """Share of the sample's characters that get a piece of their own; the rest is spelled in bytes."""
    seed: int = 0
    """Draws another sample."""


class ShardsConfig(Section):
    """How token ids are laid out on disk."""

    tokens_per_shard: Count = 100_000_000
    """Tokens in one file; documents are never cut at a file's end."""
