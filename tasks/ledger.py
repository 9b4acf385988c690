"""What has been shipped to MLflow: one small record per recipe, and the journal's lines that are still to go. No mlflow here.

    <home>/tracking/<stage>/<name>/<fingerprint[:12]>.json

A record is written before and after every step, and each step may be repeated: killed anywhere, the next run ships what is
missing and nothing twice. Losing a record costs a second copy in MLflow, never an error.
"""

import json
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from gptcore.artifacts import Artifact, Recipe

RUNNING, FAILED, FINISHED = "running", "failed", "finished"


@dataclass
class Record:
    """What MLflow knows of one artifact, finished or being built."""

    path: Path
    stage: str
    name: str
    fingerprint: str
    uri: str
    """Of the MLflow this was shipped to; another one gets everything anew."""
    build: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tag `gptcore.build` of all that belongs to this record: found by it when we died before noting an id."""
    status: str = RUNNING
    run_id: str | None = None
    parent_id: str | None = None
    digest: str | None = None
    """Of the finished artifact."""
    shipped: list[str] = field(default_factory=list)
    """Steps of shipping that are done."""
    model_id: str | None = None
    """The LoggedModel of the artifact itself."""
    datasets: list[dict[str, Any]] = field(default_factory=list)
    """The MLflow datasets that this artifact is, or was made from."""
    offset: int = 0
    """Bytes of the journal that are shipped."""
    last_line: str = ""
    """The journal's line that ends at `offset`: a journal that was cut back has another one there."""
    last_step: dict[str, int] = field(default_factory=dict)
    """Largest shipped step of each metric."""

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """The record at `path`; None if there is none that can be read."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(path=path, **values)
        except (OSError, ValueError, TypeError):
            return None

    def save(self) -> None:
        """Write it so that a reader sees the old or the new one; a power cut may bring the old one back, which does no harm."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        values = asdict(self)
        del values["path"]
        unfinished = self.path.with_suffix(".new")
        unfinished.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
        unfinished.replace(self.path)

    def forget(self) -> None:
        """Everything that was shipped is gone: begin again as another build, as if nothing had been."""
        fresh = type(self)(self.path, self.stage, self.name, self.fingerprint, self.uri)
        vars(self).update(vars(fresh))


def record_path(home: Path, what: Recipe | Artifact) -> Path:
    """Where the record of a recipe or of its artifact stands."""
    return home / "tracking" / what.stage / what.name / f"{what.fingerprint[:12]}.json"


def record_of_digest(home: Path, digest: str) -> Record | None:
    """The newest record of the artifact with this digest."""
    paths = sorted((home / "tracking").glob("*/*/*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return next((record for path in paths if (record := Record.load(path)) and record.digest == digest), None)


# ------------------------------------------------------------------------------------------------------- journal --


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    key: str
    step: int
    value: float
    timestamp: int
    """Milliseconds since 1970."""


@dataclass(frozen=True)
class Line:
    """A whole line of the journal, and what of it is still to go."""

    points: list[Point]
    end: int
    """Offset in bytes after it."""
    text: str


def unshipped(record: Record, journal: Path) -> Iterator[Line]:
    """The lines of `journal` after what was shipped; a (metric, step) that was shipped never comes again.

    A journal that was cut back and went on is read from its beginning. A last line without its end waits for the next time.
    """
    try:
        file = journal.open("rb")
    except FileNotFoundError:
        return
    with file:
        end = record.offset if _continues(file, record) else 0
        file.seek(end)
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            fresh = [point for point in _points(line) if point.step > record.last_step.get(point.key, -1)]
            yield Line(fresh, end, line.decode(errors="replace"))


def _continues(file: BinaryIO, record: Record) -> bool:
    """Whether the journal still holds, before the record's offset, the line that was shipped last."""
    line = record.last_line.encode()
    if not line or record.offset < len(line):
        return False
    file.seek(record.offset - len(line))
    return file.read(len(line)) == line


def _points(line: bytes) -> list[Point]:
    try:
        entry = json.loads(line)
        if entry.get("kind") != "metric":
            return []
        step, timestamp = int(entry["step"]), round(entry["t"] * 1000)
        return [Point(str(key), step, float(value), timestamp) for key, value in entry["values"].items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # a torn line is the journal's business, not ours


def journal_points(journal: Path, steps: set[int]) -> list[Point]:
    """All points of a journal that were measured at one of `steps`."""
    if not journal.is_file():
        return []
    with journal.open("rb") as file:
        return [point for line in file for point in _points(line) if point.step in steps]
