"""Every mistake of a user ends in one sentence that says what, where and what to do, with exit code 1 and no traceback."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gptcore.artifacts import Recipe, Store
from gptcore.errors import CorruptArtifactError, DiskFullError


def told(home, *arguments) -> str:
    """What the command says on standard error about the mistake."""
    result = home.gptcore(*arguments, check=False)
    assert result.returncode == 1, (result.returncode, result.stderr[-2000:])
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    return "\n".join(lines[next(i for i, line in enumerate(lines) if line.startswith("gptcore: ")) :])


@pytest.fixture(scope="module")
def home(new_home, tmp_path_factory):
    return new_home(tmp_path_factory.mktemp("bad"), tasks=[])


def test_unknown_and_wrong_settings_are_all_named_at_once(home):
    text = told(home, "run", home.config, "--set", "training.stepps=3", "--set", "model.layers=none", "--set", "nonsense=1")
    assert "training.stepps: unknown setting" in text
    assert "model.layers: " in text
    assert "nonsense: unknown setting" in text
    assert "3 problem(s)" in text


def test_heads_that_do_not_divide_the_width(home):
    assert "heads (3) do not divide width (64)" in told(
        home, "plan", home.config, "--set", "model.heads=3", "--set", "model.kv_heads=3"
    )


def test_a_missing_file(home):
    assert "--text nowhere.txt: there is no such file or folder in " in told(home, "plan", "--text", "nowhere.txt")


def test_a_folder_of_text_in_place_of_settings(home):
    (home.folder / "tales").mkdir()
    assert "tales is a folder, not a settings file; to use what lies in it as the text: --text tales" in told(
        home, "run", "tales"
    )


def test_a_missing_config(home):
    assert "cannot read the settings" in told(home, "run", "nowhere.yaml")


def test_an_unknown_stage_to_rebuild(home):
    assert "no such stage" in told(home, "run", home.config, "--rebuild", "everything")


def test_an_unknown_model(home):
    assert "there is no model" in told(home, "generate", "nobody@champion", "Hello")
    assert "there is no model" in told(home, "show", "nobody")


def test_an_empty_corpus(home):
    (home.folder / "empty.txt").write_text("")
    text = told(home, "run", "--text", "empty.txt")
    assert "\n" not in text
    assert "train" in text or "empty" in text


def test_a_corpus_smaller_than_one_context(home):
    text = told(home, "run", home.config, "--set", "model.context=65536", "--set", "training.steps=2")
    assert "too few for one context of 65536" in text


def test_a_vocabulary_larger_than_the_text_allows(home):
    text = told(home, "run", home.config, "--set", "tokenizer.vocabulary=50000")
    assert "vocabulary" in text
    assert "50000" in text or "50,000" in text


@pytest.mark.slow
def test_a_corrupted_shard_is_named_and_can_be_rebuilt(home):
    shards = Path(home.run("--set", "training.steps=3")["artifacts"]["shards"]["path"])
    shard = shards / "train" / "00000.tokens"
    good = shard.read_bytes()
    shard.write_bytes(good[:10] + bytes([good[10] ^ 255]) + good[11:])
    text = told(home, "run", home.config, "--set", "training.steps=4")
    assert str(shard) in text
    assert "--rebuild shards" in text
    home.run("--set", "training.steps=4", "--rebuild", "shards")
    assert shard.read_bytes() == good


def test_a_full_disk_leaves_what_was_there_and_no_half_artifact(tmp_path):
    store = Store(tmp_path / "home")
    before = store.build(Recipe("corpus", "x", 1, {"a": 1}), lambda folder: {"n": (folder / "data").write_bytes(b"1")})

    def fill(folder):
        (folder / "small").write_bytes(b"1")
        with open("/dev/full", "wb", buffering=0) as file:  # noqa: PTH123  (a device that is always full)
            file.write(b"2")
        return {}

    with pytest.raises(DiskFullError, match="no space left while writing"):
        store.build(Recipe("corpus", "x", 1, {"a": 2}), fill)
    assert store.find(Recipe("corpus", "x", 1, {"a": 1})).digest == before.digest
    assert [path.name for path in before.path.parent.iterdir()] == [before.path.name]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_really_full_disk_ends_a_run_in_one_sentence(new_home, tmp_path):
    home = new_home(tmp_path / "full", tasks=[])
    shutil.rmtree(home.home)
    home.home.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", home.home], check=False, capture_output=True
    ).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        # The private servers need more room than that: no server here, only the stages.
        code = (
            "from gptcore.artifacts import Store, home_folder, Recipe\nfrom gptcore.config import load_config\n"
            "from gptcore.corpus import build_corpus\nimport sys\nfrom gptcore.errors import DiskFullError\n"
            f"c = load_config('{home.config}')\n"
            "try:\n"
            "    Store(home_folder()).build(Recipe('corpus', 'x', 1, {}), lambda f: build_corpus(f, c.corpus, c.split))\n"
            "except DiskFullError as error:\n    print(error)\n"
        )
        result = subprocess.run(
            [os.sys.executable, "-c", code], env=home.environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.startswith("no space left while writing to")
        assert not list((home.home / "store" / "corpus" / "x").iterdir())
    finally:
        subprocess.run(["umount", home.home], check=True)


def test_an_artifact_that_was_truncated_is_named(tmp_path):
    store = Store(tmp_path / "home")
    recipe = Recipe("corpus", "x", 1, {})
    artifact = store.build(recipe, lambda folder: {"n": (folder / "data").write_bytes(b"12345")})
    (artifact.path / "data").write_bytes(b"123")
    with pytest.raises(
        CorruptArtifactError, match=r"data has 3 bytes instead of 5; rebuild it with: gptcore run --rebuild corpus"
    ):
        store.find(recipe)


def test_json_output_stays_clean_when_something_is_wrong(home):
    result = home.gptcore("run", home.config, "--json", "--set", "tokenizer.vocabulary=50000", check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert json.loads(home.gptcore("models", "--json").stdout) == []
