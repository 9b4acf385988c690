"""A home with a real MLflow database, and tiny artifacts of every stage."""

import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from flows.operations.server import DEFAULTS
from gptcore.artifacts import Artifact, Recipe, Store
from tasks.registry import Registry
from tasks.tracking import Connection, Tracking

CREATE = "import sys; from pathlib import Path; from tasks.tracking import Connection; Connection(Path(sys.argv[1])).client"


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    """No telemetry."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in DEFAULTS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def new_home(tmp_path_factory) -> Path:
    """A home whose database two processes wanted to create at the same moment. Migrating takes seconds, so once for all."""
    home = tmp_path_factory.mktemp("mlflow") / "home"
    Store(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        other = subprocess.Popen([sys.executable, "-c", CREATE, str(home)])
        assert Connection(home).client.search_experiments()
        assert other.wait(timeout=120) == 0
    return home


class Bench:
    """A home, and what a pipeline does in it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = Store(home)
        self.said: list[str] = []
        self.tracking = self.new_run()
        self.registry = Registry(home, self.said.append)

    def new_run(self, **config) -> Tracking:
        """Another process's tracking, as it were: it knows only what is on disk."""
        self.tracking = Tracking(self.home, "docs-gpt", self.said.append)
        self.parent = self.tracking.start_pipeline({"name": "docs-gpt", **config}, {"gptcore.prefect_flow_run_id": "f1"})
        return self.tracking

    @property
    def client(self):
        return self.tracking.connection.client

    def build(self, recipe: Recipe, make, evaluated: Artifact | None = None) -> Artifact:
        """What a task does."""
        if found := self.store.find(recipe):
            self.tracking.reuse_stage(found)
            return found
        self.tracking.start_stage(recipe)
        artifact = self.store.build(recipe, make)
        self.tracking.finish_stage(artifact, evaluated)
        return artifact

    def corpus(self, name: str = "docs-gpt") -> Artifact:
        settings = {"sources": [{"type": "files", "name": "files", "paths": ["a", "b"]}], "min_characters": 50}
        return self.build(Recipe("corpus", name, 1, settings, {"files": "0" * 64}), write_corpus)

    def shards(self, corpus: Artifact) -> Artifact:
        recipe = Recipe("shards", corpus.name, 1, {"tokens_per_shard": 9}, {"corpus": corpus.digest})
        return self.build(recipe, lambda folder: write(folder / "00000.tokens", b"tokens") or {"tokens": 9})

    def base_recipe(self, shards: Artifact, seed: int = 0) -> Recipe:
        settings = {"model": {"layers": 2}, "training": {"seed": seed}}
        return Recipe("base", shards.name, 1, settings, {"shards": shards.digest})

    def base(self, shards: Artifact, seed: int = 0) -> Artifact:
        """Weights that nobody opens, a journal of 30 steps and three kept checkpoints."""
        recipe = self.base_recipe(shards, seed)

        def make(folder: Path):
            for step in (10, 20, 30):
                checkpoint = self.store.workspace(recipe) / "checkpoints" / f"step-{step:06d}"
                write(checkpoint / "checkpoint.json", json.dumps({"step": step, "metrics": {"valid/loss": 5 - step / 10}}))
            write(folder / "model" / "model.safetensors", bytes([seed]) * 1000)
            write(folder / "model" / "tokenizer" / "tokenizer.json", "{}")
            self.journal(folder / "report" / "journal.jsonl", range(1, 31), valid=(10, 20, 30))
            return {"parameters": 1000, "tokens_per_second": 7.5, "device": "cpu"}

        return self.build(recipe, make)

    def weights(self, seed: int = 0) -> Artifact:
        """A base of nothing but weights."""
        recipe = Recipe("base", "docs-gpt", 1, {"seed": seed}, {"shards": "1" * 64})

        def make(folder: Path):
            write(folder / "model" / "model.safetensors", bytes([seed]) * 1000)
            write(folder / "model" / "tokenizer" / "tokenizer.json", "{}")
            return {}

        return self.build(recipe, make)

    @staticmethod
    def journal(file: Path, steps, valid=(), start: float = 1767225600.0, mode: str = "w") -> None:
        """Journal lines: training loss at every step, validation loss at some; a step takes a second."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open(mode) as journal:
            for step in steps:
                line = {"t": start + step, "step": step, "kind": "metric"}
                journal.write(json.dumps({**line, "values": {"train/loss": 9 - step / 10, "tokens_per_second": 100.0}}) + "\n")
                if step in valid:
                    journal.write(json.dumps({**line, "values": {"valid/loss": 5 - step / 10}}) + "\n")
                    journal.write(json.dumps({**line, "kind": "event", "event": "checkpoint", "text": "saved"}) + "\n")

    def evaluation(self, base: Artifact, corpus: Artifact) -> Artifact:
        recipe = Recipe("evaluation-base", base.name, 1, {"seed": 0}, {"base": base.digest, "corpus": corpus.digest})
        return self.build(
            recipe, lambda folder: write(folder / "report" / "results.md", "# good") or {"bits_per_byte": 1.3}, base
        )

    def chain(self) -> dict[str, Artifact]:
        corpus = self.corpus()
        shards = self.shards(corpus)
        base = self.base(shards)
        return {"corpus": corpus, "shards": shards, "base": base, "evaluation-base": self.evaluation(base, corpus)}

    def runs(self) -> dict[str, list]:
        """MLflow's runs by stage; `pipeline` are the parents."""
        experiment = self.client.get_experiment_by_name("docs-gpt")
        found: dict[str, list] = {}
        for run in self.client.search_runs([experiment.experiment_id]):
            found.setdefault(run.data.tags.get("gptcore.stage", "pipeline"), []).append(run)
        return found

    def run_of(self, stage: str):
        (run,) = self.runs()[stage]
        return run

    def models(self) -> dict[str, object]:
        experiment = self.client.get_experiment_by_name("docs-gpt")
        return {model.name: model for model in self.client.search_logged_models([experiment.experiment_id])}

    def points(self, stage: str) -> list[tuple]:
        """Every point of every metric of a stage's run: (key, step, value, timestamp)."""
        run = self.run_of(stage)
        history = [point for key in run.data.metrics for point in self.client.get_metric_history(run.info.run_id, key)]
        return sorted((point.key, point.step, point.value, point.timestamp) for point in history)


