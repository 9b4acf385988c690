import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone

import pytest

from flows.lookup import registered
from gptcore.artifacts import Recipe, load_artifact
from gptcore.errors import CorruptArtifactError, ModelNotFoundError, RegistryError
from tasks.registry import registered_name


@pytest.fixture
def two(bench):
    """Two versions of a model."""
    for seed in (0, 1):
        evidence = {"metrics": {"bits_per_byte": 1.3 - seed / 10}, "cost": {"seconds": 12.5}}
        bench.registry.register(bench.tracking, bench.weights(seed), evidence)
    return bench


def aliases(bench):
    return {version.version: version.aliases for version in bench.registry.versions("docs-gpt")}


def test_a_digest_is_registered_once_and_its_version_carries_its_evidence(bench):
    base = bench.weights()
    evidence = {"metrics": {"bits_per_byte": 1.3}, "headline": "bits per byte 1.3", "cost": {"seconds": 12.5}}
    first = bench.registry.register(bench.tracking, base, evidence)
    assert (first.name, first.version, first.aliases, first.digest) == ("docs-gpt", 1, (), base.digest)
    assert (first.metrics, first.path) == ({"bits_per_byte": 1.3}, base.path)
    assert first.run_id == bench.run_of("base").info.run_id
    assert first.evidence["headline"] == "bits per byte 1.3"
    assert first.evidence["cost"] == {"seconds": 12.5}
    assert first.evidence["parents"] == {"shards": "1" * 64}
    assert first.as_row().items() >= {"name": "docs-gpt", "version": 1, "headline": "bits per byte 1.3"}.items()

    bench.new_run()
    assert bench.registry.register(bench.tracking, base, {"metrics": {"bits_per_byte": 9.9}}) == first
    assert len(bench.registry.all_versions()) == 1


def test_task_models_have_names_of_their_own(bench):
    recipe = Recipe("finetune-summarize", "docs-gpt", 1, {}, {})
    bench.tracking.start_stage(recipe)
    artifact = bench.store.build(recipe, lambda folder: (folder / "model").mkdir() or (folder / "model" / "x").touch() or {})
    assert registered_name(artifact) == "docs-gpt-summarize"
    assert bench.registry.register(bench.tracking, artifact, {"metrics": {}}).version == 1
    assert bench.registry.names() == ["docs-gpt-summarize"]


def test_promoting_moves_champion_and_previous_and_is_remembered(two):
    two.registry.promote("docs-gpt", 1, "the first version")
    assert aliases(two) == {1: ("champion",), 2: ()}
    two.registry.challenge("docs-gpt", 2)
    assert aliases(two)[2] == ("challenger",)
    assert two.registry.find("docs-gpt@challenger").evidence["verdict"] == "not better than the champion"
    assert two.registry.promote("docs-gpt", 2, "I like it", forced=True).aliases == ("champion",)
    assert aliases(two) == {1: ("previous",), 2: ("champion",)}
    assert two.registry.find("docs-gpt").evidence["verdict"] == "forced: I like it"
    two.registry.promote("docs-gpt", 2, "again")
    history = two.registry.history("docs-gpt")
    assert [(entry["from"], entry["to"], entry["reason"], entry["forced"]) for entry in history] == [
        (None, 1, "the first version", False),
        (1, 2, "I like it", True),
    ]
    assert two.registry.champion("docs-gpt").version == 2
    assert two.said == []


def test_a_rollback_brings_the_champion_before_back_and_the_history_knows_who_was_champion_when(two):
    with pytest.raises(RegistryError, match="nothing to roll back to"):
        two.registry.rollback("docs-gpt", "no reason")
    with pytest.raises(ModelNotFoundError, match="there are: docs-gpt"):
        two.registry.rollback("nobody", "no reason")
    before = datetime.now(UTC)
    two.registry.promote("docs-gpt", 1, "the first version")
    first = datetime.now(UTC)
    two.registry.promote("docs-gpt", 2, "better")
    second = datetime.now(UTC)
    assert two.registry.rollback("docs-gpt", "it answers in riddles").version == 1
    assert aliases(two) == {1: ("champion",), 2: ("previous",)}
    assert two.registry.history("docs-gpt")[-1]["reason"] == "it answers in riddles"
    moments = (before, first, second, datetime.now(UTC))
    assert [two.registry.champion_at("docs-gpt", moment) for moment in moments] == [None, 1, 2, 1]


