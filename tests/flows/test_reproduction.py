"""A record alone is enough to build the same bits again; what stands in the way of that is named before any long work."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.chain import Chain
from flows.reproduction import reproduce
from gptcore.artifacts import Recipe, Store, write_json
from gptcore.config import parse_config
from gptcore.errors import ArtifactError, ModelNotFoundError, SourceError
from gptcore.record import read_record
from gptcore.scratch import sweep_scratch
from tasks.registry import Registry
from tasks.run import Run, Silent


def settings(folder: Path) -> dict:
    source = {"type": "files", "name": "rows", "paths": [str(folder / "rows.jsonl")]}
    return {
        "name": "tiny-gpt",
        "corpus": {"sources": [source], "min_characters": 20, "workers": 1},
        "split": {"valid": 0.2, "test": 0.2, "minimum": 5},
        "tokenizer": {"vocabulary": 300},
        "training": {"steps": 1},
        "tasks": [{"type": "summarize", "source": {**source, "target": "summary"}, "training": {"steps": 1}}],
    }


def write_rows(folder: Path, count: int = 120) -> None:
    rows = [
        {"text": f"Row {n} tells of {n * 7} rivers, {n * 13} hills and {n * n} stars.", "summary": f"On {n}"}
        for n in range(count)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with rows, and a home in whose store they became shards, without Prefect and MLflow."""
    folder = tmp_path_factory.mktemp("built")
    write_rows(folder)
    Chain(Run(Store(folder / "home"), Silent()), parse_config(settings(folder))).noun("shards")
    return folder


@pytest.fixture
def home(built, tmp_path) -> Path:
    """A copy of that store to be damaged."""
    shutil.copytree(built / "home", tmp_path / "home")
    return tmp_path / "home"


def no_registry():
    raise AssertionError("nobody needs the registry here")


def of_shards(home: Path, **options):
    return reproduce("shards", Store(home), no_registry, Silent(), **options)


def folder_of(home: Path, stage: str) -> Path:
    return next((home / "store" / stage).glob("*/*/artifact.json")).parent


def edit(file: Path, change) -> None:
    values = json.loads(file.read_text())
    change(values)
    write_json(file, values)


def test_shards_come_out_with_the_recorded_digests_and_nothing_stays_behind(home):
    before = sorted(home.rglob("store/**/*"))
    found = of_shards(home)
    assert found.equal
    assert found.verdict == "bit-equal: all 4 stages of shards came out as recorded"
    assert [row.stage for row in found.stages] == ["examples-summarize", "corpus", "tokenizer", "shards"]
    assert found.changes == []
    assert sorted(home.rglob("store/**/*")) == before
    assert [path for path in (home / "scratch").iterdir() if path.is_dir()] == []


def test_examples_alone_come_out_too(home):
    found = reproduce("examples-summarize", Store(home), no_registry, Silent())
    assert found.verdict == "bit-equal: the one stage of examples-summarize came out as recorded"


def test_what_was_rebuilt_can_be_kept_as_a_home_of_its_own(home):
    found = of_shards(home, keep=True)
    assert folder_of(found.scratch, "shards").is_dir()
    assert sweep_scratch(home) == [], "the next reproduction would sweep it"


def test_a_source_that_changed_is_named_and_nothing_is_rebuilt(built, home):
    write_rows(built, 121)
    try:
        found = of_shards(home)
        assert (found.equal, found.stages) == (False, [])
        assert "the source rows does not hold what it held on " in found.verdict
        assert "--anyway" in found.verdict
        anyway = of_shards(home, anyway=True)
    finally:
        write_rows(built)
    assert not anyway.equal
    assert "differs: the first stage that differs is examples-summarize (data/" in anyway.verdict
    assert "not expected to be equal because the source rows" in anyway.verdict


def test_a_source_that_is_gone_is_one_sentence(built, home):
    rows = (built / "rows.jsonl").rename(built / "elsewhere.jsonl")
    try:
        with pytest.raises(SourceError, match=r"shards of tiny-gpt cannot be rebuilt: source rows: there is no file or folder"):
            of_shards(home)
    finally:
        rows.rename(built / "rows.jsonl")


def test_a_manifest_that_is_missing_is_named(home):
    shutil.rmtree(home / "store" / "tokenizer")
    with pytest.raises(ArtifactError, match=r"the record is incomplete: shards tiny-gpt was made of tokenizer [0-9a-f]{12}"):
        of_shards(home)


