"""Around every flow: the home, who watches, MLflow's parent run, and a clean end however the run ends."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.runtime import flow_run

from flows.operations.server import use_server
from flows.operations.services import mlflow_pages
from gptcore.artifacts import Store, home_folder
from gptcore.config import PipelineConfig
from gptcore.training.process import rendezvous
from tasks.active import ActiveRun
from tasks.progress import Logged, show_mlflow
from tasks.run import Run, Silent, Watcher
from tasks.tracking import Tracking


@dataclass(frozen=True)
class Options:
    """What the person at the command line wants beside the settings; a scheduled run has the defaults."""

    watcher: Watcher = field(default_factory=Silent)
    rebuild: frozenset[str] = frozenset()


OPTIONS: ContextVar[Options] = ContextVar("options", default=Options())  # noqa: B039  (frozen)


@dataclass(frozen=True)
class Place:
    """Where a run stands in MLflow when it is not a pipeline's own."""

    title: str | None = None
    """Unset: the time it began."""
    parent: str | None = None
    """The MLflow run that it is a part of."""
    settings: Mapping[str, Any] | None = None
    """What stands there as its settings. Unset: the pipeline's."""


@contextmanager
def recorded(home: Path, name: str) -> Iterator[ActiveRun]:
    """The record of a flow run, by which it is found, cancelled, and set right when it is killed."""
    with use_server(home), ActiveRun(home, name) as active:
        active.note(prefect_flow_run_id=str(flow_run.get_id() or ""))
        yield active


@contextmanager
def open_run(config: PipelineConfig, place: Place = Place()) -> Iterator[Run]:
    """The run that tasks are handed, inside a Prefect flow. MLflow's parent run begins and ends with the block."""
    options = OPTIONS.get()
    for training in (config.training, *(task.training for task in config.tasks)):
        rendezvous(training)  # an address is no setting: it is looked for before the long work, too
    store = Store(home_folder())
    watcher = Logged(options.watcher)
    tracking = Tracking(store.home, config.name, watcher.say)
    run = Run(store, watcher, tracking, options.rebuild)
    with recorded(store.home, config.name) as active:
        tags = {
            "gptcore.prefect_flow_run_id": str(flow_run.get_id() or ""),
            "gptcore.prefect_flow_run_url": flow_run.ui_url or "",
        }
        if flow_run.ui_url:  # MLflow's pages show it as a link
            tags["mlflow.note.content"] = f"[The run in Prefect]({flow_run.ui_url})"
        settings = place.settings or config.model_dump(mode="json")
        run_id = tracking.start_pipeline(
            settings, tags, title=place.title, parent=place.parent, known=lambda run_id: active.note(mlflow_run_id=run_id)
        )
        show_mlflow(mlflow_pages(store.home), run_id, config.name, watcher.say)
        try:
            yield run
        except BaseException as error:
            tracking.end_pipeline("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        tracking.end_pipeline("FINISHED", run.metrics, run.results)


def plan_run() -> Run:
    """A run that builds nothing and notes what it would do."""
    return Run(Store(home_folder()), Silent(), rebuild=OPTIONS.get().rebuild, planning=True)
