"""New text comes in, round by round: only it is worked on, the champion is trained on with it, and tests stay tests."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import yaml

from gptcore.artifacts import read_manifest
from gptcore.corpus import SPLITS, read_split
from gptcore.tokens import Shards, Tokenizer
from gptcore.training.journal import read_journal

MAIN = "from flows.cli import main; main()"
WITHOUT_TORCH = "import sys\nfrom flows.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
GENTLE = ("--set", "continual.rate=0.000001", "--set", "continual.steps=1")


@dataclass(frozen=True)
class Pipeline:
    """A home whose text comes in parts."""

    home: object
    texts: Path
    rows: list[str]

    def add(self, name: str, first: int, last: int) -> None:
        (self.texts / name).write_text("".join(self.rows[first:last]))

    def round(self, *arguments, code: str = MAIN) -> dict:
        result = subprocess.run(
            [sys.executable, "-c", code, "continual", str(self.home.config), "--json", *arguments],
            env=self.home.environment, cwd=self.home.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout)

    def round_without_torch(self, *arguments) -> dict:
        return self.round(*arguments, code=WITHOUT_TORCH)

    def versions(self, name: str = "tiny-gpt") -> dict[int, list[str]]:
        made = self.client.search_model_versions(f"name = '{name}'")
        aliases = self.client.get_registered_model(name).aliases
        return {int(v.version): [alias for alias, number in aliases.items() if int(number) == int(v.version)] for v in made}

    def mlflow_runs(self) -> int:
        experiment = self.client.get_experiment_by_name("tiny-gpt")
        return len(self.client.search_runs([experiment.experiment_id], max_results=500))

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(f"sqlite:///{self.home.home}/mlflow.db")


def held_out_of(corpus: Path) -> set[str]:
    return {text for name in SPLITS[1:] for text in read_split(corpus, name)["text"]}


def trained_on(base: Path, shards: Path) -> set[str]:
    """The texts of a model's training shards, in its own words."""
    tokenizer, train = Tokenizer.load(base / "model" / "tokenizer"), Shards.open(shards).split("train")
    return {tokenizer.decode(train.document(place)[1:-1].tolist()) for place in range(train.documents)}


@pytest.fixture
def pipeline(new_home, tmp_path) -> Pipeline:
    home = new_home(tmp_path / "work")
    rows = (home.folder / "rows.jsonl").read_text().splitlines(keepends=True)
    config = yaml.safe_load(home.config.read_text().replace(str(home.folder / "rows.jsonl"), str(home.folder / "texts")))
    config["tasks"] = [task for task in config["tasks"] if task["type"] == "classify"]
    config["tasks"][0]["training"]["steps"] = 5
    config["training"]["steps"], config["tokenizer"]["vocabulary"] = 60, 360
    home.config.write_text(yaml.safe_dump(config))
    (home.folder / "texts").mkdir()
    return Pipeline(home, home.folder / "texts", rows)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_rounds_one_of_them_killed(pipeline):
    pipeline.add("a.jsonl", 0, 400)
    first = pipeline.round()
    assert first["state"] == "First"
    assert pipeline.versions() == {1: ["champion"]}
    runs = pipeline.mlflow_runs()
    assert pipeline.round_without_torch()["state"] == "Unchanged"
    assert pipeline.mlflow_runs() == runs, "a round without work leaves nothing behind"

    pipeline.add("b.jsonl", 400, 410)
    waiting = pipeline.round()
    assert waiting["state"] == "Waiting"
    assert "a round needs 20 of each" in waiting["said"]

    pipeline.add("b.jsonl", 400, 640)
    kept = pipeline.round(*GENTLE)
    assert kept["state"] == "Kept"
    assert pipeline.versions() == {1: ["champion"], 2: ["challenger"]}
    again = pipeline.round_without_torch(*GENTLE)
    assert again["state"] == "Unchanged"
    assert "nothing changed since version 2 was judged: " in again["said"]

    second = pipeline.round("--set", "continual.steps=60", "--set", "continual.tasks=false")
    assert second["state"] == "Promoted", second["said"]
    assert [(row["model"], row["test_set"]) for row in second["forgetting"]] == [
        ("champion", "old"), ("champion", "new"), ("candidate", "old"), ("candidate", "new"),
    ]  # fmt: skip
    assert {row["verdict"] for row in second["forgetting"] if (row["model"], row["test_set"]) == ("candidate", "new")} == {
        "better"
    }
    assert second["artifacts"]["corpus-new"]["reused"], "another rate is no reason to look for new text again"
    assert pipeline.versions() == {1: ["previous"], 2: ["challenger"], 3: ["champion"]}
    assert pipeline.versions("tiny-gpt-classify").keys() == {1}
    check_lineage(pipeline, first, second)
    late = pipeline.round("--set", "continual.steps=60")
    assert late["state"] == "CaughtUp", "as after a kill between the base and its tasks"
    assert pipeline.versions("tiny-gpt-classify").keys() == {1, 2}
    check_reproduction(pipeline, first, second)

    pipeline.add("c.jsonl", 640, 900)
    kill_in_training(pipeline, beyond=10)
    third = pipeline.round("--set", "continual.steps=60")
    journal = read_journal(Path(third["artifacts"]["base"]["path"]) / "report" / "journal.jsonl")
    assert any(line.get("event") in ("resumed", "restarted") for line in journal)
    documents = {(row["model"], row["test_set"]): row["documents"] for row in third["forgetting"]}
    before = {(row["model"], row["test_set"]): row["documents"] for row in second["forgetting"]}
    assert documents["champion", "old"] == before["champion", "old"] + before["champion", "new"]
    assert set(pipeline.versions()) == {1, 2, 3, 4}, "registered once, though it was killed"
    trained = set.union(
        set(read_split(Path(first["artifacts"]["corpus"]["path"]), "train")["text"]),
        *(trained_on(path_of(told, "base"), path_of(told, "shards-new")) for told in (second, third)),
    )
    everything = [path_of(first, "corpus"), path_of(second, "corpus-all"), path_of(third, "corpus-all")]
    assert not trained & set.union(*map(held_out_of, everything))


