"""From token ids to text while it is being written: nothing is shown that another token could change."""

from collections.abc import Callable, Sequence

_UNFINISHED = ("\ufffd", "\ufdd0")
"""How a text ends when bytes of its last character are missing, or the second half of what a tokenizer escaped."""


class Writing:
    """A text that grows by tokens and ends where one of `stops` is complete; that and what follows are no part of it.

    Bytes of a character that is not complete and the beginning of what could become a stop are held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.ids: list[int] = []
        self.text = ""
        """What is certain."""
        self.stopped = False
        self._decode, self._stops = decode, stops
        self._waiting = ""
        # What stands before a token decides on the space before it, so a few that are known are decoded with the new ones.
        self._known, self._next = 0, 0

    def read(self) -> str:
        """What became certain since the last call, by the `ids` that were appended."""
        piece = self._unread()
        if not piece or piece.endswith(_UNFINISHED):
            return ""
        self._known, self._next = self._next, len(self.ids)
        return self._show(piece)

    def finish(self) -> str:
        """The rest: no token follows. Cuts `ids` to those that `text` needs."""
        rest = "" if self.stopped else self._show(self._unread(), last=True)
        while self.stopped and self.ids and self._decode(self.ids[:-1]).startswith(self.text):
            self.ids.pop()
        return rest

    def _unread(self) -> str:
        before = self._decode(self.ids[self._known : self._next])
        return self._decode(self.ids[self._known :])[len(before) :]

    def _show(self, piece: str, last: bool = False) -> str:
        """Add a piece; returns what of it and of what waited is certain."""
        waiting = self._waiting + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := waiting.find(stop)) >= 0]
        if found:  # what is complete first counts, however the text came in tokens
            self.stopped, keep = True, min(found)[1]
        else:
            keep = len(waiting) - (0 if last else _begun(waiting, self._stops))
        self._waiting = waiting[keep:]
        self.text += waiting[:keep]
        return waiting[:keep]


def _begun(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of `text` that a stop begins with; 0 when none does."""
    longest = min(len(text), max((len(stop) for stop in stops), default=1) - 1)
    return next((size for size in range(longest, 0, -1) if any(stop.startswith(text[-size:]) for stop in stops)), 0)
