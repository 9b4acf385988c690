import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.artifacts import Recipe
from gptcore.corpus import SPLITS
from gptcore.corpus.build import write_split
from gptcore.errors import Interrupted, SettingsError, TrainingError
from tasks.ledger import Record, record_path, unshipped
from tasks.tracking import Tracking


def test_every_stage_tells_its_settings_numbers_report_and_tags(told):
    artifacts = told.artifacts
    for stage, artifact in artifacts.items():
        run = told.run_of(stage)
        assert run.info.status == "FINISHED"
        assert run.data.tags["gptcore.digest"] == artifact.digest
        assert run.data.tags["gptcore.path"] == str(artifact.path)
        assert run.data.tags["gptcore.prefect_flow_run_id"] == "f1"
        assert run.data.tags["mlflow.parentRunId"] == told.parent
        files = {file.path for file in told.client.list_artifacts(run.info.run_id)}
        assert files == ({"artifact.json", "report"} if (artifact.path / "report").exists() else {"artifact.json"})
    corpus = told.run_of("corpus")
    assert corpus.data.params == {
        "sources.0.type": "files",
        "sources.0.name": "files",
        "sources.0.paths": '["a", "b"]',
        "min_characters": "50",
    }
    assert corpus.data.metrics.keys() == {"documents", "seconds"}
    parent = told.client.get_run(told.parent)
    assert (parent.info.status, parent.data.metrics) == ("FINISHED", {"bits_per_byte": 1.3})
    assert parent.data.params["name"] == "docs-gpt"
    assert {file.path for file in told.client.list_artifacts(told.parent, "report")} == {"report/results.md"}


def test_the_corpus_is_an_mlflow_dataset_and_what_is_made_from_it_says_so(told):
    artifacts = told.artifacts
    for stage in artifacts:
        (dataset,) = [entry.dataset for entry in told.run_of(stage).inputs.dataset_inputs]
        assert (dataset.name, dataset.digest) == ("docs-gpt-corpus", artifacts["corpus"].digest[:36])
        assert json.loads(dataset.profile)["num_rows"] == 6
        assert json.loads(dataset.source)["uri"] == str(artifacts["corpus"].path / "data")


def test_new_text_is_an_mlflow_dataset_though_a_split_of_it_is_empty(bench):
    def make(folder: Path):
        for name in SPLITS:
            write_split(folder / "data" / f"{name}.parquet", [], name)
        return {}

    bench.build(Recipe("corpus-new", "docs-gpt", 1, {}, {"files": "0" * 64, "old corpus": "1" * 64}), make)
    (dataset,) = bench.run_of("corpus-new").inputs.dataset_inputs
    assert json.loads(dataset.dataset.profile)["num_rows"] == 0
    assert bench.said == []


def test_every_kept_checkpoint_is_a_logged_model_with_step_metrics_and_dataset(told):
    artifacts = told.artifacts
    models = told.models()
    assert {model.status.name for model in models.values()} == {"READY"}
    outputs = {output.model_id: output.step for output in told.run_of("base").outputs.model_outputs}
    assert {name: outputs[model.model_id] for name, model in models.items()} == {
        "docs-gpt-step-000010": 10,
        "docs-gpt-step-000020": 20,
        "docs-gpt": 30,
    }
    middle = {metric.key: metric for metric in models["docs-gpt-step-000020"].metrics}
    assert (middle["valid/loss"].value, middle["valid/loss"].step) == (3.0, 20)
    assert middle["valid/loss"].dataset_digest == artifacts["corpus"].digest[:36]
    assert models["docs-gpt-step-000020"].tags["gptcore.path"].endswith("checkpoints/step-000020")
    last = {metric.key: metric for metric in models["docs-gpt"].metrics}
    assert last["valid/loss"].value == 2.0
    assert (last["bits_per_byte"].value, last["bits_per_byte"].dataset_name) == (1.3, "docs-gpt-corpus")