def test_a_published_file_that_was_damaged_is_named_and_nothing_is_rebuilt(home):
    file = next(path for path in folder_of(home, "shards").rglob("train/*") if path.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found = of_shards(home)
    assert (found.equal, found.stages) == (False, [])
    assert f"{file} is not the file that was published" in found.verdict
    anyway = of_shards(home, anyway=True)
    assert not anyway.equal
    assert anyway.verdict.startswith("the record gives the recorded digests, bit by bit, but ")


def test_a_record_that_was_edited_is_refused(home):
    edit(folder_of(home, "tokenizer") / "artifact.json", lambda values: values["settings"].update(vocabulary=301))
    with pytest.raises(ArtifactError, match="was changed after it was published: its settings or inputs"):
        of_shards(home)


def test_another_library_and_another_stage_version_are_told_before_anything_is_rebuilt(home):
    def older(manifest):
        recipe = Recipe(manifest["stage"], manifest["name"], 0, manifest["settings"], manifest["inputs"])
        manifest.update(version=0, fingerprint=recipe.fingerprint, git_commit="0" * 40)
        manifest["libraries"].update(torch="1.13.0", mlflow="1.0")

    edit(folder_of(home, "shards") / "artifact.json", older)
    found = of_shards(home, check=True)
    told = [(change.what.partition(" then, ")[0], change.weight) for change in found.changes]
    assert told == [("shards: stage version 0 -> 2", "doubt"), ("torch 1.13.0", "doubt"), ("commit 000000000000", "note")]
    assert "(shards)" in found.changes[1].what, "only the stage that it concerns"
    assert found.verdict.startswith("not rebuilt; equal bits are not to be expected: shards: stage version 0 -> 2; torch")
    assert found.stages == []


def test_the_record_of_a_model_is_complete_and_nothing_has_changed(finished):
    home = finished.home.home
    found = reproduce("tiny-gpt-classify/1", Store(home), lambda: Registry(home), Silent(), check=True)
    assert found.verdict == "not rebuilt; nothing has changed"
    assert set(found.record.manifests) == {
        "examples-summarize", "examples-classify", "corpus", "tokenizer", "shards", "base", "shards-classify",
        "finetune-classify", "evaluation-classify",
    }  # fmt: skip


def test_the_weights_of_a_model_that_were_tampered_with_are_named(finished, copy_of):
    model = copy_of(Path(finished.result["artifacts"]["base"]["path"]))
    weights = model / "model" / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    found = reproduce(str(model), Store(finished.home.home), no_registry, Silent())
    assert found.verdict == f"not rebuilt: {weights} is not the file that was published (--anyway rebuilds regardless)"


def test_another_torch_more_threads_and_another_processor_are_told(finished, copy_of):
    model = copy_of(Path(finished.result["artifacts"]["base"]["path"]))
    edit(
        model / "report" / "resolved.json",
        lambda values: values.update(torch="1.13.0", threads=999, device_name="Pentium II"),
    )
    found = reproduce(str(model), Store(finished.home.home), no_registry, Silent(), check=True)
    assert not found.stopped
    for told in ("torch 1.13.0", "999 thread(s) in 1 process(es)", "it was trained on Pentium II"):
        assert told in found.verdict


def test_a_training_that_did_not_note_its_answers_is_an_incomplete_record(finished, copy_of):
    model = copy_of(Path(finished.result["artifacts"]["base"]["path"]))
    (model / "report" / "resolved.json").unlink()
    with pytest.raises(ArtifactError, match=r"the record is incomplete: .*resolved\.json"):
        reproduce(str(model), Store(finished.home.home), no_registry, Silent(), check=True)


def test_an_unknown_model_is_one_sentence(finished):
    with pytest.raises(ModelNotFoundError, match="there is no model 'nobody'; there are: "):
        reproduce("nobody", Store(finished.home.home), lambda: Registry(finished.home.home), Silent())


def test_a_record_that_leads_to_two_tokenizers_is_no_run_of_one_pipeline(home):
    found = iter([folder_of(home, "corpus"), folder_of(home, "tokenizer"), other_tokenizer(home)])
    with pytest.raises(ArtifactError, match="two different artifacts of the stage"):
        read_record(folder_of(home, "shards"), lambda _: next(found))


def other_tokenizer(home: Path) -> Path:
    copy = Path(shutil.copytree(folder_of(home, "tokenizer"), home / "other"))
    edit(copy / "artifact.json", lambda values: values.update(digest="0" * 64))
    return copy


# ------------------------------------------------------------------------------------------------------ the whole --


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-gpt@champion", "tiny-gpt-classify"])
def test_a_registered_model_comes_out_of_its_record_bit_by_bit(finished, model):
    before = finished.home.gptcore("models", "--json").stdout
    found = json.loads(finished.home.gptcore("reproduce", model, "--json").stdout)
    assert found["equal"], found
    assert found["verdict"].startswith("bit-equal: all ")
    assert found["stages"][-1]["stage"] == ("evaluation-base" if model == "tiny-gpt@champion" else "evaluation-classify")
    assert all(row["recorded"] == row["rebuilt"] for row in found["metrics"])
    assert {row["baseline"] for row in found["metrics"]} & {"xz -9 primed", "naive Bayes"}
    assert finished.home.gptcore("models", "--json").stdout == before, "something was registered"


@pytest.mark.slow
def test_sigterm_ends_a_reproduction_with_one_sentence_and_leaves_nothing(finished):
    home = finished.home
    process = subprocess.Popen(
        [sys.executable, "-c", "from flows.cli import main; main()", "reproduce", "tiny-gpt"],
        env=home.environment, cwd=home.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    scratch, deadline = home.home / "scratch", time.monotonic() + 120
    while not any(scratch.glob("reproduce-*/store/base/*/*.run/journal.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "gptcore: interrupted; what was rebuilt so far is removed, the recorded model was not touched" in told
    assert "Traceback" not in told
    assert printed == ""
    assert [path for path in scratch.iterdir() if path.is_dir()] == []