def write(file: Path, content: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def write_corpus(folder: Path):
    for split in ("train", "valid", "test"):
        (folder / "data").mkdir(exist_ok=True)
        pd.DataFrame({"id": ["1", "2"], "text": ["one", split]}).to_parquet(folder / "data" / f"{split}.parquet")
    write(folder / "report" / "card.md", "# two documents per split")
    return {"documents": 6, "language": "en"}


@pytest.fixture
def bench(new_home, tmp_path, monkeypatch) -> Bench:
    """A home of its own for a test."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Bench(Path(shutil.copytree(new_home, tmp_path / "home")))


@pytest.fixture(scope="module")
def told(new_home, tmp_path_factory) -> Bench:
    """A home in which a whole run was shipped; for tests that only look."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        bench = Bench(Path(shutil.copytree(new_home, tmp_path_factory.mktemp("told") / "home")))
    bench.artifacts = bench.chain()
    bench.tracking.end_pipeline("FINISHED", {"bits_per_byte": 1.3}, bench.artifacts["evaluation-base"].path / "report")
    return bench


@pytest.fixture(scope="session")
def mlflow_server(any_mlflow_server, new_home):
    """A real server, started with a database that is made already."""
    shutil.copy(new_home / "mlflow.db", any_mlflow_server.folder / "mlflow.db")
    any_mlflow_server.start()
    return any_mlflow_server


@pytest.fixture
def served(mlflow_server, tmp_path, monkeypatch) -> Iterator[Bench]:
    """A home whose MLflow is a server; what a test left there is put aside."""
    for name, value in mlflow_server.environment.items():
        monkeypatch.setenv(name, value)
    bench = Bench(tmp_path / "home")
    yield bench
    for name in bench.registry.names():
        bench.client.delete_registered_model(name)
    if experiment := bench.client.get_experiment_by_name("docs-gpt"):
        bench.client.rename_experiment(experiment.experiment_id, f"docs-gpt {uuid.uuid4().hex}")
