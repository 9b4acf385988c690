"""A base begins with a finished one: it goes on where that stopped, in its words, and its record leads down to it."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import yaml
from safetensors.numpy import load_file

from flows.chain import Chain
from flows.reproduction import reproduce
from flows.start import open_chain
from gptcore.artifacts import Artifact, Store
from gptcore.config import PipelineConfig, parse_config
from gptcore.errors import ArtifactError, ModelNotFoundError, SettingsError, SourceError
from gptcore.evaluation import read_results
from gptcore.lineage import Lineage
from gptcore.retention import made_of
from gptcore.tokens import Shards
from tasks.registry import Registry
from tasks.run import Run, Silent

SHAPE = {"layers": 1, "width": 32, "heads": 2, "context": 32}
GENTLE = {"algorithm": "adamw", "rate": 1e-9, "warmup": 0.0, "weight_decay": 0.0}


def write_rows(file: Path, what: str, count: int = 200) -> str:
    rows = [{"text": f"{what} {n} tells of {n * 7} rivers, {n * 13} hills and {n * n} stars."} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def settings(name: str, text: str, **changes) -> PipelineConfig:
    values = {
        "name": name,
        "corpus": {"sources": [{"type": "files", "name": name, "paths": [text]}], "min_characters": 20, "workers": 1},
        "split": {"valid": 0.2, "test": 0.2, "minimum": 5},
        "training": {"steps": 1, "batch": 4, "threads": 1, "evaluation_tokens": 256, "optimizer": GENTLE},
        "evaluation": {"resamples": 50, "samples": 1},
        **changes,
    }
    return parse_config(values)


@dataclass(frozen=True)
class Built:
    """A base, and one that was trained on from it by one tiny step on other text, without Prefect and MLflow."""

    home: Path
    text: str
    first: Artifact
    run: Run

    def settings(self, init_from: object = None, **changes) -> PipelineConfig:
        return settings("second", self.text, base={"init_from": str(init_from or self.first.path)}, **changes)

    def planned(self, init_from: object = None, **changes) -> dict[str, str]:
        """Stage -> action and reason."""
        run = Run(Store(self.home), Silent(), planning=True)
        open_chain(run, self.settings(init_from, **changes)).noun("evaluation-base")
        return {stage: f"{decision.action}: {decision.reason}" for stage, decision in run.decisions.items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    folder = tmp_path_factory.mktemp("start")
    home, text = folder / "home", write_rows(folder / "tales.jsonl", "Tale")
    config = settings("first", write_rows(folder / "rows.jsonl", "Row"), model=SHAPE, tokenizer={"vocabulary": 300})
    first = Chain(Run(Store(home), Silent()), config).base
    built = Built(home, text, first, Run(Store(home), Silent()))
    open_chain(built.run, built.settings()).noun("evaluation-base")
    return built


@pytest.fixture
def model(built, tmp_path) -> Path:
    """The first base's model folder, elsewhere, to be changed."""
    return Path(shutil.copytree(built.first.path / "model", tmp_path / "elsewhere"))


def test_it_goes_on_with_the_weights_and_the_tokenizer_of_its_start(built):
    first, second = built.first.path / "model", built.run.artifacts["base"].path / "model"
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert all(abs(after[name] - before[name]).max() < 1e-6 for name in before)
    assert any((after[name] != before[name]).any() for name in before)
    speaks, spoke = (json.loads((folder / "model.json").read_text()) for folder in (second, first))
    assert speaks == spoke
    assert Shards.open(built.run.artifacts["shards"].path).tokenizer == spoke["tokenizer"]
    assert "tokenizer" not in built.run.artifacts


def test_its_evaluation_stands_beside_its_start(built):
    found = read_results(built.run.artifacts["evaluation-base"].path)["metrics"]["bits_per_byte"]
    before = found["baselines"]["the model it began as"]
    assert before["value"] == pytest.approx(found["value"], abs=1e-3), "one step at a rate of 1e-9"
    assert before["difference_low"] <= before["difference"] <= before["difference_high"]


def test_a_second_run_reuses_all_wherever_the_model_lies(built, model):
    stages = ["corpus", "start", "shards", "base", "evaluation-base"]
    for place in (built.first.path, built.first.path / "model", model):
        assert built.planned(place) == dict.fromkeys(stages, "reuse: nothing changed")


