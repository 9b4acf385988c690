"""The journal: every metric and event of a training run is one line of `journal.jsonl`, with time and step.

    {"t": 1767225600.0, "step": 12, "kind": "metric", "values": {"train/loss": 4.2, …}}
    {"t": 1767225600.0, "step": 12, "kind": "event", "event": "checkpoint", "text": "saved step 12"}

The trainer writes; the terminal, Prefect and MLflow follow. Nothing a follower does can slow or stop training.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Journal:
    """Appends lines; each is written out at once, so that a kill loses at most the line being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write measurements after `step` optimizer steps."""
        self._write({"t": round(time.time(), 3), "step": step, "kind": "metric", "values": values})

    def event(self, step: int, event: str, text: str, **facts: Any) -> None:
        """Write something that happened; `text` is a sentence for people."""
        self._write({"t": round(time.time(), 3), "step": step, "kind": "event", "event": event, "text": text, **facts})

    def _write(self, line: Line) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def reopen(self) -> None:
        """Go on in the file that now has the journal's name, after it was cut back."""
        self._file.close()
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()


def cut_back(path: Path, step: int) -> int:
    """Drop the lines after `step`, which a resumed run writes again; they are kept beside. Returns how many."""
    if not path.exists():
        return 0
    kept: list[str] = []
    dropped: list[str] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        line = _parse(text)
        if line is not None:
            (kept if line["step"] <= step else dropped).append(text)
    if dropped:
        number = len(list(path.parent.glob("journal.tail-*.jsonl")))
        (path.parent / f"journal.tail-{number}.jsonl").write_text("\n".join(dropped) + "\n", encoding="utf-8")
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(text + "\n" for text in kept), encoding="utf-8")
    temporary.replace(path)
    return len(dropped)


def read_journal(path: Path) -> list[Line]:
    """All whole lines so far."""
    return list(Follower(path).lines()) if path.exists() else []


class Follower:
    """Reads a journal while it is written; `lines()` yields what is new since the last call."""

    def __init__(self, path: Path, since: float = 0.0) -> None:
        self.path, self.offset = path, 0
        self._file_number: int | None = None
        self._since = since  # lines up to this moment, in seconds since 1970, were seen or do not matter

    def lines(self) -> Iterator[Line]:
        """New whole lines. A journal that was cut back is another file: of it, what is younger than what was seen."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            number = os.fstat(file.fileno()).st_ino
            if number != self._file_number:
                self._file_number, self.offset = number, 0
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        fresh = self.offset == 0
        self.offset += len(whole)
        since = self._since
        for text in whole.decode("utf-8", errors="replace").splitlines():
            line = _parse(text)
            if line is not None and (not fresh or line["t"] > since):
                self._since = max(self._since, line["t"])
                yield line


def _parse(text: str) -> Line | None:
    """A line, or None for the stump that a kill or a power cut left."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) and "t" in line else None
