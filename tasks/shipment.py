"""A finished artifact on its way to MLflow, part by part.

Every part may be shipped twice without harm and is noted in the record once it is there, so that a shipment which was cut
short is completed later. What is sent stands in `tasks/contents.py`, how in `Connection`.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.artifacts import MANIFEST, REPORT
from tasks.contents import DIGEST, Contents, carries_data, flattened, is_number
from tasks.ledger import Point, Record, record_of_digest, unshipped

if TYPE_CHECKING:
    from tasks.tracking import Connection

_UPLOAD = 20 * 2**20
"""Bytes a second at which a server must at least take a model in: it answers only when all of it lies in its place."""
_SAMPLE_ROWS = 1000
"""Rows from which MLflow learns a dataset's columns."""


class Shipment:
    """What MLflow lacks of one artifact. `evaluated` is the LoggedModel that its numbers are about, if there is one."""

    def __init__(
        self, connection: "Connection", record: Record, contents: Contents, tags: Mapping[str, str], evaluated: str | None
    ) -> None:
        assert record.run_id is not None, "a shipment goes to a run"
        self.connection = connection
        self.record = record
        self.run_id = record.run_id
        self.contents = contents
        self.tags = {**tags, **contents.tags}
        self.evaluated = evaluated

    def run(self) -> None:
        """Ship what is missing."""
        parts: dict[str, Callable[[], None]] = {
            "settings": self._settings,
            "data": self._data,
            "report": self._report,
            "journal": self._journal,
            "numbers": self._numbers,
            "models": self._models,
        }
        for part, ship in parts.items():
            if part not in self.record.shipped:
                ship()
                self.record.shipped.append(part)
                self.record.save()

    def _settings(self) -> None:
        self.connection.log_settings(self.run_id, self.contents.manifest["settings"])
        tags = [self.connection.entities.RunTag(key, value) for key, value in self.tags.items()]
        self.connection.client.log_batch(self.run_id, tags=tags, synchronous=True)

    def _data(self) -> None:
        """Data as MLflow inputs: a corpus or examples themselves; for all else what it was made from."""
        if self.contents.is_data:
            self.record.datasets = [self._dataset()]
        else:
            inputs = [record for record in self._inputs() if carries_data(record.stage)]
            self.record.datasets = list({data["digest"]: data for record in inputs for data in record.datasets}.values())
        entities = self.connection.entities
        context = [entities.InputTag("mlflow.data.context", self.record.stage)]
        datasets = [entities.DatasetInput(entities.Dataset(**data), context) for data in self.record.datasets]
        if datasets:
            self.connection.client.log_inputs(self.run_id, datasets=datasets)

    def _inputs(self) -> list[Record]:
        digests = self.contents.manifest["inputs"].values()
        return [record for digest in digests if (record := record_of_digest(self.connection.home, digest))]

    def _dataset(self) -> dict[str, Any]:
        """The MLflow dataset of rows of text. Some rows are read, for its columns; its digest is the artifact's."""
        import pyarrow.parquet

        artifact = self.contents.artifact
        folder = artifact.path / "data"
        files = sorted(folder.glob("*.parquet"))
        table = pyarrow.parquet.ParquetFile(files[-1])
        empty = table.schema_arrow.empty_table()  # as a split of new text may be
        frame = next(table.iter_batches(batch_size=_SAMPLE_ROWS), empty).to_pandas()
        rows = sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
        numbers = {key: value for key, value in artifact.numbers.items() if is_number(value)}
        dataset = self.connection.describe(frame, folder, f"{artifact.name}-{artifact.stage}", artifact.digest[:DIGEST])
        return {**dataset, "profile": json.dumps({"num_rows": rows, **numbers})}

    def _report(self) -> None:
        client = self.connection.client
        client.log_artifact(self.run_id, str(self.contents.artifact.path / MANIFEST))
        if self.contents.report.is_dir():
            client.log_artifacts(self.run_id, str(self.contents.report), REPORT)

    def _journal(self) -> None:
        ship_journal(self.connection, self.record, self.contents.journal)

    def _numbers(self) -> None:
        """Numbers on the run, and those of an evaluation on the model that was evaluated too."""
        self._log(self._fresh_numbers(), self.evaluated)

    def _fresh_numbers(self) -> list[Point]:
        """The artifact's numbers, without those that the journal has told already."""
        return [point for point in self.contents.numbers if point.step > self.record.last_step.get(point.key, -1)]

    def _models(self) -> None:
        """The artifact's own model with its files, and an entry for every other checkpoint that was kept."""
        if self.contents.model is None:
            return
        kept = self.contents.kept
        for checkpoint in kept[:-1]:
            self._log(checkpoint.points, self._model(checkpoint.step, checkpoint.path))
        step = kept[-1].step if kept else 0
        self.record.model_id = self._model(step)
        self._log((kept[-1].points if kept else []) + self._fresh_numbers(), self.record.model_id)

    def _log(self, points: list[Point], model_id: str | None) -> None:
        dataset = self.record.datasets[0] if self.record.datasets else None
        self.connection.log_points(self.run_id, points, model_id, dataset)

    def _model(self, step: int, checkpoint: Path | None = None) -> str:
        """A LoggedModel, found again if it was begun before. The files of a checkpoint stay where they are."""
        assert self.contents.model is not None
        client, (kind, folder) = self.connection.client, self.contents.model
        run = client.get_run(self.run_id)
        own = f"tags.`gptcore.build` = '{self.record.build}' AND tags.`gptcore.step` = '{step}'"
        found = client.search_logged_models([run.info.experiment_id], filter_string=own, max_results=1)
        model = found[0] if found else self._new_model(run.info.experiment_id, kind, step, checkpoint)
        if model.status.name != "READY":
            known = {output.model_id for output in (run.outputs.model_outputs if run.outputs else [])}
            if model.model_id not in known:
                client.log_outputs(self.run_id, [self.connection.entities.LoggedModelOutput(model.model_id, step)])
            if checkpoint is None:
                from tasks.pyfunc_model import upload_model

                with time_for(folder):
                    upload_model(client, model, kind, folder, self.connection.home / "cache")
            client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _new_model(self, experiment: str, kind: str, step: int, checkpoint: Path | None) -> Any:
        record = self.record
        name = record.name if record.stage == "base" else f"{record.name}-{record.stage.removeprefix('finetune-')}"
        tags = {**self.tags, "gptcore.build": record.build, "gptcore.step": str(step)}
        if checkpoint is not None:
            name = f"{name}-step-{step:06d}"
            tags |= {"gptcore.path": str(checkpoint), "mlflow.model.isExternal": "true"}
        settings = flattened(self.contents.manifest["settings"])
        return self.connection.client.create_logged_model(
            experiment,
            name=name,
            source_run_id=self.run_id,
            tags=tags,
            params={key: value[:6000] for key, value in settings.items()},
            model_type=kind,
        )


@contextlib.contextmanager
def time_for(folder: Path) -> Iterator[None]:
    """Give an upload of `folder` as many seconds more than MLflow's timeout as its size asks for."""
    variable = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[variable]  # set when the client was made
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    os.environ[variable] = str(int(before) + size // _UPLOAD)
    try:
        yield
    finally:
        os.environ[variable] = before


def ship_journal(connection: "Connection", record: Record, journal: Path) -> None:
    """Ship a journal's new lines, up to 1,000 values a call, with the journal's own times."""
    assert record.run_id is not None
    batch: list[Point] = []
    line = None
    for line in unshipped(record, journal):
        if len(batch) + len(line.points) > 1000:
            connection.log_points(record.run_id, batch)
            record.save()
            batch = []
        batch += line.points
        record.offset, record.last_line = line.end, line.text
        record.last_step |= {point.key: point.step for point in line.points}
    if line is not None:
        connection.log_points(record.run_id, batch)
        record.save()
