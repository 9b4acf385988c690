"""MLflow follows a run, never the other way round: whatever happens to MLflow, stages neither wait nor fail.

A training is followed by a thread of its own, so that a server which hangs holds up nobody; all else costs at most one timeout
for each time that the breaker lets MLflow be tried. What could not be shipped is tried once more at the end of the run.

One experiment per pipeline name, one run per pipeline run, under it one run per stage that was built. What was shipped stands
in a record per recipe (`tasks/ledger.py`); finishing and reusing a stage ship what is missing, so a run that was killed, or
could not reach MLflow, is completed by the next one. mlflow is imported when it is first needed.
"""

import contextlib
import getpass
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock

from gptcore.artifacts import MANIFEST, REPORT, Artifact, Recipe, load_artifact, write_json
from gptcore.errors import Interrupted, SettingsError
from tasks.active import MLFLOW, settle_dead_runs
from tasks.breaker import Breaker, Say
from tasks.contents import Contents, flattened, is_number, metric_key, stage_tags
from tasks.ledger import FAILED, FINISHED, RUNNING, Point, Record, record_of_digest, record_path
from tasks.shipment import Shipment, ship_journal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from pandas import DataFrame

Result = TypeVar("Result")

_FOLLOW = 2.0
"""Shortest time in seconds between two shipments of one journal."""
_ENVIRONMENT = {
    # No retries of the client's own: each would wait another timeout, and a server that was only slow would do a thing twice.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",  # or a uv.lock of the working folder travels with every model
}

_EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's pages show an experiment of trainings, not one of prompts and traces."""


class Connection:
    """The MLflow of a home, or the one that MLFLOW_TRACKING_URI names. Raises `SettingsError` for one that cannot work."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._client: MlflowClient | None = None
        self._existing: set[str] = set()
        self._database = home / "mlflow.db"
        self.uri = _checked("MLFLOW_TRACKING_URI") or f"sqlite:///{self._database}"

    @property
    def is_private(self) -> bool:
        """Whether it is the database of this home."""
        return self.uri == f"sqlite:///{self._database}"

    @property
    def artifacts(self) -> str:
        """Where artifacts of the home's own MLflow lie."""
        return (self.home / "mlartifacts").as_uri()

    @property
    def address(self) -> str:
        """The URI as it may be shown: without a password."""
        return re.sub(r"//.*@", "//", self.uri)  # greedy: a password may hold a slash or another @

    @property
    def client(self) -> "MlflowClient":
        """The client; the first use imports mlflow and creates the home's database."""
        if self._client is None:
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            from mlflow import MlflowClient

            if self.is_private:
                self._create_database()
            registry = _checked("MLFLOW_REGISTRY_URI") or self.uri
            self._client = MlflowClient(tracking_uri=self.uri, registry_uri=registry)
        return self._client

    @property
    def entities(self) -> Any:
        """`mlflow.entities`, the things that the client is given."""
        import mlflow.entities

        return mlflow.entities

    def _create_database(self) -> None:
        """One process creates it, under another name: two migrations at once fail, and a killed one leaves half a database."""
        if self._database.exists():
            return  # before the lock: its file may not fit on a full disk
        with FileLock(self.home / "mlflow.lock"):
            if self._database.exists():
                return
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            logging.getLogger("alembic").setLevel(logging.WARNING)
            unfinished = self._database.with_suffix(".new")
            unfinished.unlink(missing_ok=True)
            SqlAlchemyStore(f"sqlite:///{unfinished}", self.artifacts).engine.dispose()  # type: ignore[no-untyped-call]
            unfinished.rename(self._database)

    @contextlib.contextmanager
    def as_global(self) -> Iterator[None]:
        """Some of MLflow's calls look at the process-wide URI, whatever client they belong to."""
        import mlflow

        before = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(self.uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # forgets it, and takes it out of the environment
            if before is not None:
                os.environ["MLFLOW_TRACKING_URI"] = before

    def exists(self, run_id: str) -> bool:
        """Whether MLflow still has a run."""
        if run_id not in self._existing:
            run = self.find(self.client.get_run, run_id)
            if run is None or run.info.lifecycle_stage == "deleted":
                return False
            self._existing.add(run_id)
        return True

    def has_model(self, model_id: str) -> bool:
        """Whether MLflow still has a LoggedModel."""
        return self.find(self.client.get_logged_model, model_id) is not None

    def find(self, get: Callable[[str], Result], name: str) -> Result | None:
        """What one of the client's `get_...` returns; None when MLflow does not have it."""
        from mlflow import MlflowException

        try:
            return get(name)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                return None
            raise

    def experiment(self, name: str) -> str:
        """Id of an experiment, created when it is new and restored when it was deleted."""
        client = self.client
        with FileLock(self.home / "mlflow.lock"):
            found = client.get_experiment_by_name(name)
            if found is None:
                place = f"{self.artifacts}/{name}" if self.is_private else None
                return str(client.create_experiment(name, artifact_location=place, tags=_EXPERIMENT))
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)

    def log_settings(self, run_id: str, settings: Mapping[str, Any]) -> None:
        """Log settings as parameters, 100 a call and 500 in all; the same value may come again."""
        parameters = [self.entities.Param(key, value[:6000]) for key, value in flattened(settings).items()][:500]
        for start in range(0, len(parameters), 100):
            self.client.log_batch(run_id, params=parameters[start : start + 100], synchronous=True)

    def log_points(
        self, run_id: str, points: Sequence[Point], model_id: str | None = None, dataset: Mapping[str, Any] | None = None
    ) -> None:
        """Metrics of a run; with `model_id` of that model too, measured on `dataset`. The same point may come again."""
        about = {"model_id": model_id, "run_id": run_id} if model_id else {}
        if model_id and dataset:
            about |= {"dataset_name": dataset["name"], "dataset_digest": dataset["digest"]}
        metrics = [self.entities.Metric(metric_key(p.key), p.value, p.timestamp, p.step, **about) for p in points]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(run_id, metrics=metrics[start : start + 1000], synchronous=True)

    def describe(self, frame: "DataFrame", folder: Path, name: str, digest: str) -> dict[str, Any]:
        """Columns and place of a dataset, as MLflow's `Dataset` wants them."""
        from mlflow.data.pandas_dataset import from_pandas

        schema = from_pandas(frame, name=name, digest=digest).schema
        return {
            "name": name,
            "digest": digest,
            # Said outright: MLflow finds two equal readings of a path and warns of its choice.
            "source_type": "local",
            "source": json.dumps({"uri": str(folder)}),
            "schema": json.dumps({"mlflow_colspec": schema.to_dict()}) if schema else None,
        }