def test_of_two_promotions_at_once_both_are_remembered_and_one_is_champion(two):
    def promote(version):
        type(two)(two.home).registry.promote("docs-gpt", version, f"thread {version}")

    two.registry.promote("docs-gpt", 1, "the first version")
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(promote, [2, 1]))
    history = two.registry.history("docs-gpt")
    champion = two.registry.champion("docs-gpt").version
    assert history[-1]["to"] == champion
    assert all(entry["done"] for entry in history)
    assert [entry["from"] for entry in history[1:]] == [entry["to"] for entry in history[:-1]]


def test_a_change_of_champion_that_was_cut_short_is_completed(two):
    two.registry.promote("docs-gpt", 1, "the first version")
    intent = {"from": 1, "to": 2, "reason": "better", "forced": False, "user": None, "done": False}
    two.client.set_registered_model_tag("docs-gpt", "gptcore.history.2999-01-01T00:00:00.000000Z", json.dumps(intent))
    two.client.set_registered_model_alias("docs-gpt", "previous", "1")
    (sentence,) = two.registry.complete_unfinished("docs-gpt")
    assert "cut short" in sentence
    assert aliases(two) == {1: ("previous",), 2: ("champion",)}
    assert all(entry["done"] for entry in two.registry.history("docs-gpt"))
    assert two.registry.complete_unfinished("docs-gpt") == []


def test_a_champion_that_was_changed_elsewhere_is_reported_once(two):
    two.registry.promote("docs-gpt", 1, "the first version")
    two.client.set_registered_model_alias("docs-gpt", "champion", "2")
    (sentence,) = two.registry.complete_unfinished("docs-gpt")
    assert "changed elsewhere, from version 1 to 2" in sentence
    assert two.said == [sentence]
    assert two.registry.complete_unfinished("docs-gpt") == []
    assert two.registry.history("docs-gpt")[-1]["to"] == 2
    assert two.registry.complete_unfinished("nobody") == []


def test_references_lead_to_the_folder_in_the_store(two):
    two.registry.promote("docs-gpt", 2, "better")
    first, second = (version.path / "model" for version in two.registry.versions("docs-gpt"))
    assert two.registry.resolve("docs-gpt/1") == first
    assert two.registry.resolve("docs-gpt") == two.registry.resolve("docs-gpt@champion") == second


def test_a_model_that_left_the_store_is_downloaded_and_checked_and_never_executed(two):
    first, second = two.registry.versions("docs-gpt")
    weights = (first.path / "model" / "model.safetensors").read_bytes()
    for version in (first, second):
        shutil.rmtree(version.path)
    for file in two.home.rglob("mlartifacts/**/pyfunc_model.py"):
        file.write_text("raise SystemExit('executed')")
    folder = two.registry.resolve("docs-gpt/1")
    assert folder.is_relative_to(two.home / "cache" / "models")
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "tokenizer" / "tokenizer.json").exists()
    assert two.registry.resolve("docs-gpt/1") == folder

    two.registry.check_served(two.registry.find("docs-gpt/2"))
    for file in two.home.rglob("mlartifacts/**/model.safetensors"):
        file.write_bytes(b"other weights")
    with pytest.raises(CorruptArtifactError, match="docs-gpt/2"):
        two.registry.resolve("docs-gpt/2")
    with pytest.raises(CorruptArtifactError, match="docs-gpt/1"):
        two.registry.check_served(two.registry.find("docs-gpt/1"))  # what was fetched before says nothing about now


def test_an_unknown_model_lists_what_there_is(bench):
    with pytest.raises(ModelNotFoundError, match="none is registered yet"):
        bench.registry.resolve("docs-gpt")
    bench.registry.register(bench.tracking, bench.weights(), {"metrics": {}})
    for reference in ("docs-gpt", "docs-gpt/2", "docs-gpt@nobody", "no/such/name", "x"):
        with pytest.raises(ModelNotFoundError, match=r"there are: docs-gpt/1$"):
            bench.registry.resolve(reference)
    with pytest.raises(ModelNotFoundError, match="no version 7; it has: 1"):
        bench.registry.promote("docs-gpt", 7, "why not")


def test_an_unreachable_registry_is_waited_for_and_then_one_sentence_says_so(bench, monkeypatch):
    base = bench.weights()
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("GPTCORE_REGISTRY_PATIENCE", "0.5")
    away = type(bench)(bench.home)
    started = time.monotonic()
    with pytest.raises(RegistryError, match="the next gptcore run will only register"):
        away.registry.register(away.tracking, load_artifact(base.path), {"metrics": {}})
    with pytest.raises(RegistryError, match="check MLFLOW_TRACKING_URI"):
        away.registry.versions("docs-gpt")
    assert time.monotonic() - started < 10