def test_the_journal_keeps_its_own_times_and_no_point_stands_twice(told):
    points = told.points("base")
    assert ("train/loss", 7, 8.3, 1767225607000) in points
    assert ("valid/loss", 20, 3.0, 1767225620000) in points
    assert len({point[:2] for point in points}) == len(points)
    # 30 training losses and speeds, 3 validation losses, 2 numbers; the speed among the numbers is the journal's already.
    assert len(points) == 30 + 30 + 3 + 2


def test_a_resumed_stage_continues_its_run_and_ships_only_new_steps(bench):
    recipe = bench.base_recipe(bench.shards(bench.corpus()))
    journal, first = bench.home / "journal.jsonl", bench.parent
    bench.tracking.start_stage(recipe)
    bench.journal(journal, range(1, 21))
    bench.tracking.follow(recipe, journal)
    bench.tracking.fail_stage(recipe, Interrupted("stopped"), resumable=True)
    bench.tracking.end_pipeline("KILLED")
    assert bench.run_of("base").info.status == "KILLED"

    bench.new_run()
    bench.tracking.start_stage(recipe)
    bench.journal(journal, range(1, 11))  # cut back to the checkpoint of step 10, and later on to step 30
    bench.journal(journal, range(11, 31), start=1767300000.0, mode="a")
    bench.tracking.follow(recipe, journal)
    bench.tracking._wait_for_follower()
    run = bench.run_of("base")
    assert run.info.status == "RUNNING"
    assert run.data.tags["mlflow.parentRunId"] == bench.parent
    assert bench.client.get_run(first).data.tags["gptcore.continued_by"] == bench.parent
    losses = [point for point in bench.points("base") if point[0] == "train/loss"]
    assert [point[1] for point in losses] == list(range(1, 31))
    assert losses[14][3] == 1767225615000  # step 15 as it was first told
    assert losses[25][3] == 1767300026000

    bench.base(bench.shards(bench.corpus()))
    assert bench.run_of("base").info.status == "FINISHED"


def test_a_signal_while_the_follower_starts_leaves_nothing_to_wait_for(bench, monkeypatch):
    recipe = bench.base_recipe(bench.shards(bench.corpus()))
    journal = bench.home / "journal.jsonl"
    bench.tracking.start_stage(recipe)
    bench.journal(journal, range(1, 5))
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.tracking.follow(recipe, journal)
    bench.tracking.fail_stage(recipe, Interrupted("stopped"), resumable=True)
    assert not [thread for thread in threading.enumerate() if thread.name == "mlflow"]
    assert bench.run_of("base").info.status == "KILLED"


