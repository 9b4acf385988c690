"""What a finished artifact has to tell MLflow, as plain values; `tasks/tracking.py` says it. No mlflow here."""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gptcore.artifacts import REPORT, Artifact
from tasks.ledger import Point, journal_points

DIGEST = 36
"""MLflow keeps this many characters of a dataset's digest."""


@dataclass(frozen=True)
class Kept:
    """A checkpoint that training kept."""

    step: int
    path: Path
    points: list[Point]
    """What was measured at its step."""


class Contents:
    """A finished artifact, read for shipping."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.manifest = artifact.manifest()
        self.ended = round(datetime.fromisoformat(self.manifest["built_at"]).timestamp() * 1000)
        """When it was built, in milliseconds since 1970."""
        self.started = self.ended - round(artifact.seconds * 1000)
        self.report = artifact.path / REPORT
        self.journal = self.report / "journal.jsonl"

    @property
    def tags(self) -> dict[str, str]:
        """What it is and where it lies."""
        return {
            **stage_tags(self.artifact.stage, self.artifact.name, self.artifact.fingerprint),
            "gptcore.digest": self.artifact.digest,
            "gptcore.path": str(self.artifact.path),
            "gptcore.git_commit": str(self.manifest["git_commit"]),
        }

    @property
    def numbers(self) -> list[Point]:
        """Its numbers and the seconds it took, at the last step of its training if it has one."""
        values = {**self.artifact.numbers, "seconds": self.artifact.seconds}
        step = self.kept[-1].step if self.kept else 0
        return [Point(metric_key(key), step, float(value), self.ended) for key, value in values.items() if is_number(value)]

    @cached_property
    def kept(self) -> list[Kept]:
        """The checkpoints beside it, oldest first; the last one holds the weights that were published."""
        run = self.artifact.path.with_name(self.artifact.path.name + ".run")
        found = []
        for file in sorted((run / "checkpoints").glob("step-*/checkpoint.json")):
            if re.fullmatch(r"step-\d+", file.parent.name):
                # Shipping trusts no file of a workspace: one that cannot be read is training's business.
                with contextlib.suppress(OSError, ValueError, KeyError):
                    values = json.loads(file.read_text(encoding="utf-8"))
                    found.append((int(values["step"]), file.parent, values.get("metrics") or {}))
        journal = journal_points(self.journal, {step for step, _, _ in found}) if found else []
        return [Kept(step, path, self._measured(step, metrics, journal)) for step, path, metrics in sorted(found)]

    def _measured(self, step: int, metrics: Mapping[str, Any], journal: list[Point]) -> list[Point]:
        """The journal's points of a step, and what only the checkpoint knows: one and the same point is never two."""
        points = {point.key: point for point in journal if point.step == step}
        for key, value in metrics.items():
            if is_number(value):
                points.setdefault(key, Point(metric_key(key), step, float(value), self.ended))
        return list(points.values())

    @property
    def model(self) -> tuple[Literal["model", "tokenizer"], Path] | None:
        """The folder that becomes a LoggedModel."""
        if self.artifact.stage == "tokenizer":
            return "tokenizer", self.artifact.path / "tokenizer"
        folder = self.artifact.path / "model"
        return ("model", folder) if folder.is_dir() else None

    @property
    def is_data(self) -> bool:
        """Whether it is rows of text, which others are made from."""
        return is_data(self.artifact.stage)


def is_data(stage: str) -> bool:
    """Whether a stage's artifact is rows of text."""
    return stage.startswith(("corpus", "examples"))


def carries_data(stage: str) -> bool:
    """Whether what is made from a stage's artifact is made from its data: a model's data is not that of its fine-tuning."""
    return is_data(stage) or stage.startswith("shards")


def stage_tags(stage: str, name: str, fingerprint: str) -> dict[str, str]:
    """Tags of a stage's run from its first moment."""
    return {"gptcore.stage": stage, "gptcore.name": name, "gptcore.fingerprint": fingerprint}


def is_number(value: Any) -> bool:
    """Whether MLflow can keep it as a metric."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def metric_key(key: str) -> str:
    """A name that MLflow allows."""
    return re.sub(r"[^\w\-./ :]", "_", key)[:250]


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `section.key` -> text; a list of plain values stays one entry."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            flat |= flattened({str(index): item for index, item in enumerate(value)}, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            flat[metric_key(f"{prefix}{key}")] = text
    return flat