# Another process's promotion: (home, version, whether it is killed between the two changes of alias).
PROMOTE = """
import os, signal, sys
from pathlib import Path
from tasks.registry import Registry

registry = Registry(Path(sys.argv[1]))
client = registry.connection.client
change = client.set_registered_model_alias

def change_once(*arguments):
    change(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[3] == "killed":
    client.set_registered_model_alias = change_once
print("ready", flush=True)
sys.stdin.readline()
registry.promote("docs-gpt", int(sys.argv[2]), f"process {sys.argv[2]}")
"""


def promotion(bench, version: int, killed: str = "") -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", PROMOTE, str(bench.home), str(version), killed],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_process_that_is_killed_between_the_two_changes_of_alias_leaves_work_for_the_next_command(two):
    two.registry.promote("docs-gpt", 1, "the first version")
    process = promotion(two, 2, "killed")
    go(process)
    assert process.wait(timeout=120) == -signal.SIGKILL
    assert aliases(two) == {1: ("champion", "previous"), 2: ()}, "half done"
    between = datetime.now(UTC)
    history = two.registry.history("docs-gpt")
    assert aliases(two) == {1: ("previous",), 2: ("champion",)}
    assert [(entry["from"], entry["to"], entry["done"]) for entry in history] == [(None, 1, True), (1, 2, True)]
    assert two.said == ["docs-gpt: completed the change of champion to version 2 that was cut short"]
    assert two.registry.champion_at("docs-gpt", between) == 1, "it was not champion before the change was completed"
    assert two.registry.champion_at("docs-gpt", datetime.now(UTC)) == 2


@pytest.mark.slow
def test_of_two_processes_that_promote_at_once_both_are_remembered_and_one_is_champion(two):
    processes = [promotion(two, version) for version in (1, 2)]
    for process in processes:
        go(process)
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    history = two.registry.history("docs-gpt")
    assert sorted(entry["to"] for entry in history) == [1, 2]
    assert history[1]["from"] == history[0]["to"]
    assert aliases(two) == {history[0]["to"]: ("previous",), history[1]["to"]: ("champion",)}


def test_a_second_rollback_takes_the_first_one_back(two):
    two.registry.promote("docs-gpt", 1, "the first version")
    two.registry.promote("docs-gpt", 2, "better")
    assert two.registry.rollback("docs-gpt", "riddles").version == 1
    assert two.registry.rollback("docs-gpt", "riddles were right").version == 2
    assert aliases(two) == {1: ("previous",), 2: ("champion",)}
    assert [entry["to"] for entry in two.registry.history("docs-gpt")] == [1, 2, 1, 2]


def test_the_history_answers_in_every_time_zone(two):
    two.registry.promote("docs-gpt", 1, "the first version")
    moment = datetime.now(UTC)
    two.registry.promote("docs-gpt", 2, "better")
    for hours in (-11, 0, 9):
        there = moment.astimezone(timezone(timedelta(hours=hours)))
        assert two.registry.champion_at("docs-gpt", there) == 1
        assert two.registry.champion_at("docs-gpt", there + timedelta(days=1)) == 2
        assert two.registry.champion_at("docs-gpt", there - timedelta(days=1)) is None
    assert two.registry.champion_at("docs-gpt", moment.astimezone().replace(tzinfo=None)) == 1, "without a zone it is local"


def test_an_alias_that_was_deleted_elsewhere_is_noted_and_a_rollback_still_works(two):
    two.registry.promote("docs-gpt", 1, "the first version")
    two.registry.promote("docs-gpt", 2, "better")
    two.client.delete_registered_model_alias("docs-gpt", "champion")
    assert two.registry.history("docs-gpt")[-1]["to"] is None
    assert two.said == ["docs-gpt: the champion was changed elsewhere, from version 2 to none"]
    assert two.registry.champion_at("docs-gpt", datetime.now(UTC)) is None
    with pytest.raises(ModelNotFoundError, match="docs-gpt/2"):
        two.registry.find("docs-gpt")
    assert two.registry.rollback("docs-gpt", "somebody has to answer").version == 1
    assert aliases(two) == {1: ("champion",), 2: ()}, "it is not the champion before itself"
    assert [(entry["from"], entry["to"]) for entry in two.registry.history("docs-gpt")][2:] == [(2, None), (None, 1)]


