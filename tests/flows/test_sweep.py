"""A sweep through the command line: what it leaves, what survives a kill, what goes on when a trial fails."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import mlflow
import psutil
import pytest
import yaml

from gptcore.training.journal import read_journal


def write_sweep(home, **fields):
    path = home.folder / "rates.yaml"
    path.write_text(yaml.safe_dump({"base": home.config.name, **fields}))
    return path


def runs_of(home) -> dict[str, list]:
    """MLflow's runs by the id of the run that they stand under; the empty id: under none."""
    client = mlflow.MlflowClient(f"sqlite:///{home.home}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny-gpt")
    found: dict[str, list] = {}
    for run in client.search_runs([experiment.experiment_id], max_results=500):
        found.setdefault(run.data.tags.get("mlflow.parentRunId", ""), []).append(run)
    return found


def test_a_sweep_that_makes_no_sense_is_refused_in_one_message_before_anything_starts(new_home, tmp_path):
    home = new_home(tmp_path / "wrong", tasks=[])
    path = write_sweep(home, space={"model.heads": [3, 4], "training.optimizer.ratee": [1]})
    result = home.gptcore("sweep", path, "--json", check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert "Traceback" not in result.stderr
    assert "heads (3) do not divide width (64)" in result.stderr
    assert "training.optimizer.ratee: unknown setting; did you mean rate?" in result.stderr
    assert not (home.home / "store").exists()


def test_what_stands_around_a_flow_is_imported_without_prefect_which_reads_its_settings_at_import():
    late = {"prefect", "mlflow", "optuna", "torch"}
    subprocess.run([sys.executable, "-c", f"import sys, flows.launch\nassert not {late} & set(sys.modules)"], check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_sweep_goes_on_and_its_best_settings_are_a_config_that_reuses_its_model(new_home, tmp_path):
    home = new_home(tmp_path / "sweep", tasks=[])
    path = write_sweep(
        home, set={"training.steps": 40, "training.evaluations": 2}, space={"training.optimizer.rate": ["1e-3", 0.02]}
    )
    process = subprocess.Popen(
        [sys.executable, "-c", "from flows.cli import main; main()", "sweep", str(path)],
        env=home.environment, cwd=home.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    bases = home.home / "store" / "base" / "tiny-gpt"

    def second_trains() -> bool:
        first = len(list(bases.glob("*/artifact.json")))
        journals = [read_journal(file) for file in bases.glob("*.run/journal.jsonl")]
        return first == 1 and len(journals) == 2 and all(any(line["step"] >= 5 for line in lines) for lines in journals)

    deadline = time.monotonic() + 240
    while not second_trains():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    result = json.loads(home.gptcore("sweep", path, "--json").stdout)

    assert set(result) == {
        "sweep", "metric", "goal", "best", "trials", "config", "folder", "mlflow_run_id", "prefect_flow_run_id",
    }  # fmt: skip
    assert [trial["settings"] for trial in result["trials"]] == [{"training.optimizer.rate": rate} for rate in (0.001, 0.02)]
    assert [trial["reused"] for trial in result["trials"]] == [True, False], "what was trained is not trained again"
    assert result["best"] == min(result["trials"], key=lambda trial: trial["value"])
    assert {file.name for file in (home.home / "sweeps" / "rates").iterdir()} == {
        "best.yaml", "trials.csv", "trials.md", "trials.png",
    }  # fmt: skip

    runs = runs_of(home)
    tops = {run.info.run_id: run for run in runs[""]}
    assert {run.info.status for run in tops.values()} == {"KILLED", "FINISHED"}
    trials = runs[result["mlflow_run_id"]]
    assert sorted(run.data.metrics["valid_bits_per_byte"] for run in trials) == sorted(t["value"] for t in result["trials"])
    assert {run.data.params["training.optimizer.rate"] for run in trials} == {"0.001", "0.02"}
    assert all("gptcore.stage.base" in run.data.tags for run in trials)
    everything = [run for children in runs.values() for run in children]
    assert sum(run.data.tags.get("gptcore.stage") == "base" for run in everything) == 2, "a training has one run, killed or not"
    assert not [run for run in everything if run.info.status == "RUNNING"]
    logged = mlflow.MlflowClient(f"sqlite:///{home.home}/mlflow.db").list_artifacts(result["mlflow_run_id"], "report")
    assert {entry.path for entry in logged} == {
        f"report/{name}" for name in ("best.yaml", "trials.csv", "trials.md", "trials.png")
    }
    with contextlib.closing(sqlite3.connect(f"file:{home.home}/prefect/prefect.db?mode=ro", uri=True)) as connection:
        (shown,) = connection.execute("select data from artifact where key = 'results-of-sweep-rates'").fetchone()
        states = dict(connection.execute("select name, state_type from flow_run").fetchall())
    assert "training.optimizer.rate" in shown
    assert "RUNNING" not in states.values()

    plan = json.loads(home.gptcore("plan", result["config"], "--json").stdout)
    assert {stage: entry["action"] for stage, entry in plan.items()} == {
        "corpus": "reuse", "tokenizer": "reuse", "shards": "reuse", "base": "reuse", "evaluation-base": "build",
    }  # fmt: skip
    assert json.loads(home.gptcore("models", "--json").stdout) == [], "a sweep registers nothing"
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "gptcore.training" in process.cmdline():
                assert process.environ().get("GPTCORE_HOME") != str(home.home)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_that_cannot_be_trained_is_noted_and_optuna_goes_on_up_to_a_task(new_home, tmp_path):
    home = new_home(tmp_path / "task")
    path = write_sweep(
        home, until="classify", method="optuna", trials=2,
        set={"training.steps": 4, "tasks.1.training.steps": 4},
        space={"tasks.1.training.optimizer.rate": {"low": 0.001, "high": 0.1, "log": True}, "model.heads": [4, 3]},
    )  # fmt: skip
    result = json.loads(home.gptcore("sweep", path, "--json").stdout)
    failed = [trial for trial in result["trials"] if trial["settings"]["model.heads"] == 3]
    good = [trial for trial in result["trials"] if trial["settings"]["model.heads"] == 4]
    assert failed
    assert good
    assert all("kv_heads (2) do not divide heads (3)" in trial["error"] and trial["value"] is None for trial in failed)
    assert all("finetune-classify" in trial["path"] and trial["value"] > 0 for trial in good)
    assert not (home.home / "store" / "finetune-summarize").exists(), "a task that nobody asked for is not trained"
    assert len(list((home.home / "store" / "base" / "tiny-gpt").glob("*/artifact.json"))) == 1, "trials share their base"

    told = home.gptcore("sweep", path, "--set", "space.model.heads=[3]", "--set", "trials=1", check=False)
    assert told.returncode == 1
    assert "all 1 trial(s) of the sweep rates failed, the last one because:" in told.stderr
    assert "Traceback" not in told.stderr
