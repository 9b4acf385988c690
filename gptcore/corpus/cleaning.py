"""From any string to text that can be learned from: one rule each, and every rule that refuses a text names its reason."""

import re
import unicodedata

# What ends a part, from the best place to cut to the last resort.
_ENDS = (
    re.compile(r"\n[ \t]*\n\s*"),  # a paragraph
    re.compile(r"\n"),  # a line
    re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？][”’」』）]*"),  # a sentence
    re.compile(r"\s+"),  # a word
)


def clean(text: str) -> str:
    """Unicode NFC and `\\n` at line ends; nothing else is touched. `clean(clean(x)) == clean(x)`."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))


def objection(text: str, min_characters: int) -> str | None:
    """Why a cleaned text cannot be used: `binary`, `lone_surrogate`, `empty`, `too_short`, or None when it can.

    White space at both ends does not count towards the length.
    """
    if "\0" in text:
        return "binary"
    if not has_utf8(text):
        return "lone_surrogate"
    length = len(text.strip())
    if length == 0:
        return "empty"
    return "too_short" if length < min_characters else None


def has_utf8(text: str) -> bool:
    """Whether a string can be written as UTF-8, that is, holds no lone surrogate."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def cut(text: str, max_characters: int) -> list[str]:
    """Cut a text into parts of at most `max_characters`, at the end of a paragraph, line, sentence or word.

    Lossless: the parts joined are the text. Every part but the last has at least half of `max_characters`, the last a
    quarter, so that no crumbs are left.
    """
    parts = []
    start = 0
    while len(text) - start > max_characters:
        longest = min(max_characters, len(text) - start - max_characters // 4)
        end = _best_end(text, start + max_characters // 2, start + longest)
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _best_end(text: str, low: int, high: int) -> int:
    """The last of the best kind of end in `text[low:high]`; `high` when there is none."""
    for pattern in _ENDS:
        ends = [match.end() for match in pattern.finditer(text, low, high)]
        if ends:
            return ends[-1]
    return high
