"""Where the record of an artifact is: in the store of a home or, when its folder is gone from there, in MLflow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptcore.artifacts import MANIFEST, REPORT, read_manifest
from gptcore.errors import RegistryError
from gptcore.lineage import Lineage
from tasks.breaker import root_cause
from tasks.tracking import Connection

_RESOLVED = f"{REPORT}/resolved.json"


class Records:
    """The manifests of a home, by digest."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.connection = Connection(home)
        self._stored = Lineage(home / "store")

    def find(self, digest: str) -> Path | None:
        """A folder with the `artifact.json` of an artifact and, of a training, its `report/resolved.json`.

        Raises `RegistryError` when it is not in the store and MLflow cannot be asked.
        """
        stored = self._stored.node(digest).path
        return stored or self._logged(f"tags.`gptcore.digest` = '{digest}'", {"digest": digest})

    def find_evaluation(self, stage: str, inputs: Mapping[str, str]) -> Path | None:
        """The same of the newest evaluation of this stage that was made of `inputs` (stage -> digest)."""
        stored = [node.path for node in self._stored.nodes if node.stage == stage and node.inputs == inputs]
        return stored[-1] if stored else self._logged(f"tags.`gptcore.stage` = '{stage}'", {"inputs": dict(inputs)})

    def _logged(self, tag: str, wanted: Mapping[str, Any]) -> Path | None:
        """What MLflow was given of an artifact, fetched into `<home>/cache/records`."""
        if self.connection.is_private and not (self.home / "mlflow.db").exists():
            return None
        try:
            client = self.connection.client
            experiments = [str(experiment.experiment_id) for experiment in client.search_experiments()]
            for run in client.search_runs(experiments, tag, order_by=["attributes.start_time DESC"]):
                folder = self.home / "cache" / "records" / str(run.info.run_id)
                folder.mkdir(parents=True, exist_ok=True)
                logged = {entry.path for entry in client.list_artifacts(run.info.run_id)}
                if MANIFEST not in logged:
                    continue  # of a run that failed, or could not ship
                client.download_artifacts(run.info.run_id, MANIFEST, str(folder))
                manifest = read_manifest(folder)
                if all(manifest.get(key) == value for key, value in wanted.items()):
                    if any(entry.path == _RESOLVED for entry in client.list_artifacts(run.info.run_id, REPORT)):
                        client.download_artifacts(run.info.run_id, _RESOLVED, str(folder))
                    return folder
        except Exception as error:  # as in Breaker: no list is complete
            raise RegistryError(
                f"a part of the record is not in the store, and MLflow at {self.connection.address} cannot be asked for it "
                f"({root_cause(error)}); check MLFLOW_TRACKING_URI and that its server runs, then try again"
            ) from error
        return None
