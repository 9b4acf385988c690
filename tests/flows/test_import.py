"""A model of transformers becomes a base of ours, goes through the chain like one, and leaves it as transformers loads it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
import yaml

from flows.reproduction import reproduce
from flows.start import open_chain
from gptcore.artifacts import Artifact, Store, read_manifest
from gptcore.config import PipelineConfig, parse_config
from gptcore.errors import ArtifactError, ModelFormatError, SettingsError
from gptcore.evaluation import read_results
from gptcore.inference import Predictor
from gptcore.inference.export import export
from gptcore.model import load_model, save_model
from gptcore.model.importing import find_original, name_of
from gptcore.model.quantisation import quantise
from gptcore.start import read_base
from tasks.base import import_base
from tasks.registry import Registry
from tasks.run import Run, Silent

CONTEXT = 64


def write_rows(file: Path, count: int = 200) -> str:
    topics = {"rivers": "flows and bends", "hills": "rises and rolls", "stars": "shines and fades"}
    rows = [
        {"text": f"Number {n} of the {topic} {what} for {n * 7} days.", "topic": topic}
        for n in range(count)
        for topic, what in [list(topics.items())[n % 3]]
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def write_gpt2(folder: Path, texts: str) -> Path:
    """A small GPT-2 whose table has more rows than its tokenizer has tokens, as many have."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([row["text"] for row in map(json.loads, Path(texts).read_text().splitlines())], vocab_size=330)
    bpe.add_special_tokens(["<|endoftext|>"])
    end, pieces = bpe.token_to_id("<|endoftext|>"), bpe.get_vocab_size()
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=pieces + 3, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=end, eos_token_id=end
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Imported:
    """A model of transformers, and the home where it was imported without Prefect and MLflow."""

    home: Path
    texts: str
    original: Path
    base: Artifact

    def settings(self, **changes) -> PipelineConfig:
        source = {"type": "files", "name": "rows", "paths": [self.texts]}
        training = {"steps": 2, "batch": 4, "threads": 1, "evaluation_tokens": 256}
        values = {
            "name": "small",
            "corpus": {"sources": [source], "min_characters": 20, "workers": 1},
            "split": {"valid": 0.2, "test": 0.2, "minimum": 5},
            "base": {"import": str(self.original)},
            "training": training,
            "tasks": [{"type": "classify", "source": {**source, "target": "topic"}, "training": training}],
            "evaluation": {"resamples": 50, "samples": 1},
            **changes,
        }
        return parse_config(values)

    def run(self) -> Run:
        return Run(Store(self.home), Silent())

    def chain(self, run: Run | None = None, **changes):
        return open_chain(run or self.run(), self.settings(**changes))


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Imported:
    folder = tmp_path_factory.mktemp("import")
    texts = write_rows(folder / "rows.jsonl")
    original = write_gpt2(folder / "tiny-gpt2", texts)
    home = folder / "home"
    base = import_base(Run(Store(home), Silent()), "small", find_original(str(original), home))
    return Imported(home, texts, original, base)


@pytest.fixture(scope="module")
def evaluated(imported) -> Run:
    """The whole chain upon the imported base, but for the registry."""
    run = imported.run()
    chain = imported.chain(run)
    chain.noun("evaluation-base")
    chain.noun("evaluation-classify")
    return run


def test_the_base_is_the_original_under_our_names(imported):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(imported.original)
    ours = load_model(imported.base.path / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(imported.original)
    ids = ours.tokenizer.encode("Number 7 of the stars shines.")
    assert ids == tokenizer.encode("Number 7 of the stars shines.", add_special_tokens=False)
    torch.testing.assert_close(ours.model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, rtol=0, atol=1e-5)
    assert imported.base.manifest()["numbers"]["vocabulary"] == ours.tokenizer.vocabulary == len(tokenizer) + 3


def test_it_takes_the_place_of_tokenizer_and_pretraining(imported, evaluated):
    assert list(evaluated.artifacts) == [
        "examples-classify", "base", "corpus", "evaluation-base", "shards-classify", "finetune-classify", "evaluation-classify",
    ] or set(evaluated.artifacts) == {
        "examples-classify", "corpus", "base", "evaluation-base", "shards-classify", "finetune-classify", "evaluation-classify",
    }  # fmt: skip
    assert evaluated.artifacts["base"].reused
    results = read_results(evaluated.artifacts["evaluation-base"].path)
    assert results["metrics"]["bits_per_byte"]["value"] > 1.0
    assert Predictor(evaluated.artifacts["finetune-classify"].path / "model").predict(["It shines."])[0] in (
        "rivers",
        "hills",
        "stars",
    )


def test_a_second_run_builds_nothing_and_a_plan_says_so(imported, evaluated):
    planned = Run(Store(imported.home), Silent(), planning=True)
    chain = imported.chain(planned)
    chain.noun("evaluation-base")
    chain.noun("evaluation-classify")
    assert {decision.action for decision in planned.decisions.values()} == {"reuse"}
    assert "tokenizer" not in planned.decisions


def test_it_is_trained_on_like_one_of_ours(imported):
    run = imported.run()
    trained = imported.chain(run, base={"init_from": str(imported.base.path)}, name="second", tasks=[]).noun("base")
    ours, before = (load_model(base.path / "model").model for base in (trained, imported.base))
    assert ours.config == before.config
    assert ours.vocab_size == before.vocab_size
    assert not torch.equal(ours.embedding.weight, before.embedding.weight)


def test_the_record_of_a_task_ends_at_the_import(imported, evaluated):
    found = reproduce(
        str(evaluated.artifacts["finetune-classify"].path),
        Store(imported.home),
        lambda: Registry(imported.home, print),
        Silent(),
    )
    assert found.equal, found.verdict
    assert "base" not in {row.stage for row in found.stages}
    with pytest.raises(ArtifactError, match=r"was imported from .*, nothing was trained"):
        reproduce(str(imported.base.path), Store(imported.home), lambda: Registry(imported.home, print), Silent())


def test_another_original_of_the_same_name_is_another_base(imported, tmp_path):
    home, texts = tmp_path / "home", write_rows(tmp_path / "rows.jsonl")
    original = write_gpt2(tmp_path / "model", texts)
    first = import_base(Run(Store(home), Silent()), "small", find_original(str(original), home))
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-3}))
    second = import_base(Run(Store(home), Silent()), "small", find_original(str(original), home))
    assert first.fingerprint != second.fingerprint


