"""Tracking and registry against a real MLflow server with a password, and against one that hangs."""

import contextlib
import os
import shutil
import socket
import time

import pytest

from gptcore.errors import Interrupted, RegistryError, SettingsError
from tasks import breaker
from tasks.shipment import time_for
from tasks.tracking import Tracking


def test_a_server_gets_what_the_home_s_own_database_gets_and_its_password_stays_out_of_the_home(served, mlflow_server):
    artifacts = served.chain()
    served.tracking.end_pipeline("FINISHED", {"bits_per_byte": 1.3}, artifacts["evaluation-base"].path / "report")
    assert served.said == []
    assert {stage: [run.info.status for run in runs] for stage, runs in served.runs().items()} == {
        stage: ["FINISHED"] for stage in [*artifacts, "pipeline"]
    }
    points = served.points("base")
    assert len(points) == len({point[:2] for point in points}) == 30 + 30 + 3 + 2
    assert served.run_of("base").info.artifact_uri.startswith("mlflow-artifacts:/")
    files = {file.path for file in served.client.list_artifacts(served.run_of("base").info.run_id, "report")}
    assert files == {"report/journal.jsonl"}
    assert {model.status.name for model in served.models().values()} == {"READY"}
    written = [file.read_bytes() for file in served.home.rglob("*") if file.is_file()]
    assert len(written) > 10
    assert not any(mlflow_server.password.encode() in content for content in written)


def test_a_server_registers_promotes_and_gives_the_model_back(served):
    first, second = served.weights(0), served.weights(1)
    for artifact in (first, second):
        served.registry.register(served.tracking, artifact, {"metrics": {"bits_per_byte": 1.3}})
    served.registry.promote("docs-gpt", 1, "the first version")
    served.registry.promote("docs-gpt", 2, "better")
    assert served.registry.rollback("docs-gpt", "it answers in riddles").version == 1
    assert [entry["to"] for entry in served.registry.history("docs-gpt")] == [1, 2, 1]
    assert served.registry.find("docs-gpt@previous").digest == second.digest
    weights = (first.path / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(served.home / "store")
    folder = served.registry.resolve("docs-gpt@champion")
    assert folder.is_relative_to(served.home / "cache")
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "tokenizer" / "tokenizer.json").read_text() == "{}"


def test_a_wrong_password_is_said_at_once_and_stages_go_on(served, mlflow_server, monkeypatch):
    started = time.monotonic()
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    stranger = type(served)(served.home)
    artifact = stranger.weights()
    assert artifact.path.is_dir()
    assert len(stranger.said) == 1
    with pytest.raises(RegistryError, match="MLFLOW_TRACKING_USERNAME"):
        stranger.registry.register(stranger.tracking, artifact, {"metrics": {}})
    with pytest.raises(RegistryError, match="MLFLOW_TRACKING_USERNAME"):
        stranger.registry.versions("docs-gpt")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", mlflow_server.password)
    assert time.monotonic() - started < 100, "it did not wait out its patience"


@pytest.fixture
def silent(monkeypatch):
    """A server that takes every connection and never answers; the function counts those that were made since it was asked."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        listener.setblocking(False)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")

        def connections() -> int:
            count = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    listener.accept()[0].close()
                    count += 1
            return count

        yield connections


def test_a_server_that_hangs_is_asked_once_for_each_pause_and_a_training_never_waits_for_it(bench, silent, monkeypatch):
    recipe, journal = bench.base_recipe(bench.shards(bench.corpus())), bench.home / "journal.jsonl"
    bench.journal(journal, range(1, 31))
    bench.new_run()
    bench.tracking.start_stage(recipe)
    bench.tracking.fail_stage(recipe, Interrupted("stopped"), resumable=True)
    bench.tracking.end_pipeline("KILLED")
    assert bench.parent is None
    assert silent() == 1, "one timeout in all"
    assert len(bench.said) == 1

    monkeypatch.setattr("tasks.tracking._FOLLOW", 0.0)
    tracking = Tracking(bench.home, "docs-gpt", bench.said.append)
    started = time.monotonic()
    for _ in range(100):
        tracking.follow(recipe, journal)
    assert time.monotonic() - started < 2, "not one of the calls took a timeout"
    tracking.end_pipeline()
    assert silent() == 1
    assert len(bench.said) == 2


@pytest.mark.slow
def test_a_training_is_followed_again_once_its_server_is_back(bench, own_mlflow_server, tmp_path, new_home, monkeypatch):
    server = own_mlflow_server
    shutil.copy(new_home / "mlflow.db", server.folder / "mlflow.db")
    server.start()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(breaker, "PAUSE", 0.2)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE", 0.2)
    monkeypatch.setattr("tasks.tracking._FOLLOW", 0.0)
    bench = type(bench)(tmp_path / "other")
    recipe, journal = bench.base_recipe(bench.shards(bench.corpus())), tmp_path / "journal.jsonl"
    bench.tracking.start_stage(recipe)
    for step in range(1, 31):
        bench.journal(journal, [step], mode="a")
        bench.tracking.follow(recipe, journal)
        if step == 10:
            server.kill()
        if step == 20:
            server.start()
        time.sleep(0.05)
    deadline = time.monotonic() + 60
    while len([point for point in bench.points("base") if point[0] == "train/loss"]) < 30:
        assert time.monotonic() < deadline, "the training was not followed any more after the server was back"
        bench.tracking.follow(recipe, journal)
        time.sleep(0.1)
    losses = [point[1] for point in bench.points("base") if point[0] == "train/loss"]
    assert losses == list(range(1, 31))
    assert [sentence.rpartition(" ")[2] for sentence in bench.said] == ["later", "again"]


def test_a_large_model_gets_the_time_that_its_upload_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2 * 2**30)  # a hole that takes no room
    with time_for(tmp_path):
        assert int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) > 60
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"


def test_a_wrong_patience_is_a_setting_that_is_named(bench, monkeypatch):
    for wrong in ("soon", "-1", "nan"):
        monkeypatch.setenv("GPTCORE_REGISTRY_PATIENCE", wrong)
        with pytest.raises(SettingsError, match="GPTCORE_REGISTRY_PATIENCE"):
            bench.registry.register(bench.tracking, bench.weights(), {"metrics": {}})