def _checked(variable: str) -> str | None:
    """The address that a variable of the environment holds, if any."""
    uri = os.environ.get(variable)
    if not uri:
        return None
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        raise SettingsError(
            f"{variable} is {uri!r}, but MLflow 3 keeps no runs in plain folders; "
            "set it to sqlite:///PATH.db or to a server's http address, or unset it"
        )
    if parts.scheme in ("http", "https") and "@" in parts.netloc:
        raise SettingsError(
            f"{variable} holds a user or password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        )
    return uri


class Tracking:
    """What a pipeline run tells MLflow. No method raises, or waits longer than one timeout; `say` hears of trouble once.

    The upload of a model may wait longer, as its size asks for (`tasks/shipment.py`).
    """

    def __init__(self, home: Path, experiment: str, say: Say = lambda _: None) -> None:
        self.home = home
        self.experiment = experiment
        self.connection = Connection(home)
        self._breaker = Breaker(f"MLflow at {self.connection.address}", say)
        self.parent_id: str | None = None
        """MLflow's id of this pipeline run, once it is known."""
        self._build = uuid.uuid4().hex
        self._known: Callable[[str], None] = lambda _: None
        self._experiment_id: str | None = None
        self._config: Mapping[str, Any] = {}
        self._tags: dict[str, str] = {}
        self._started: int | None = None
        self._title: str | None = None
        self._above: dict[str, str] = {}
        self._linked: set[str] = set()
        self._followed: dict[Path, float] = {}
        self._follower: threading.Thread | None = None
        self._owed: list[tuple[Artifact, Artifact | None]] = []
        """Finished stages that could not be shipped yet."""

    # ---------------------------------------------------------------------------------------------- pipeline run --

    def start_pipeline(
        self,
        config: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        *,
        title: str | None = None,
        parent: str | None = None,
        known: Callable[[str], None] = lambda _: None,
    ) -> str | None:
        """Begin the run that holds the stages' runs; its id, or None while MLflow cannot be used.

        `tags` (`gptcore.prefect_flow_run_id` and the like) stand on it and on every stage's run; `title` is its name,
        and `parent` the run that it stands under, such as a sweep's. `known` hears its id, now or when MLflow can be used.
        Sets right what runs that died, or could not reach MLflow at their end, have left behind.
        """
        self._title, self._above = title, {"mlflow.parentRunId": parent} if parent else {}
        self._config, self._tags, self._started, self._known = config, dict(tags or {}), _now(), known
        self.settle()
        return self._breaker.attempt(self._parent)

    def settle(self) -> None:
        """Set right what runs that died, or could not reach MLflow at their end, have left behind."""
        self._breaker.attempt(self._settle)

    def end_pipeline(
        self, status: str = "FINISHED", metrics: Mapping[str, float] | None = None, report: Path | None = None
    ) -> None:
        """End it as FINISHED, FAILED or KILLED, with headline numbers and the results page (a file or a folder).

        Stages that could not be shipped when they finished are tried once more before, whatever happened to MLflow since.
        """
        ended = _now()
        self._wait_for_follower()
        owed, self._owed = self._owed, []
        if owed:
            self._breaker.retry_now()
        for artifact, evaluated in owed:
            self._breaker.attempt(self.ship, artifact, evaluated)
        if self.parent_id is not None:
            self._note_end(self.parent_id, status, ended)
        self._breaker.attempt(self._end_pipeline, status, ended, metrics or {}, report)

    def _end_pipeline(self, status: str, ended: int, metrics: Mapping[str, float], report: Path | None) -> None:
        parent, client = self._parent(), self.connection.client
        if parent is None:
            return
        numbers = [Point(key, 0, float(value), ended) for key, value in metrics.items() if is_number(value)]
        self.connection.log_points(parent, numbers)
        if report is not None and report.is_dir():
            client.log_artifacts(parent, str(report), REPORT)
        elif report is not None:
            client.log_artifact(parent, str(report), REPORT)
        self._end(parent, status, ended)

    def _parent(self) -> str | None:
        """The pipeline's run, created when MLflow can first be used."""
        if self.parent_id is None and self._started is not None:
            client = self.connection.client
            # An answer that was lost on its way may have left one.
            ours = client.search_runs([self._experiment], f"tags.`gptcore.build` = '{self._build}'", max_results=1)
            run = ours[0] if ours else self._new_parent(self._started)
            self._known(run.info.run_id)
            self.connection.log_settings(run.info.run_id, self._config)
            client.log_dict(run.info.run_id, dict(self._config), "settings.yaml")
            self.parent_id = run.info.run_id
        return self.parent_id

    def _new_parent(self, started: int) -> "Run":
        name = self._title or time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started / 1000))
        tags = {**_who(), **self._tags, **self._above, "gptcore.build": self._build}
        return self.connection.client.create_run(self._experiment, start_time=started, run_name=name, tags=tags)

    def _settle(self) -> None:
        """End in MLflow what has ended: runs whose process is gone, and runs whose end MLflow did not hear of."""
        for note in (self.home / "tracking" / "ended").glob("*.json"):
            values = json.loads(note.read_text())
            if values.get("uri", self.connection.address) != self.connection.address:
                continue  # of another MLflow, which hears of it when it is used again
            self._end(note.stem, values["status"], values["ended"])
        settle_dead_runs(self.home, MLFLOW, self._kill)

    def _kill(self, run_id: str) -> None:
        if not self.connection.exists(run_id):
            return
        client = self.connection.client
        experiment = client.get_run(run_id).info.experiment_id
        only = f"attributes.status = 'RUNNING' AND tags.mlflow.parentRunId = '{run_id}'"
        for run in client.search_runs([experiment], only):
            client.set_terminated(run.info.run_id, "KILLED")
        client.set_terminated(run_id, "KILLED")

    def _note_end(self, run_id: str, status: str, ended: int) -> None:
        folder = self.home / "tracking" / "ended"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"{run_id}.json", {"status": status, "ended": ended, "uri": self.connection.address})

    def _end(self, run_id: str, status: str, ended: int) -> None:
        if self.connection.exists(run_id):
            self.connection.client.set_terminated(run_id, status, end_time=ended)
        (self.home / "tracking" / "ended" / f"{run_id}.json").unlink(missing_ok=True)

    # ---------------------------------------------------------------------------------------------------- stages --

    def start_stage(self, recipe: Recipe) -> None:
        """A stage is about to be built: begin its run, or continue the one that a killed or interrupted build left."""
        self._wait_for_follower()
        record = Record.load(record_path(self.home, recipe))
        if record is None or record.status != RUNNING or record.uri != self.connection.address:
            record = self._new_record(recipe)
            with contextlib.suppress(OSError):  # a full disk: whoever needs the room for the result says so
                record.save()
        self._breaker.attempt(self._begin, record, recipe)

    def follow(self, recipe: Recipe, journal: Path) -> None:
        """Have shipped what the journal holds since the last call; returns at once, so call it as often as you like."""
        path = record_path(self.home, recipe)
        now = time.monotonic()
        busy = self._follower is not None and self._follower.is_alive()
        if busy or now - self._followed.get(path, -_FOLLOW) < _FOLLOW:
            return
        self._followed[path] = now
        # No pool: a signal while one starts its thread leaves a thread that nobody ends, and the process waits for it forever.
        ship = (self._follow, recipe, journal)
        self._follower = threading.Thread(target=self._breaker.attempt, args=ship, name="mlflow", daemon=True)
        self._follower.start()

    def _wait_for_follower(self) -> None:
        """Nobody else touches a stage's record while the follower may: wait, at most one timeout, until it is done."""
        if self._follower is not None and self._follower.ident is not None:  # a signal may have come before it began
            self._follower.join()
        self._follower = None

    def fail_stage(self, recipe: Recipe, error: BaseException, *, resumable: bool) -> None:
        """Building ended early: KILLED if somebody stopped it, else FAILED. The next build continues a resumable one's run."""
        self._wait_for_follower()
        record = Record.load(record_path(self.home, recipe))
        if record is None:
            return
        record.status = RUNNING if resumable else FAILED
        with contextlib.suppress(OSError):
            record.save()
        if record.run_id is not None:
            failed = isinstance(error, Exception) and not isinstance(error, Interrupted)
            status, ended = "FAILED" if failed else "KILLED", _now()
            self._note_end(record.run_id, status, ended)
            self._breaker.attempt(self._fail, record.run_id, status, ended, str(error))

    def finish_stage(self, artifact: Artifact, evaluated: Artifact | None = None) -> None:
        """Ship all of a stage that was built; an evaluation's numbers stand on the model `evaluated` too."""
        self._ship_now_or_later(artifact, evaluated)

    def reuse_stage(self, artifact: Artifact) -> None:
        """Link a stage that was found finished to the run that built it, and ship what MLflow lacks of it."""
        self._ship_now_or_later(artifact, None)

    def _ship_now_or_later(self, artifact: Artifact, evaluated: Artifact | None) -> None:
        self._wait_for_follower()
        if self._breaker.attempt(self.ship, artifact, evaluated) is None:
            self._owed.append((artifact, evaluated))

    def ship(self, artifact: Artifact, evaluated: Artifact | None = None) -> Record:
        """Bring MLflow up to date with a finished artifact. Unlike the rest, raises what MLflow raises."""
        path = record_path(self.home, artifact)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=60):
            record = Record.load(path)
            if (
                record is None
                or record.status == FAILED
                or record.uri != self.connection.address
                or record.digest not in (None, artifact.digest)
            ):
                record = self._new_record(artifact)
            self._ensure_run(record, lambda: Contents(artifact).started)
            if record.status != FINISHED:
                self._ship(record, Contents(artifact), evaluated)
            self._link(record)
            return record

    def ship_model(self, artifact: Artifact) -> str:
        """Id of the LoggedModel of a finished artifact, shipped first if need be. Raises what MLflow raises."""
        record = self.ship(artifact)
        if record.model_id is None or not self.connection.has_model(record.model_id):
            record.status, record.model_id = RUNNING, None
            record.shipped.remove("models")
            record.save()
            record = self.ship(artifact)
        assert record.model_id is not None, f"{artifact.stage} holds no model"
        self._breaker.retry_now()  # it answered
        return record.model_id

    def _ship(self, record: Record, contents: Contents, evaluated: Artifact | None) -> None:
        model_id = self._evaluated_model(contents, evaluated)
        Shipment(self.connection, record, contents, self._tags, model_id).run()
        assert record.run_id is not None
        self._end(record.run_id, "FINISHED", contents.ended)
        record.status, record.digest = FINISHED, contents.artifact.digest
        record.save()

    def _evaluated_model(self, contents: Contents, evaluated: Artifact | None) -> str | None:
        """The LoggedModel that an evaluation is about: of the artifact that was given, else of its inputs."""
        if evaluated is not None:
            known = record_of_digest(self.home, evaluated.digest)
            if known is None and (evaluated.path / MANIFEST).is_file():
                self.ship(load_artifact(evaluated.path))
        elif not contents.artifact.stage.startswith("evaluation"):
            return None
        for digest in [evaluated.digest] if evaluated is not None else contents.manifest["inputs"].values():
            record = record_of_digest(self.home, digest)
            if record is not None and record.model_id is not None and self.connection.has_model(record.model_id):
                return record.model_id
        return None

    # --------------------------------------------------------------------------------------------- a stage's run --

    def _new_record(self, what: Recipe | Artifact) -> Record:
        path = record_path(self.home, what)
        return Record(path, what.stage, what.name, what.fingerprint, uri=self.connection.address)

    def _begin(self, record: Record, recipe: Recipe) -> None:
        if not self._ensure_run(record, _now):
            self._continue(record)
        assert record.run_id is not None
        self.connection.log_settings(record.run_id, recipe.settings)
        self._link(record)

    def _ensure_run(self, record: Record, started: Callable[[], int]) -> bool:
        """Give a record its run; whether it is a new one. If its run was deleted, or the whole database, it starts anew."""
        client = self.connection.client
        if record.run_id is not None:
            if self.connection.exists(record.run_id):
                return False
            record.forget()
        record.save()
        ours = client.search_runs([self._experiment], f"tags.`gptcore.build` = '{record.build}'", max_results=1)
        run = ours[0] if ours else self._new_run(record, started())
        record.run_id, record.parent_id = run.info.run_id, run.data.tags.get("mlflow.parentRunId")
        record.save()
        return not ours

    def _new_run(self, record: Record, started: int) -> "Run":
        parent = self._parent()
        tags = {
            **_who(),
            **self._tags,
            **stage_tags(record.stage, record.name, record.fingerprint),
            "gptcore.build": record.build,
            **({"mlflow.parentRunId": parent} if parent else {}),
        }
        return self.connection.client.create_run(self._experiment, start_time=started, tags=tags, run_name=record.stage)

    def _continue(self, record: Record) -> None:
        """Take a stage's run over from a process that is gone."""
        client, parent, run_id = self.connection.client, self._parent(), record.run_id
        assert run_id is not None
        (self.home / "tracking" / "ended" / f"{run_id}.json").unlink(missing_ok=True)
        client.update_run(run_id, status="RUNNING")
        data = client.get_run(run_id).data
        if "gptcore.error" in data.tags:
            client.delete_tag(run_id, "gptcore.error")  # what ended an earlier attempt; this one goes on
        for key in data.metrics:
            # It may have been killed between shipping and noting it.
            shipped = max(metric.step for metric in client.get_metric_history(run_id, key))
            record.last_step[key] = max(shipped, record.last_step.get(key, -1))
        if parent is not None and record.parent_id != parent:
            if record.parent_id is not None and self.connection.exists(record.parent_id):
                client.set_tag(record.parent_id, "gptcore.continued_by", parent)
                client.set_tag(parent, "gptcore.continues", record.parent_id)
            client.set_tag(run_id, "mlflow.parentRunId", parent)
            record.parent_id = parent
        record.save()

    def _link(self, record: Record) -> None:
        """The first run of a stage is the pipeline's own; a champion that is evaluated again for comparison comes later."""
        parent = self._parent()
        if parent is not None and record.run_id is not None and record.stage not in self._linked:
            self.connection.client.set_tag(parent, f"gptcore.stage.{record.stage}", record.run_id)
            self._linked.add(record.stage)

    def _fail(self, run_id: str, status: str, ended: int, reason: str) -> None:
        if self.connection.exists(run_id):
            self.connection.client.set_tag(run_id, "gptcore.error", reason[:5000])
        self._end(run_id, status, ended)

    def _follow(self, recipe: Recipe, journal: Path) -> None:
        record = Record.load(record_path(self.home, recipe))
        if record is None or record.status != RUNNING:
            return
        if record.run_id is None:
            self._begin(record, recipe)
        ship_journal(self.connection, record, journal)

    @property
    def _experiment(self) -> str:
        if self._experiment_id is None:
            self._experiment_id = self.connection.experiment(self.experiment)
        return self._experiment_id


def _who() -> dict[str, str]:
    """Tags that MLflow's pages show in their own columns."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no name for this user id, as in some containers
        user = str(os.getuid())
    return {"mlflow.user": user, "mlflow.source.name": "gptcore", "mlflow.source.type": "LOCAL"}


def _now() -> int:
    return round(time.time() * 1000)
