"""The tasks there are. A new one is a file beside this one and a line in `TASKS`."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from gptcore.config import TaskConfig
from gptcore.corpus.document import Document
from gptcore.downstream import classify, summarize
from gptcore.downstream.row import Found


class Task(NamedTuple):
    """What a type of task is made of."""

    find_rows: Callable[[Iterable[Document], TaskConfig], Found]
    headline: tuple[str, bool]
    reasons: Mapping[str, str]
    """Why a document is no row: what the reason says of it, as the end of a sentence."""


TASKS = {
    "summarize": Task(summarize.find_rows, summarize.HEADLINE, summarize.REASONS),
    "classify": Task(classify.find_rows, classify.HEADLINE, classify.REASONS),
}


def headline(task_type: str) -> tuple[str, bool]:
    """The metric that decides between two models of a type of task, and whether higher is better."""
    return TASKS[task_type].headline
