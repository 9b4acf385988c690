"""One calm display on standard error: a line per stage that stays, and one line that moves while the trainer works."""

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from flows.tables import count, duration, some
from gptcore.artifacts import Artifact

if TYPE_CHECKING:
    pass


class Terminal:
    """Shows a run to a person. Without a terminal (a log file, CI) only the lines that stay are written."""

    def __init__(self, file: TextIO | None = None) -> None:
        file = file or sys.stderr
        # A log file has no width of its own.
        self.console = Console(file=file, highlight=False, width=None if file.isatty() else 150)
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", justify="left"), BarColumn(bar_width=24), _Facts(),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task: Any = None
        self._steps, self._seen = 0, (0, 0.0)
        self._said_at = 0.0

    def __enter__(self) -> "Terminal":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, stage: str) -> None:
        """A stage is being built."""
        self._remove()
        self._steps, self._seen = 0, (0, 0.0)
        self._task = self._progress.add_task(stage, total=None, facts="")

    def journal(self, stage: str, line: Mapping[str, Any]) -> None:
        """A line of the trainer's journal: what happened stays, what was measured moves the bar."""
        if line["kind"] == "event":
            self._event(stage, line)
        elif self._task is not None and "train/loss" in line["values"]:
            values = line["values"]
            speed, loss = values["tokens_per_second"], values["train/loss"]
            left = (self._steps - line["step"]) * values["tokens"] / max(1, line["step"]) / max(1.0, speed)
            facts = f"step {line['step']}/{self._steps}  loss {loss:.3f}  {count(speed)} tokens/s  {duration(left)} left"
            self._progress.update(self._task, completed=line["step"], total=self._steps, facts=facts)
            if not self.console.is_terminal and time.monotonic() - self._said_at > 30:
                self._said_at = time.monotonic()
                self.say(f"  {stage}: {facts}")

    def _event(self, stage: str, line: Mapping[str, Any]) -> None:
        self._steps = line.get("steps", self._steps)  # resolved, resumed and restarted tell how many there are
        if line["event"] not in ("checkpoint", "finished"):
            self.say(f"  [dim]{stage}: {escape(line['text'])}[/dim]")

    def done(self, artifact: Artifact) -> None:
        """A stage is there."""
        self._remove()
        how = "[cyan]reused[/cyan]" if artifact.reused else f"[green]built[/green] in {duration(artifact.seconds)}"
        self.say(f"[bold]{artifact.stage:<22}[/bold] {how:<28}  [dim]{escape(some(artifact.numbers))}[/dim]")

    def say(self, text: str) -> None:
        """A line that stays; rich's markup is allowed."""
        self.console.print(text)

    def _remove(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


class _Facts(ProgressColumn):
    def render(self, task: Task) -> Text:
        elapsed = f"{duration(task.elapsed or 0)}"
        return Text(task.fields.get("facts") or elapsed, style="dim")