# -------------------------------------------------------------------------------------------------------- export --


def test_an_imported_base_is_exported_as_it_came(imported, tmp_path):
    found = export(imported.base.path / "model", tmp_path / "out")
    assert found["architecture"] == "GPT2LMHeadModel"
    assert found["largest_difference"] < 1e-5
    assert json.loads((tmp_path / "out" / "parity.json").read_text()) == found
    theirs, again = (transformers.AutoModelForCausalLM.from_pretrained(at) for at in (imported.original, tmp_path / "out"))
    assert all(torch.equal(one, other) for one, other in zip(theirs.parameters(), again.parameters(), strict=True))
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()


def test_nothing_is_written_over_and_nothing_is_left_of_what_fails(imported, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ModelFormatError, match="is there already: name a new folder"):
        export(imported.base.path / "model", tmp_path / "full")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_weights_in_eight_bits_answer_but_are_not_trained_on(imported, tmp_path):
    folder = imported.base.path / "model"
    loaded = load_model(folder, dtype=torch.float32)
    save_model(tmp_path / "int8", quantise(loaded.model), folder / "tokenizer")
    assert Predictor(tmp_path / "int8").predict(["Number"], max_new_tokens=4)
    with pytest.raises(SettingsError, match="weights in eight bits, which nothing can be learned with"):
        read_base("it", tmp_path / "int8", imported.home)


# ------------------------------------------------------------------------------------------------------ commands --


@pytest.mark.slow
def test_one_run_registers_what_was_imported(imported, tmp_path):
    settings = imported.settings().model_dump(mode="json", exclude_none=True)
    settings["base"] = {"import": str(imported.original)}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))

    def gptcore(*arguments: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-c", "from flows.cli import main; main()", *arguments, "--json"],
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=250,
            env={**os.environ, "GPTCORE_HOME": str(tmp_path / "home")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    alone = gptcore("import", str(imported.original), "--name", "small")
    ran = gptcore("run", "small.yaml")
    assert ran["artifacts"]["base"]["reused"]
    assert ran["artifacts"]["base"]["path"] == alone["path"]
    assert {model["name"] for model in ran["models"]} == {"small", "small-classify"}
    exported = gptcore("export", "small@champion", "out")
    assert exported["architecture"] == "GPT2LMHeadModel"
    assert "Model card" in (tmp_path / "out" / "README.md").read_text()
    small = gptcore("export", "small@champion", "int8", "--int8")
    assert small["megabytes"] < 0.5 * small["megabytes_before"]


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelFormatError, match=r"the model gpt2-of-nobody is no local folder and cannot be fetched") as told:
        find_original("gpt2-of-nobody", tmp_path)
    assert "\n" not in str(told.value)
    with pytest.raises(ModelFormatError, match=r"there is no folder \./gpt2 with a model to import"):
        find_original("./gpt2", tmp_path)


def test_a_shape_of_its_own_beside_an_import_is_refused(imported):
    with pytest.raises(
        SettingsError, match=r"base.import: .* keeps its shape and its tokenizer, the settings ask for model.layers 7, not 2"
    ):
        imported.chain(model={"layers": 7})
    with pytest.raises(SettingsError, match="set init_from or import, not both"):
        imported.settings(base={"import": "a", "init_from": "b"})


@pytest.mark.parametrize(
    ("called", "name"), [("gpt2", "gpt2"), ("openai-community/GPT2.xl", "gpt2-xl"), ("/a/My Model", "my-model")]
)
def test_a_pipeline_is_called_after_its_model(called, name):
    assert name_of(called) == name


def test_the_manifest_says_where_it_is_from(imported):
    manifest = read_manifest(imported.base.path)
    assert manifest["settings"]["base"] == {"import_from": str(imported.original)}
    assert manifest["numbers"]["imported_from"] == str(imported.original)
