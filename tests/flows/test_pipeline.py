"""The whole chain through the command line: what a run leaves, what a second run reuses, what survives a kill."""

import contextlib
import gzip
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pandas
import psutil
import pytest

from gptcore.artifacts import sha256_file
from gptcore.training.journal import read_journal

STAGES = {
    "examples-summarize", "examples-classify", "corpus", "tokenizer", "shards", "base", "shards-summarize",
    "finetune-summarize", "shards-classify", "finetune-classify", "evaluation-base", "evaluation-summarize",
    "evaluation-classify",
}  # fmt: skip

MODELS = ("tiny-gpt", "tiny-gpt-summarize", "tiny-gpt-classify")


def test_a_run_prints_the_promised_object(finished):
    result = finished.result
    assert set(result) == {"artifacts", "models", "metrics", "mlflow_run_id", "prefect_flow_run_id", "seconds"}
    assert set(result["artifacts"]) == STAGES
    for artifact in result["artifacts"].values():
        assert set(artifact) == {"path", "fingerprint", "digest", "reused"}
        assert not artifact["reused"]
        assert (Path(artifact["path"]) / "artifact.json").is_file()
    names = ["tiny-gpt", "tiny-gpt-summarize", "tiny-gpt-classify"]
    assert result["models"] == [{"name": name, "version": 1, "aliases": ["champion"]} for name in names]
    assert set(result["seconds"]) == STAGES
    assert {"base/bits_per_byte", "summarize/rouge_l", "classify/accuracy", "classify/macro_f1"} <= set(result["metrics"])


def test_the_tiny_model_has_learned_its_topics(finished):
    assert finished.result["metrics"]["classify/accuracy"] > 0.6


def test_a_second_run_reuses_everything_and_loads_no_torch(finished):
    code = "import sys\nfrom flows.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code, "run", str(finished.home.config), "--json"],
        env=finished.home.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - started
    assert result.returncode == 0, result.stderr[-2000:]
    again = json.loads(result.stdout)
    assert all(artifact["reused"] for artifact in again["artifacts"].values())
    assert {s: a["digest"] for s, a in again["artifacts"].items()} == {
        s: a["digest"] for s, a in finished.result["artifacts"].items()
    }
    assert again["models"] == finished.result["models"]
    assert "all 13 stages were reused" in result.stderr
    assert seconds < 60, "a generous bound: what is promised is measured in tests/benchmarks"