def test_another_model_is_another_start_and_its_words_are_encoded_once(built, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert built.planned(model) == {
        "corpus": "reuse: nothing changed",
        "start": "build: changed: input model",
        "shards": "reuse: nothing changed",
        "base": "build: after its input start",
        "evaluation-base": "build: after its input base, start",
    }


def test_lineage_leads_through_the_start_to_all_that_it_was_made_of(built):
    lineage = Lineage(built.home / "store")
    told = json.dumps(lineage.tree(lineage.node(built.run.artifacts["base"].digest)))
    for stage in ("base", "corpus", "tokenizer", "shards"):
        (artifact,) = (built.home / "store" / stage / "first").glob("*/artifact.json")
        assert json.loads(artifact.read_text())["digest"] in told
    assert lineage.node(built.first.digest).name == "first", "a copy is not taken for what it is a copy of"
    assert built.first.digest in made_of(lineage.nodes, [built.run.artifacts["evaluation-base"].digest])


@pytest.mark.slow
def test_it_comes_out_of_its_record_bit_by_bit(built):
    def no_registry():
        raise AssertionError("nobody needs the registry here")

    start = built.run.artifacts["start"]
    found = reproduce(str(built.run.artifacts["base"].path), Store(built.home), no_registry, Silent())
    assert found.equal, found.verdict
    assert found.verdict.endswith(f"came out as recorded, from the start {start.digest[:12]} on")
    assert [row.stage for row in found.stages] == ["start", "corpus", "shards", "base", "evaluation-base"]
    assert found.went_on_from == {"start": start.digest}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {**SHAPE, "width": 64}}, "the settings ask for model.width 64, not 32: take them out"),
        ({"tokenizer": {"vocabulary": 301}}, "the settings ask for tokenizer.vocabulary 301, not 300: take them out"),
    ],
)
def test_another_shape_or_vocabulary_than_its_own_is_refused(built, changes, told):
    with pytest.raises(SettingsError, match=told):
        built.planned(**changes)
    assert built.planned(model=SHAPE, tokenizer={"vocabulary": 300})["base"] == "reuse: nothing changed"


def test_a_model_with_a_task_a_missing_file_and_a_missing_model_are_one_sentence(built, model):
    values = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**values, "task": {"type": "classify", "name": "topics"}}))
    with pytest.raises(SettingsError, match=r"elsewhere was fine-tuned for topics and is no base: name the one"):
        built.planned(model)
    (model / "model.json").write_text(json.dumps(values))
    (model / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"base\.init_from: .*elsewhere: cannot read .*model\.safetensors: No such file"):
        built.planned(model)
    with pytest.raises(ModelNotFoundError, match="/nowhere is no folder; give a model's name"):
        built.planned("/nowhere")


def test_its_start_alone_is_not_made_again(built):
    with pytest.raises(ArtifactError, match="is a model as it was found, nothing was built: gptcore verify "):
        reproduce("start", Store(built.home), lambda: Registry(built.home), Silent())


# ------------------------------------------------------------------------------------------------------ the whole --

WITHOUT_TORCH = "import sys\nfrom flows.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pipeline_begins_with_the_champion_of_another(own_finished):
    home = own_finished.home
    values = yaml.safe_load(home.config.read_text())
    rows = (home.folder / "rows.jsonl").read_text().splitlines(keepends=True)
    text = home.folder / "tales"
    text.mkdir()
    (text / "a.jsonl").write_text("".join(row.replace("About", "Once upon") for row in rows[:500]))
    values["corpus"]["sources"][0]["paths"] = [str(text)]
    values["tasks"] = [task for task in values["tasks"] if task["type"] == "classify"]
    values["tasks"][0]["training"]["steps"] = values["training"]["steps"] = 10
    values |= {"name": "tales", "base": {"init_from": "tiny-gpt@champion"}, "continual": {"steps": 10, "rate": 1.0}}
    config = home.folder / "tales.yaml"
    config.write_text(yaml.safe_dump(values))

    told = json.loads(home.gptcore("run", config, "--json").stdout)
    assert list(told["artifacts"])[:4] == ["start", "examples-classify", "corpus", "shards"]
    assert all(built in told["metrics"] for built in ("base/bits_per_byte", "classify/accuracy"))
    for command in ("plan", "run"):
        again = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, command, str(config), "--json"],
            env=home.environment, cwd=home.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert again.returncode == 0, again.stderr[-2000:]
        stages = json.loads(again.stdout)
        stages = stages.get("artifacts", stages)
        assert all(stage.get("reused") or stage["action"] == "reuse" for stage in stages.values())
    again = json.loads(home.gptcore("run", config, "--json", "--rebuild", "start").stdout)["artifacts"]
    assert [stage for stage, artifact in again.items() if not artifact["reused"]] == ["start"]

    lineage = json.loads(home.gptcore("lineage", "tiny-gpt@champion", "--json").stdout)
    assert {"name": "tales", "version": 1, "aliases": ["champion"]} in lineage["versions"]
    client = mlflow.MlflowClient(f"sqlite:///{home.home}/mlflow.db")
    experiment = client.get_experiment_by_name("tales").experiment_id
    begun = client.search_runs([experiment], "tags.`gptcore.stage` = 'start'")
    assert {run.info.status for run in begun} == {"FINISHED"}
    assert json.loads(home.gptcore("reproduce", "tales-classify", "--json").stdout)["equal"]
    refused = home.gptcore("plan", config, "--set", "base.init_from=tales-classify@champion", check=False)
    assert refused.returncode == 1
    assert "was fine-tuned for classify and is no base" in refused.stderr

    (text / "b.jsonl").write_text("".join(row.replace("About", "Once upon") for row in rows[500:]))
    round_ = json.loads(home.gptcore("continual", config, "--json").stdout)
    assert round_["state"] in ("Promoted", "Kept")
    assert json.loads(home.gptcore("reproduce", "tales/2", "--json").stdout)["equal"]
    home.gptcore("clean", "--keep-days", 0, "--yes")
    kept = {path.parent.parent.name for path in (home.home / "store" / "base").glob("*/*/artifact.json")}
    assert kept == {"tiny-gpt", "tales"}