def test_a_champion_made_elsewhere_of_a_version_that_was_never_judged_counts(two):
    two.registry.promote("docs-gpt", 1, "the first version")
    two.client.set_registered_model_alias("docs-gpt", "champion", "2")
    assert "verdict" not in two.registry.champion("docs-gpt").evidence
    assert two.registry.promote("docs-gpt", 1, "back").version == 1
    changes = [(entry["from"], entry["to"], entry["reason"]) for entry in two.registry.history("docs-gpt")]
    assert changes == [(None, 1, "the first version"), (1, 2, "changed elsewhere"), (2, 1, "back")]
    assert aliases(two) == {1: ("champion",), 2: ("previous",)}


def test_a_version_that_was_deleted_elsewhere_cannot_be_promoted_and_blocks_nothing(two):
    two.registry.promote("docs-gpt", 1, "the first version")
    intent = {"from": 1, "to": 2, "reason": "better", "forced": False, "user": None, "done": False}
    two.client.set_registered_model_tag("docs-gpt", "gptcore.history.2999-01-01T00:00:00.000000Z", json.dumps(intent))
    two.client.delete_model_version("docs-gpt", "2")
    with pytest.raises(ModelNotFoundError, match="docs-gpt has no version 2; it has: 1"):
        two.registry.promote("docs-gpt", 2, "better")
    assert two.registry.history("docs-gpt")[-1]["abandoned"]
    assert two.registry.champion("docs-gpt").version == 1
    two.registry.register(two.tracking, two.weights(1), {"metrics": {}})
    two.client.delete_model_version("docs-gpt", "1")
    assert two.registry.promote("docs-gpt", 3, "the last one left").aliases == ("champion",)


def test_a_version_that_gptcore_did_not_register_is_listed_and_not_opened(two):
    two.client.create_model_version("docs-gpt", (two.home / "mlartifacts" / "foreign").as_uri())
    assert two.registry.find("docs-gpt/3").digest == ""
    with pytest.raises(ModelNotFoundError, match="docs-gpt/3 was not registered by gptcore"):
        two.registry.resolve("docs-gpt/3")


def test_a_version_under_an_alias_is_never_deleted_and_any_other_leaves_a_note(two):
    two.registry.promote("docs-gpt", 1, "the first version")
    two.registry.challenge("docs-gpt", 2)
    with pytest.raises(RegistryError, match=r"docs-gpt/1 is champion and is not deleted: .*gptcore rollback docs-gpt"):
        two.registry.delete("docs-gpt", 1)
    with pytest.raises(RegistryError, match="docs-gpt/2 is challenger and is not deleted: it stays until"):
        two.registry.delete("docs-gpt", 2)
    two.client.set_registered_model_alias("docs-gpt", "mine", "2")
    two.registry.promote("docs-gpt", 2, "better")
    with pytest.raises(RegistryError, match="docs-gpt/1 is previous and is not deleted"):
        two.registry.delete("docs-gpt", 1)
    third = two.registry.register(two.tracking, two.weights(3), {"metrics": {}})
    assert two.registry.delete("docs-gpt", 3) == third
    assert [version.version for version in two.registry.versions("docs-gpt")] == [1, 2]
    with pytest.raises(ModelNotFoundError, match=r"no version 3 \(deleted on 20\d\d-.* by .*\); it has: 1, 2"):
        two.registry.delete("docs-gpt", 3)
    with pytest.raises(ModelNotFoundError, match="there is no model 'nobody'"):
        two.registry.delete("nobody", 1)
    again = two.registry.register(two.tracking, two.weights(3), {"metrics": {}})
    assert (again.version, again.digest) == (4, third.digest)


def test_a_file_is_stored_beside_the_run_that_made_a_version(two, tmp_path):
    page = tmp_path / "explain.html"
    page.write_text("<p>")
    version = two.registry.find("docs-gpt/1")
    assert registered(str(version.path), two.home, lambda: two.registry) == version
    assert registered("docs-gpt/1", two.home, lambda: two.registry) == version
    assert two.registry.attach(version, page, "explanations/one") == version.run_id
    stored = two.client.list_artifacts(version.run_id, "explanations/one")
    assert [file.path for file in stored] == ["explanations/one/explain.html"]
    two.client.delete_run(version.run_id)
    with pytest.raises(RegistryError, match=r"no longer in MLflow; .*explain.html is kept"):
        type(two.registry)(two.home).attach(version, page, "explanations/one")


def test_of_a_folder_that_is_not_registered_there_is_no_run(two, tmp_path):
    with pytest.raises(ModelNotFoundError, match="is not registered, so MLflow has no run of it"):
        registered(str(tmp_path), two.home, lambda: two.registry)
