"""Whole runs while MLflow's server or the trainer is killed: nothing lost, nothing twice."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest

from gptcore.artifacts import sha256_file
from gptcore.training.journal import read_journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STAGES = {"corpus", "tokenizer", "shards", "base", "evaluation-base"}


def begin(home, *arguments, **environment) -> subprocess.Popen[str]:
    """`gptcore run`, under way."""
    return subprocess.Popen(
        [sys.executable, "-c", "from flows.cli import main; main()", "run", str(home.config), "--json", *arguments],
        env={**home.environment, **environment}, cwd=home.folder, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=(home.folder / "stderr").open("w"),
    )  # fmt: skip


def end(process: subprocess.Popen[str], home) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a run."""
    printed, _ = process.communicate(timeout=800)
    return process.returncode, printed, (home.folder / "stderr").read_text()


def wait_for_step(home, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not any(
        line["step"] >= step
        for journal in (home.home / "store" / "base" / "tiny-gpt").glob("*.run/journal.jsonl")
        for line in read_journal(journal)
    ):
        assert process.poll() is None, (home.folder / "stderr").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trainer_of(home) -> psutil.Process | None:
    for note in (home.home / "store" / "base" / "tiny-gpt").glob("*.run/trainer.json"):
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            record = json.loads(note.read_text())
            process = psutil.Process(record["pid"])
            if round(process.create_time(), 2) == record["started"] and process.status() != psutil.STATUS_ZOMBIE:
                return process
    return None


def told(client: mlflow.MlflowClient, steps: int) -> list[str]:
    """Check that MLflow has every stage once, finished, with a whole curve; the states of the pipeline's runs, oldest first."""
    experiment = client.get_experiment_by_name("tiny-gpt")
    runs = client.search_runs([experiment.experiment_id], max_results=200, order_by=["attributes.start_time ASC"])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert sorted(run.data.tags["gptcore.stage"] for run in children) == sorted(STAGES)
    assert {run.info.status for run in children} == {"FINISHED"}
    assert not any("gptcore.error" in run.data.tags for run in children)
    (base,) = [run for run in children if run.data.tags["gptcore.stage"] == "base"]
    losses = client.get_metric_history(base.info.run_id, "train/loss")
    assert sorted(point.step for point in losses) == list(range(1, steps + 1)), "the curve has gaps or doubles"
    models = client.search_logged_models([experiment.experiment_id])
    assert {model.status.name for model in models} == {"READY"}
    assert len({model.name for model in models}) == len(models)
    (version,) = client.search_model_versions("name = 'tiny-gpt'")
    assert client.get_registered_model("tiny-gpt").aliases == {"champion": version.version}
    return [run.info.status for run in runs if "mlflow.parentRunId" not in run.data.tags]


def tries(home, name: str) -> tuple[int, str]:
    """How often Prefect ran a task, and the state it ended in."""
    with contextlib.closing(sqlite3.connect(f"file:{home.home}/prefect/prefect.db?mode=ro", uri=True)) as connection:
        return connection.execute("select run_count, state_name from task_run where name = ?", [name]).fetchone()


@pytest.fixture
def server(own_mlflow_server, databases, monkeypatch):
    """A server of the test's own, running."""
    shutil.copy(databases / "mlflow.db", own_mlflow_server.folder / "mlflow.db")
    own_mlflow_server.start()
    for name, value in own_mlflow_server.environment.items():
        monkeypatch.setenv(name, value)
    return own_mlflow_server


def test_a_server_that_hangs_in_the_middle_of_training_is_killed_and_comes_back_leaves_no_trace(server, new_home, tmp_path):
    home = new_home(tmp_path / "back", tasks=[])
    run = begin(home, "--set", "training.steps=400", MLFLOW_HTTP_REQUEST_TIMEOUT="5")
    wait_for_step(home, 30, run)
    server.process.send_signal(signal.SIGSTOP)
    wait_for_step(home, 100, run)
    server.kill()
    wait_for_step(home, 150, run)
    server.start()
    code, printed, said = end(run, home)
    assert code == 0, said
    assert json.loads(printed)["models"] == [{"name": "tiny-gpt", "version": 1, "aliases": ["champion"]}]
    assert json.loads(printed)["mlflow_run_id"]
    assert "Traceback" not in said
    assert told(mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"]), 400) == ["FINISHED"]


def test_a_server_that_is_gone_for_good_costs_one_sentence_and_the_next_run_only_ships_and_registers(
    server, new_home, tmp_path
):
    home = new_home(tmp_path / "gone", tasks=[])
    run = begin(home, GPTCORE_REGISTRY_PATIENCE="1")
    wait_for_step(home, 60, run)
    server.kill()
    code, printed, said = end(run, home)
    assert (code, printed) == (1, "")
    assert said.strip().splitlines()[-1].startswith("gptcore: tiny-gpt could not be registered at http://127.0.0.1:")
    assert said.endswith("everything is kept and the next gptcore run will only register\n")
    assert "Traceback" not in said
    server.start()
    again = home.run()
    assert all(artifact["reused"] for artifact in again["artifacts"].values())
    assert again["models"] == [{"name": "tiny-gpt", "version": 1, "aliases": ["champion"]}]
    assert told(mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"]), 240) == ["FAILED", "FINISHED"]


def test_a_trainer_that_is_killed_is_tried_again_and_nobody_sees_it_in_the_result(finished, new_home, tmp_path):
    home = new_home(tmp_path / "retried", tasks=[])
    run = begin(home, "--set", "training.restarts=0")  # torchrun's: Prefect's tries are looked at
    wait_for_step(home, 100, run)
    trainer_of(home).kill()
    code, printed, said = end(run, home)
    assert code == 0, said
    said = " ".join(said.split())  # the lines of a log file are broken somewhere
    assert "base: the trainer died of SIGKILL" in said
    assert "trying again in 3 seconds base: continues from the checkpoint of step" in said
    ours, theirs = json.loads(printed)["artifacts"]["base"], finished.result["artifacts"]["base"]
    weights = [Path(artifact["path"]) / "model" / "model.safetensors" for artifact in (ours, theirs)]
    assert sha256_file(weights[0]) == sha256_file(weights[1])
    assert tries(home, "base") == (2, "Completed")
    assert told(mlflow.MlflowClient(f"sqlite:///{home.home}/mlflow.db"), 240) == ["FINISHED"]


def test_a_trainer_that_is_killed_every_time_ends_the_run_with_a_sentence(new_home, tmp_path):
    home = new_home(tmp_path / "hopeless", tasks=[])
    run = begin(home, "--set", "training.restarts=0")
    killed = 0
    while run.poll() is None:
        if (trainer := trainer_of(home)) is not None:
            trainer.kill()
            trainer.wait()
            killed += 1
        time.sleep(0.05)
    code, printed, said = end(run, home)
    assert (code, printed, killed) == (1, "", 3)
    last = said.strip().splitlines()[-1]
    assert last.startswith("gptcore: the trainer died of SIGKILL, by hand or by the kernel for want of memory;")
    assert last.endswith("it was tried 3 times")
    assert "Traceback" not in said
    assert tries(home, "base") == (3, "Failed")
    client = mlflow.MlflowClient(f"sqlite:///{home.home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny-gpt").experiment_id])
    (base,) = [run for run in runs if run.data.tags.get("gptcore.stage") == "base"]
    assert base.info.status == "FAILED"
    assert base.data.tags["gptcore.error"].startswith("the trainer died of SIGKILL")