def test_a_reused_stage_ends_in_the_state_reused_in_prefect(finished):
    result = finished.home.run()
    code = (
        "import json, os, sys\nfrom pathlib import Path\nfrom flows.operations.server import private_server\n"
        "with private_server(Path(os.environ['GPTCORE_HOME'])) as server:\n"
        "    os.environ.update(server.client_environment())\n"
        "    from prefect.client.orchestration import get_client\n"
        "    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId\n"
        "    server.wait_ready()\n"
        "    with get_client(sync_client=True) as client:\n"
        "        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[sys.argv[1]])))\n"
        "        print(json.dumps({run.name: run.state.name for run in runs}))\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, result["prefect_flow_run_id"]],
        env=finished.home.environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    states = json.loads(printed)
    assert {name for name, state in states.items() if state == "Reused"} == {
        stage.replace("evaluation-", "evaluation of finetune-").replace("finetune-base", "base") for stage in STAGES
    }


def test_prefect_shows_the_progress_of_every_training_and_the_results(finished):
    database = f"file:{finished.home.home}/prefect/prefect.db?mode=ro"
    with contextlib.closing(sqlite3.connect(database, uri=True)) as connection:
        shown = {key: (kind, data, words) for key, kind, data, words in connection.execute(
            "select key, type, data, description from artifact"
        )}  # fmt: skip
    kind, data, words = shown["base-of-tiny-gpt"]
    assert (kind, float(data)) == ("progress", 100.0)
    assert words.startswith("base of tiny-gpt: step 240 of 240, loss ")
    assert shown["finetune-classify-of-tiny-gpt"][0] == "progress"
    kind, data, _ = shown["results-of-tiny-gpt"]
    assert kind == "markdown"
    assert "bits per byte" in data
    assert "![" not in data


def test_plan_explains_what_differs(finished):
    home = finished.home
    plan = json.loads(home.gptcore("plan", home.config, "--json", "--set", "cost.per_hour=2").stdout)
    assert {entry["action"] for entry in plan.values()} == {"reuse"}, "a price rebuilds nothing"
    plan = json.loads(home.gptcore("plan", home.config, "--json", "--set", "training.steps=30").stdout)
    assert plan["base"] == {"action": "build", "reason": "changed: training.steps: 240 -> 30"}
    assert plan["tokenizer"]["action"] == "reuse"
    assert plan["finetune-classify"] == {"action": "build", "reason": "after its input base"}
    assert (
        "asked for" in json.loads(home.gptcore("plan", home.config, "--json", "--rebuild", "shards").stdout)["shards"]["reason"]
    )


def test_the_registered_model_answers_in_a_fresh_process_elsewhere(finished, tmp_path):
    evaluated = pandas.read_parquet(
        Path(finished.result["artifacts"]["evaluation-classify"]["path"]) / "predictions.parquet"
    ).head(8)
    evaluated[["input"]].rename(columns={"input": "text"}).to_json(tmp_path / "rows.json")
    code = (
        "import json, pandas, mlflow\n"
        "classify = mlflow.pyfunc.load_model('models:/tiny-gpt-classify@champion')\n"
        "base = mlflow.pyfunc.load_model('models:/tiny-gpt@champion')\n"
        "print(json.dumps({'labels': [str(x) for x in list(classify.predict(pandas.read_json('rows.json')))],\n"
        "  'short': list(base.predict(['About rain'], params={'max_new_tokens': 2})),\n"
        "  'long': list(base.predict(['About rain'], params={'max_new_tokens': 20}))}))\n"
    )
    environment = {
        **os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{finished.home.home}/mlflow.db",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    answers = json.loads(result.stdout.strip().splitlines()[-1])
    assert answers["labels"] == evaluated["output"].tolist()
    assert len(answers["short"][0]) < len(answers["long"][0])


def test_every_stage_logs_what_the_table_promises(finished):
    client = mlflow.MlflowClient(f"sqlite:///{finished.home.home}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny-gpt")
    runs = client.search_runs([experiment.experiment_id], max_results=200)
    children = {
        run.data.tags["gptcore.stage"]: run for run in runs
        if run.data.tags.get("mlflow.parentRunId") == finished.result["mlflow_run_id"]
    }  # fmt: skip
    assert set(children) == STAGES
    wanted = {
        "examples-classify": {"card.md", "counts.csv", "set_aside.parquet"},
        "corpus": {"card.md", "counts.csv", "set_aside.parquet"},
        "tokenizer": {"report.md", "pieces.csv"},
        "shards": {"report.md", "tokens.csv"},
        "base": {"curves.png", "samples.md", "resolved.json", "hardware.json", "cost.json"},
        "finetune-classify": {"curves.png", "samples.md", "resolved.json", "hardware.json", "cost.json"},
        "evaluation-base": {"results.md", "model_card.md", "scores.parquet"},
        "evaluation-classify": {"results.md", "model_card.md", "predictions.parquet"},
    }
    for stage, files in wanted.items():
        run = children[stage]
        logged = {Path(entry.path).name for entry in client.list_artifacts(run.info.run_id, "report")}
        assert files <= logged, f"{stage} lacks {files - logged}"
        assert run.data.tags["gptcore.digest"] == finished.result["artifacts"][stage]["digest"]
        assert run.data.params, stage
        assert run.data.metrics, stage
        assert run.info.status == "FINISHED"
    for stage in ("examples-classify", "corpus"):
        assert children[stage].inputs.dataset_inputs, f"{stage} names no dataset"
    models = client.search_logged_models([experiment.experiment_id])
    by_run = {model.source_run_id for model in models}
    for stage in ("tokenizer", "base", "finetune-summarize", "finetune-classify"):
        assert children[stage].info.run_id in by_run, f"{stage} has no LoggedModel"
    base_models = [model for model in models if model.source_run_id == children["base"].info.run_id]
    assert len(base_models) >= 2, "kept checkpoints are LoggedModels too"
    measured = {metric.key for model in base_models for metric in model.metrics or []}
    assert "bits_per_byte" in measured
    parent = client.get_run(finished.result["mlflow_run_id"])
    assert {Path(entry.path).name for entry in client.list_artifacts(parent.info.run_id, "report")} >= {"results.md"}
    assert parent.data.tags["gptcore.prefect_flow_run_id"] == finished.result["prefect_flow_run_id"]


def test_every_version_carries_its_cost_and_the_runs_compare_theirs(finished):
    client = mlflow.MlflowClient(f"sqlite:///{finished.home.home}/mlflow.db")
    cards = {name: json.loads(client.get_model_version(name, "1").tags["gptcore.cost"]) for name in MODELS}
    base, classify = cards["tiny-gpt"], cards["tiny-gpt-classify"]
    assert base["alone"]["training_tokens"] == 240 * 8 * 64
    assert classify["whole_chain"]["training_tokens"] == classify["alone"]["training_tokens"] + 240 * 8 * 64
    assert set(classify["seconds_of_stages"]) == STAGES - {
        "shards-summarize", "finetune-summarize", "evaluation-base", "evaluation-summarize"
    }  # fmt: skip
    assert all(card["alone"]["training_attempts"] == 1 and card["alone"]["money"] is None for card in cards.values())
    assert base["energy_source"] or "energy not measured in base" in base["notes"][0]
    run = client.get_run(client.get_model_version("tiny-gpt", "1").run_id)
    assert run.data.metrics["cost/tokens"] == 240 * 8 * 64
    assert run.data.metrics["cost/seconds"] > 0
    page = (finished.home.home / "results" / "tiny-gpt" / "results.md").read_text()
    assert "| tiny-gpt-classify | whole chain |" in page


@pytest.mark.slow
def test_chinese_text_goes_through_all_stages(new_home, tmp_path):
    drawn = random.Random(0)
    characters = [chr(number) for number in range(0x4E00, 0x4E00 + 400)]
    with gzip.open(tmp_path / "chapters.jsonl.gz", "wt", encoding="utf-8") as file:
        for number in range(120):
            sentences = ("".join(drawn.choices(characters, k=drawn.randint(8, 30))) + "。" for _ in range(250))
            file.write(json.dumps({"text": f"第{number}回\n\n" + "".join(sentences)}, ensure_ascii=False) + "\n")
    source = {"type": "files", "paths": [str(tmp_path / "chapters.jsonl.gz")]}
    home = new_home(tmp_path / "chinese", corpus={"sources": [source]}, tasks=[], tokenizer={"vocabulary": 900})
    result = home.run("--set", "training.steps=10")
    assert result["models"] == [{"name": "tiny-gpt", "version": 1, "aliases": ["champion"]}]
    pieces = json.loads(home.gptcore("show", "tokenizer", "--json").stdout)["numbers"]
    assert pieces["bytes_per_token"] > 2, "characters have pieces of their own"
    said = home.gptcore("generate", "tiny-gpt", "第一回").stdout
    assert said.startswith("第一回")


@pytest.mark.slow
def test_a_reused_run_does_not_undo_a_rollback(new_home, tmp_path):
    home = new_home(tmp_path / "rollback", tasks=[])
    home.run("--set", "training.steps=3")
    better = home.run("--set", "training.steps=60")
    assert better["models"] == [{"name": "tiny-gpt", "version": 2, "aliases": ["champion"]}]
    refused = home.gptcore("promote", "tiny-gpt/1", check=False)
    assert (refused.returncode, "not better" in refused.stdout) == (1, True), "a script sees it"
    assert "version 1 is champion again" in home.gptcore("rollback", "tiny-gpt", "--reason", "it answers in riddles").stdout
    again = home.run("--set", "training.steps=60")
    assert again["models"] == [{"name": "tiny-gpt", "version": 2, "aliases": ["previous"]}]
    told = json.loads(home.gptcore("history", "tiny-gpt", "--json").stdout)
    assert [change["to"] for change in told] == [1, 2, 1]


# --------------------------------------------------------------------------------------------------------- kills --


def processes_of(home) -> list[psutil.Process]:
    """Every process that works for this home, by its command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("GPTCORE_HOME") == str(home.home):
                found.append(process)
        except psutil.Error:
            continue
    return found


def journal_of(home) -> Path | None:
    return next(iter((home.home / "store" / "base" / "tiny-gpt").glob("*.run/journal.jsonl")), None)


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def trained_beyond(home, step: int) -> bool:
    journal = journal_of(home)
    return journal is not None and any(line["step"] >= step for line in read_journal(journal))


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_kill_9_of_everything_at_three_moments_is_as_if_nothing_had_happened(finished, new_home, tmp_path):
    home = new_home(tmp_path / "killed", tasks=[])
    for step in (10, 100, 200):
        process = subprocess.Popen(
            [sys.executable, "-c", "from flows.cli import main; main()", "run", str(home.config)],
            env=home.environment, cwd=home.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        assert wait_until(lambda step=step: trained_beyond(home, step), 90)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert wait_until(lambda: not processes_of(home), 40), [p.cmdline() for p in processes_of(home)]
    result = home.run()
    ours, theirs = (Path(r["artifacts"]["base"]["path"]) / "model" / "model.safetensors" for r in (result, finished.result))
    assert sha256_file(ours) == sha256_file(theirs)
    client = mlflow.MlflowClient(f"sqlite:///{home.home}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny-gpt")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    bases = [run for run in runs if run.data.tags.get("gptcore.stage") == "base"]
    assert len(bases) == 1, "the training was continued in another MLflow run"
    history = client.get_metric_history(bases[0].info.run_id, "train/loss")
    steps = sorted(metric.step for metric in history)
    assert steps == list(range(1, 241)), "the curve has gaps or doubles"
    killed = [run for run in runs if "mlflow.parentRunId" not in run.data.tags and run.info.status == "KILLED"]
    assert len(killed) == 3
    with contextlib.closing(sqlite3.connect(f"file:{home.home}/prefect/prefect.db?mode=ro", uri=True)) as connection:
        flows = [state for (state,) in connection.execute("select state_name from flow_run order by created")]
        tasks = {state for (state,) in connection.execute("select distinct state_name from task_run")}
    assert flows == ["Crashed", "Crashed", "Crashed", "Completed"]
    assert tasks == {"Completed", "Reused", "Crashed"}, "a task of a run that died is still shown as running"


@pytest.mark.slow
def test_ctrl_c_saves_and_says_so(new_home, tmp_path):
    home = new_home(tmp_path / "stopped", tasks=[])
    process = subprocess.Popen(
        [sys.executable, "-c", "from flows.cli import main; main()", "run", str(home.config)],
        env=home.environment, cwd=home.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert wait_until(lambda: trained_beyond(home, 30), 90)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "gptcore: interrupted; what was finished and the last checkpoint are kept, run again to go on" in told
    assert "Traceback" not in told
    assert read_journal(journal_of(home))[-1]["event"] == "stopped"
    assert wait_until(lambda: not processes_of(home), 20)
