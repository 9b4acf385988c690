"""Prefect's view of a run: a bar that moves while the trainer works, and the results page. Never in the way of either."""

import contextlib
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from gptcore.artifacts import Artifact
from tasks.breaker import Breaker, Say
from tasks.run import Watcher

_EVERY = 5.0
"""Shortest time in seconds between two changes of a bar."""
_LOG_EVERY = 60.0
"""Seconds between two lines of the log that tell how far a training is."""


class Logged:
    """A watcher whose every word stands in Prefect's log too: the UI and `gptcore logs` tell what a terminal told."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def stage(self, stage: str) -> None:
        """A stage is being built."""
        self._watcher.stage(stage)
        _log(f"{stage}: building")

    def journal(self, stage: str, line: dict[str, Any]) -> None:
        """The trainer wrote a line; what happened is logged, what was measured moves the bar."""
        self._watcher.journal(stage, line)
        if line["kind"] == "event":
            _log(f"{stage}: {line['text']}")

    def done(self, artifact: Artifact) -> None:
        """A stage is there, built or reused."""
        self._watcher.done(artifact)
        _log(f"{artifact.stage}: {'reused' if artifact.reused else f'built in {artifact.seconds:.1f} s'}, {artifact.path}")

    def say(self, text: str) -> None:
        """Something worth a line."""
        self._watcher.say(text)
        _log(text)


def _log(text: str) -> None:
    with contextlib.suppress(MissingContextError):  # a plan, or a function that is called alone
        get_run_logger().info(text)


class ProgressBar:
    """A progress artifact that follows a training's journal: step, loss, speed and time left."""

    def __init__(self, stage: str, name: str, say: Say) -> None:
        self.stage, self.name = stage, name
        self._breaker = Breaker("Prefect's progress artifact", say)
        self._artifact: UUID | None = None
        self._steps, self._moved, self._logged = 0, -_EVERY, time.monotonic()

    def journal(self, line: Mapping[str, Any]) -> None:
        """A line of the trainer's journal."""
        self._steps = line.get("steps", self._steps)
        values, step = line.get("values", {}), int(line["step"])
        now = time.monotonic()
        if "train/loss" not in values or not self._steps or not flow_run.get_id():
            return
        if now - self._moved >= _EVERY or step == self._steps:
            self._moved = now
            words = self._words(step, values)
            self._breaker.attempt(self._move, 100.0 * step / self._steps, words)
            if now - self._logged >= _LOG_EVERY:
                self._logged = now
                _log(words)

    def _words(self, step: int, values: Mapping[str, float]) -> str:
        seconds = (self._steps - step) * values["tokens"] / max(1, step) / max(1.0, values["tokens_per_second"])
        return (
            f"{self.stage} of {self.name}: step {step} of {self._steps}, loss {values['train/loss']:.3f}, "
            f"{values['tokens_per_second']:,.0f} tokens/s, {seconds:,.0f} s left"
        )

    def _move(self, percent: float, words: str) -> None:
        if self._artifact is None:
            key = artifact_key(f"{self.stage}-of-{self.name}")
            made = create_progress_artifact(percent, key=key, description=words)
            assert isinstance(made, UUID), "tasks are not async"
            self._artifact = made
        else:
            update_progress_artifact(self._artifact, percent, description=words)


def show_mlflow(address: str | None, run_id: str | None, name: str, say: Say) -> None:
    """A link from the flow run to its MLflow run, where MLflow has pages."""
    if address is None or run_id is None or not flow_run.get_id():
        return
    link = f"{address}/#/runs/{run_id}"
    key = artifact_key(f"mlflow-of-{name}")
    Breaker("Prefect's link to MLflow", say).attempt(create_link_artifact, link, link_text="the run in MLflow", key=key)


def show_results(page: Path, name: str, say: Say) -> None:
    """The results page as an artifact of the flow run, without its pictures, which stay beside the page and in MLflow."""
    if not flow_run.get_id():
        return
    text = re.sub(r"^!\[.*\]\(.*\)\n+", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    key = artifact_key(f"results-of-{name}")
    Breaker("Prefect's results artifact", say).attempt(create_markdown_artifact, text, key=key, description=str(page))


def show_table(rows: list[dict[str, Any]], key: str, description: str, say: Say) -> None:
    """A table as an artifact of the flow run."""
    if flow_run.get_id():
        shown = Breaker("Prefect's table artifact", say)
        shown.attempt(create_table_artifact, table=rows, key=artifact_key(key), description=description)


def artifact_key(text: str) -> str:
    """What Prefect takes as a key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
