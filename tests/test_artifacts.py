"""Build or reuse: one builder per address, whole or not at all, and a reason for every decision."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.artifacts import Recipe, Store, digest_of, open_home, verify
from gptcore.errors import ArtifactError, CorruptArtifactError, DiskFullError

RECIPE = Recipe("corpus", "x", 1, {"a": 1, "b": {"c": [1, 2]}}, {"text": "t1"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


def write(text: str):
    def make(folder: Path) -> dict[str, int]:
        (folder / "data").write_text(text)
        (folder / "report").mkdir()
        (folder / "report" / "when").write_text(str(time.time_ns()))
        return {"characters": len(text)}

    return make


@settings(max_examples=40)
@given(st.dictionaries(st.text(), VALUES))
def test_a_fingerprint_does_not_depend_on_the_order_of_settings(chosen):
    turned = dict(reversed(list(chosen.items())))
    assert Recipe("s", "n", 1, chosen).fingerprint == Recipe("s", "n", 1, turned).fingerprint
    assert digest_of(json.loads(json.dumps(chosen))) == digest_of(chosen)


def test_a_recipe_is_its_stage_version_settings_and_inputs_and_not_its_name():
    other = [
        Recipe("shards", "x", 1, RECIPE.settings, RECIPE.inputs),
        Recipe("corpus", "x", 2, RECIPE.settings, RECIPE.inputs),
        Recipe("corpus", "x", 1, {"a": 2}, RECIPE.inputs),
        Recipe("corpus", "x", 1, RECIPE.settings, {"text": "t2"}),
    ]
    assert len({RECIPE.fingerprint, *(recipe.fingerprint for recipe in other)}) == 5
    assert Recipe("corpus", "y", 1, RECIPE.settings, RECIPE.inputs).fingerprint == RECIPE.fingerprint


def test_what_was_built_is_reused_and_its_digest_leaves_the_report_out(tmp_path):
    store = Store(tmp_path)
    built = store.build(RECIPE, write("hello"))
    again = store.build(RECIPE, lambda folder: pytest.fail("built twice"))
    assert (built.reused, again.reused) == (False, True)
    assert again.numbers == {"characters": 5}
    forced = store.build(RECIPE, write("hello"), force=True)
    assert forced.digest == built.digest
    assert sorted(path.name for path in built.path.parent.iterdir()) == [built.path.name]


def test_a_builder_that_fails_leaves_nothing_and_what_was_there_stays(tmp_path):
    store = Store(tmp_path)
    built = store.build(RECIPE, write("hello"))

    def fail(folder: Path) -> dict[str, int]:
        (folder / "data").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.build(RECIPE, fail, force=True)
    assert (built.path / "data").read_text() == "hello"
    assert sorted(path.name for path in built.path.parent.iterdir()) == [built.path.name]


def test_every_changed_byte_is_found_and_named(tmp_path):
    built = Store(tmp_path).build(RECIPE, write("hello"))
    (built.path / "data").write_text("jello")
    with pytest.raises(CorruptArtifactError, match=r"data is not the file that was published .* --rebuild corpus"):
        verify(built.path)
    (built.path / "data").unlink()
    with pytest.raises(CorruptArtifactError, match="data is missing"):
        Store(tmp_path).find(RECIPE)


def build_slowly(home: Path, results, seconds: float) -> None:
    def make(folder: Path) -> dict[str, int]:
        (folder / "data").write_text("one")
        time.sleep(seconds)
        return {}

    results.put(Store(home).build(RECIPE, make).reused)


def test_of_two_processes_that_want_the_same_one_builds_and_the_other_reuses(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=build_slowly, args=(tmp_path, results, 0.5)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert sorted(results.get(timeout=30) for _ in workers) == [False, True]
    for worker in workers:
        worker.join()


def test_after_kill_9_of_a_builder_the_next_one_starts_clean(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=build_slowly, args=(tmp_path, results, 60.0))
    worker.start()
    partial = Store(tmp_path).address(RECIPE).with_suffix(".partial")
    while not (partial / "data").exists():
        assert worker.exitcode is None
        time.sleep(0.02)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert partial.exists()
    assert Store(tmp_path).find(RECIPE) is None
    # Another recipe of the same name sweeps it, too.
    other = Store(tmp_path).build(Recipe("corpus", "x", 1, {"a": 2}), write("two"))
    assert not partial.exists()
    assert not other.reused


def test_a_decision_names_what_differs_from_the_newest_of_that_name(tmp_path):
    store = Store(tmp_path)
    assert store.explain(RECIPE).reason == "never built"
    store.build(RECIPE, write("hello"))
    assert store.explain(RECIPE).action == "reuse"
    changed = Recipe("corpus", "x", 2, {"a": 1, "b": {"c": [1, 3]}}, {"text": "t2"})
    decision = store.explain(changed)
    assert decision.action == "build"
    assert decision.reason == "changed: stage version 1 -> 2; b.c.1: 2 -> 3; input text"


def test_a_home_of_another_schema_or_that_is_no_folder_is_refused(tmp_path):
    home = open_home(tmp_path / "home")
    assert home.stat().st_mode & 0o777 == 0o700
    (home / "schema").write_text("99")
    with pytest.raises(ArtifactError, match="written in schema 99, this gptcore reads schema 1"):
        open_home(home)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="set GPTCORE_HOME"):
        open_home(tmp_path / "file")


def test_an_older_home_is_brought_up_step_by_step_and_says_so_once(tmp_path):
    home, said = open_home(tmp_path / "home"), []
    steps = {1: lambda home: (home / "one").touch(), 2: lambda home: (home / "one").rename(home / "two")}
    assert open_home(home, 3, steps, said.append) == home
    assert (home / "two").exists()
    assert said == [f"{home} is brought from schema 1 to 2", f"{home} is brought from schema 2 to 3"]
    assert (home / "schema").read_text().strip() == "3"
    assert open_home(home, 3, steps, said.append) == home
    assert len(said) == 2
    with pytest.raises(ArtifactError, match="written in schema 3, this gptcore reads schema 1; use a newer gptcore"):
        open_home(home)


def test_a_step_that_fails_leaves_the_schema_and_is_done_again(tmp_path):
    home, tries = open_home(tmp_path / "home"), []

    def step(home):
        tries.append(home)
        if len(tries) == 1:
            raise OSError(28, "No space left on device")

    with pytest.raises(DiskFullError):
        open_home(home, 2, {1: step}, lambda _: None)
    assert (home / "schema").read_text().strip() == "1"
    open_home(home, 2, {1: step}, lambda _: None)
    assert (home / "schema").read_text().strip() == "2"


def test_a_home_without_a_way_up_and_an_artifact_of_a_newer_schema_are_refused(tmp_path):
    home = open_home(tmp_path / "home")
    with pytest.raises(ArtifactError, match="written in schema 1, this gptcore reads schema 3; set GPTCORE_HOME"):
        open_home(home, 3, {2: lambda home: None})
    store = Store(home)
    built = store.build(Recipe("corpus", "a", 1, {}, {}), lambda folder: {"n": (folder / "x").write_text("x")})
    manifest = built.manifest()
    (built.path / "artifact.json").write_text(json.dumps({**manifest, "schema": 2}))
    with pytest.raises(ArtifactError, match="written in schema 2, this gptcore reads schema 1"):
        store.find(Recipe("corpus", "a", 1, {}, {}))