def test_a_killed_run_is_marked_and_its_stage_goes_on_in_the_same_run(bench):
    recipe = bench.base_recipe(bench.shards(bench.corpus()))
    bench.tracking.start_stage(recipe)
    dead = bench.parent
    code = (
        "import sys, time; from pathlib import Path; from tasks.active import ActiveRun\n"
        "with ActiveRun(Path(sys.argv[1])) as run: run.note(mlflow_run_id=sys.argv[2]); print(1, flush=True); time.sleep(99)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(bench.home), dead], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"1\n"
    bench.new_run()
    assert bench.client.get_run(dead).info.status == "RUNNING", "it lives"
    process.kill()
    process.wait()
    bench.new_run()
    assert bench.client.get_run(dead).info.status == "KILLED"
    assert bench.run_of("base").info.status == "KILLED"
    assert not list((bench.home / "runs").glob("*.json"))
    bench.tracking.start_stage(recipe)
    assert bench.run_of("base").info.status == "RUNNING"
    assert bench.client.get_run(dead).data.tags["gptcore.continued_by"] == bench.parent


def test_a_failed_stage_says_why_and_its_next_build_is_another_run(bench):
    recipe = bench.base_recipe(bench.shards(bench.corpus()))
    bench.tracking.start_stage(recipe)
    bench.tracking.fail_stage(recipe, TrainingError("the loss is not a number"), resumable=False)
    failed = bench.run_of("base")
    assert (failed.info.status, failed.data.tags["gptcore.error"]) == ("FAILED", "the loss is not a number")
    bench.base(bench.shards(bench.corpus()))
    assert {run.info.status for run in bench.runs()["base"]} == {"FAILED", "FINISHED"}


def test_a_reused_stage_is_linked_to_the_run_that_built_it(bench):
    bench.chain()
    built = {stage: bench.run_of(stage).info.run_id for stage in ("corpus", "shards", "base", "evaluation-base")}
    bench.new_run()
    bench.chain()
    tags = bench.client.get_run(bench.parent).data.tags
    assert {stage: tags[f"gptcore.stage.{stage}"] for stage in built} == built
    assert len(bench.runs()["pipeline"]) == 2


def test_killed_anywhere_while_shipping_nothing_is_shipped_twice(bench):
    base = bench.chain()["base"]
    points, models = bench.points("base"), {name: model.model_id for name, model in bench.models().items()}
    whole = Record.load(record_path(bench.home, base))
    begun = replace(whole, status="running", digest=None)
    bare = replace(begun, shipped=[], model_id=None, datasets=[], offset=0, last_line="", last_step={})
    for cut_short in (
        replace(bare, run_id=None, parent_id=None),  # before the run's id was noted
        bare,  # before any part was noted
        replace(begun, shipped=whole.shipped[:3], offset=0, last_line="", last_step={}),
        replace(begun, shipped=whole.shipped[:-1], model_id=None),
    ):
        cut_short.save()
        bench.new_run()
        bench.tracking.reuse_stage(base)
        assert bench.said == []
        assert Record.load(whole.path) == whole
        assert bench.points("base") == points
        assert {name: model.model_id for name, model in bench.models().items()} == models


def test_a_deleted_database_gets_everything_anew(bench, new_home):
    artifacts = bench.chain()
    version = bench.registry.register(bench.tracking, artifacts["base"], {"metrics": {}})
    shutil.copy(new_home / "mlflow.db", bench.home / "mlflow.db")  # as fresh as if it had been created again
    bench.new_run()
    assert bench.chain()["base"].reused
    assert bench.said == []
    assert {stage: len(runs) for stage, runs in bench.runs().items()} == dict.fromkeys([*artifacts, "pipeline"], 1)
    assert len(bench.points("base")) == 65
    assert bench.models().keys() == {"docs-gpt", "docs-gpt-step-000010", "docs-gpt-step-000020"}
    again = bench.registry.register(bench.tracking, artifacts["base"], {"metrics": {}})
    assert (again.version, again.digest) == (1, version.digest)


def test_without_mlflow_stages_go_on_and_the_next_run_ships_everything(bench, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    started = time.monotonic()
    bench.new_run()
    artifacts = bench.chain()
    bench.tracking.end_pipeline("FINISHED", {"bits_per_byte": 1.3})
    assert time.monotonic() - started < 10
    assert bench.parent is None
    assert len(bench.said) == 1
    assert address in bench.said[0]

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    bench.new_run()
    assert all(artifact.reused for artifact in bench.chain().values())
    assert {stage: len(bench.runs()[stage]) for stage in artifacts} == dict.fromkeys(artifacts, 1)
    assert len(bench.points("base")) == 65


def test_an_end_that_mlflow_did_not_hear_of_is_told_by_the_next_run(bench):
    shards, parent = bench.shards(bench.corpus()), bench.parent
    recipe = bench.base_recipe(shards)
    bench.tracking.start_stage(recipe)
    bench.tracking.reuse_stage(replace(shards, path=bench.home / "elsewhere", fingerprint="0" * 64))  # trouble
    bench.tracking.fail_stage(recipe, TrainingError("no space"), resumable=False)
    bench.tracking.end_pipeline("FAILED")
    assert len(bench.said) == 1
    assert bench.client.get_run(parent).info.status == "RUNNING"
    bench.new_run()
    assert bench.client.get_run(parent).info.status == "FAILED"
    assert bench.run_of("base").info.status == "FAILED"


def test_a_folder_as_tracking_uri_and_one_with_a_password_are_refused(bench, monkeypatch):
    for uri, what in [("file:///runs", "plain folders"), ("./mlruns", "plain folders"), ("http://me:pw@host", "USERNAME")]:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(SettingsError, match=what):
            Tracking(bench.home, "docs-gpt")


SHIP = """
import sys
from pathlib import Path
from gptcore.artifacts import load_artifact
from tasks.registry import Registry
from tasks.tracking import Tracking

assert "mlflow" not in sys.modules
tracking = Tracking(Path(sys.argv[1]), "docs-gpt", sys.exit)
assert tracking.start_pipeline({"name": "docs-gpt"})
artifacts = [load_artifact(Path(path)) for path in sys.argv[2:]]
for artifact in artifacts:
    tracking.reuse_stage(artifact)
assert Registry(Path(sys.argv[1])).register(tracking, artifacts[2], {"metrics": {}}).version == 1
tracking.end_pipeline()
assert "torch" not in sys.modules
"""


def test_shipping_and_registering_load_no_torch(bench):
    artifacts = bench.chain()
    shutil.rmtree(bench.home / "tracking")
    paths = [str(artifact.path) for artifact in artifacts.values()]
    done = subprocess.run([sys.executable, "-c", SHIP, str(bench.home), *paths], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {model.status.name for model in bench.models().values()} == {"READY"}
    assert len(bench.runs()["base"]) == 2, "without its records everything is there a second time, and nothing fails"


# A journal's life: the trainer writes up to a step, is cut back to a step, the follower ships what is there.
EVENTS = st.lists(
    st.one_of(st.tuples(st.just("write"), st.integers(1, 9)), st.tuples(st.just("cut"), st.integers(0, 9)), st.just("ship"))
)


@given(EVENTS)
def test_however_often_a_journal_is_cut_back_no_step_is_shipped_twice_and_none_is_lost(events):
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal.jsonl"
        record = Record(Path(folder) / "record.json", "base", "docs-gpt", "f", "uri")
        step, clock, shipped = 0, 0.0, []
        for event in [*events, "ship"]:
            if event == "ship":
                for line in unshipped(record, journal):
                    shipped += [point.step for point in line.points]
                    record.last_step |= {point.key: point.step for point in line.points}
                    record.offset, record.last_line = line.end, line.text
                assert shipped == list(range(1, len(shipped) + 1))
                assert len(shipped) >= step
            elif event[0] == "write":
                with journal.open("a") as file:
                    for _ in range(event[1]):
                        step, clock = step + 1, clock + 1
                        file.write(json.dumps({"t": clock, "step": step, "kind": "metric", "values": {"loss": 1.0}}) + "\n")
            else:
                step = min(step, event[1])
                lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
                journal.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def test_a_run_can_stand_under_another_one_such_as_a_trial_under_its_sweep(bench):
    sweep = Tracking(bench.home, "docs-gpt", bench.said.append)
    above = sweep.start_pipeline({"name": "rates"}, title="sweep rates")
    bench.tracking = Tracking(bench.home, "docs-gpt", bench.said.append)
    trial = bench.tracking.start_pipeline({"training": {"rate": 0.02}}, title="trial 1", parent=above)
    bench.corpus()
    bench.tracking.end_pipeline("FINISHED", {"valid_bits_per_byte": 1.5})
    sweep.end_pipeline()
    found = bench.client.get_run(trial)
    assert (found.info.run_name, found.data.tags["mlflow.parentRunId"]) == ("trial 1", above)
    assert (found.data.params, found.data.metrics) == ({"training.rate": "0.02"}, {"valid_bits_per_byte": 1.5})
    assert bench.run_of("corpus").data.tags["mlflow.parentRunId"] == trial
    assert bench.client.get_run(above).info.run_name == "sweep rates"