def path_of(told: dict, stage: str) -> Path:
    return Path(told["artifacts"][stage]["path"])


def check_lineage(pipeline: Pipeline, first: dict, second: dict) -> None:
    """The candidate speaks the champion's tongue, and its record leads down to all text that went in."""
    bases = [path_of(told, "base") for told in (first, second)]
    speaks = [json.loads((base / "model" / "model.json").read_text())["tokenizer"] for base in bases]
    assert speaks[0] == speaks[1]
    inputs = read_manifest(bases[1])["inputs"]
    assert inputs["base"] == first["artifacts"]["base"]["digest"]
    assert inputs["tokenizer"] == first["artifacts"]["tokenizer"]["digest"]
    told = json.dumps(json.loads(pipeline.home.gptcore("lineage", "tiny-gpt@champion", "--json").stdout)["made_of"])
    for stage in ("base", "corpus", "tokenizer", "shards"):
        assert first["artifacts"][stage]["digest"] in told
    shown = json.loads(pipeline.home.gptcore("show", "tiny-gpt@champion", "--json").stdout)
    assert shown["continues"] == "tiny-gpt/1"
    assert shown["forgetting"]["new_candidate"] < shown["forgetting"]["new_champion"]
    page = pipeline.home.home / "results" / "tiny-gpt" / "forgetting.md"
    assert "the candidate is" in page.read_text()


def check_reproduction(pipeline: Pipeline, first: dict, second: dict) -> None:
    """The task model of a round, and with it the candidate, comes out of the record with what the round went on from."""
    told = json.loads(pipeline.home.gptcore("reproduce", "tiny-gpt-classify/2", "--json").stdout)
    went_on_from = {"base": "base", "old corpus": "corpus"}
    assert told["went_on_from"] == {name: first["artifacts"][stage]["digest"] for name, stage in went_on_from.items()}
    assert told["equal"], told["verdict"]
    recorded = {row["stage"]: row["recorded"] for row in told["stages"]}
    built = ("base", "corpus-new", "corpus-all", "shards-new", "examples-classify")
    assert {stage: recorded[stage] for stage in built} == {stage: second["artifacts"][stage]["digest"] for stage in built}
    assert recorded.keys() - set(built) == {"shards-classify", "finetune-classify", "evaluation-classify"}


def kill_in_training(pipeline: Pipeline, beyond: int) -> None:
    """Kill -9 a round and its trainer while it trains."""
    store = pipeline.home.home / "store" / "base" / "tiny-gpt"
    known = set(store.glob("*.run"))
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "continual", str(pipeline.home.config), "--set", "continual.steps=60"],
        env=pipeline.home.environment, cwd=pipeline.home.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        while True:
            assert process.poll() is None, "it ended before it could be killed"
            journals = [run / "journal.jsonl" for run in set(store.glob("*.run")) - known]
            if any(line["step"] >= beyond for file in journals if file.exists() for line in read_journal(file)):
                break
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
