"""A row of a task: what the model is shown and what it shall answer."""

from dataclasses import dataclass, field

from gptcore.corpus.document import Document, SetAside


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and its answer, with its place."""

    input: str
    """What the model is shown."""
    target: str
    """What it shall answer."""
    document: Document
    """Where both come from. Its text is whole: what a summary was taken out of or what names were masked in."""

    @property
    def text(self) -> str:
        """All text behind the row, the answer included, as it stands in the source."""
        if self.document.target is None:
            return self.document.text
        return f"{self.document.text}\n{self.document.target}"

    def set_aside(self, reason: str) -> SetAside:
        """Leave the row out."""
        return SetAside.of(self.document, reason)


@dataclass
class Found:
    """The rows that a task finds in documents, and what is no row, with its reason."""

    rows: list[Row] = field(default_factory=list)
    aside: list[SetAside] = field(default_factory=list)

    def add(self, document: Document, found: tuple[str, str] | str) -> None:
        """Add a row from (input, target), or set the document aside for the reason given."""
        if isinstance(found, str):
            self.aside.append(SetAside.of(document, found))
        else:
            self.rows.append(Row(*found, document))
