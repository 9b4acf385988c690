"""A document that was read, and a text that was set aside: the two things every source yields."""

from dataclasses import dataclass, field
from typing import Self

EXCERPT = 200

REASONS = {
    "binary": "holds NUL characters, so it is no text",
    "broken_encoding": "is not valid UTF-8 (nor UTF-16 with a byte order mark)",
    "broken_file": "cannot be unpacked or parsed to its end",
    "broken_row": "is a row that does not fit its table",
    "unknown_type": "is a file of a type that is not read",
    "not_python": "is Python that does not parse",
    "no_text": "is a row without text in the text column",
    "no_target": "is a row without an answer in the target column",
    "lone_surrogate": "holds half a surrogate pair, which has no UTF-8",
    "empty": "holds white space only",
    "too_short": "is shorter than min_characters",
    "duplicate": "is the same, after cleaning, as a document that was kept",
    "known": "is known already: the corpus that is added to holds it",
    "overlaps_train": "is held out and shares more than max_overlap of its n-grams with train",
}
IN_TEST_OF = "in_test_of_"


def explain(reason: str) -> str:
    """What a reason means, as the end of a sentence that begins with the text."""
    if reason.startswith(IN_TEST_OF):
        return f"is in train and holds more than max_overlap of a test row of {reason.removeprefix(IN_TEST_OF)}"
    return REASONS[reason]


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its place. `(source, id)` is unique."""

    id: str
    text: str
    source: str
    """Name of its source in the settings."""
    group: str
    """Documents of one group stay in one split."""
    meta: dict[str, str] = field(default_factory=dict)
    target: str | None = None
    """The answer, where the source feeds a task."""


@dataclass(frozen=True, slots=True)
class SetAside:
    """A text that cannot be used, and why."""

    id: str
    source: str
    reason: str
    """A key of `REASONS`, or `in_test_of_<task>`."""
    text: str = ""
    """Its beginning, at most `EXCERPT` characters that can be written as UTF-8."""
    bytes: int = 0
    """Size of the whole text; of a file that could not be read, its size on disk."""

    @classmethod
    def of(cls, document: Document, reason: str) -> Self:
        """Set a document aside."""
        size = len(document.text.encode("utf-8", "surrogatepass"))
        return cls(document.id, document.source, reason, excerpt(document.text), size)


def excerpt(text: str) -> str:
    """The beginning of a text, with a question mark for what has no UTF-8."""
    return text[:EXCERPT].encode("utf-8", "replace").decode()
