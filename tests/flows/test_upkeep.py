"""A home is kept: what is old goes and what is in use stays; it is saved in one file and opened at another place."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pyarrow
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.operations.backup import backup
from flows.operations.clean import REMOVED, apply, plan_clean, upkeep
from flows.operations.relocation import mover
from flows.operations.restore import restore
from gptcore.artifacts import MANIFEST, Recipe, Store, load_artifact, open_home, verify
from gptcore.errors import ArtifactError, RegistryError
from gptcore.training.journal import read_journal
from tasks.active import ActiveRun
from tasks.ledger import Record, record_path
from tasks.registry import Registry

YEAR_AGO = time.time() - 365 * 86_400


@pytest.fixture(scope="module")
def saved(finished, tmp_path_factory) -> Path:
    return backup(finished.home.home, tmp_path_factory.mktemp("saved") / "home.tar.zst").file


@pytest.fixture
def home(saved, tmp_path, monkeypatch) -> Path:
    """The finished home at a place of another spelling, for a test alone."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return restore(saved, tmp_path / "家 home").home


def build(home: Path, stage: str = "corpus", content: str = "old", age: float = YEAR_AGO, inputs=None):
    """An artifact that was built and used last at `age`, in seconds since 1970."""
    recipe = Recipe(stage, "tiny-gpt", 1, {"content": content}, inputs or {})
    artifact = Store(home).build(recipe, lambda folder: {"n": (folder / "data").write_text(content)})
    manifest = artifact.path / MANIFEST
    built = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(age))
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "built_at": built}))
    os.utime(manifest, (age, age))
    return artifact


def planned(home: Path, keep_days: float = 30):
    return plan_clean(Store(home), Registry(home), keep_days)


def paths(plan) -> set[Path]:
    return {removal.path for removal in plan.removals}


def workspace(path: Path, age: float = YEAR_AGO) -> Path:
    file = path / "checkpoints" / "step-000001" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x" * 1000)
    os.utime(file, (age, age))
    return path


# --------------------------------------------------------------------------------------------------------- clean --


def test_old_things_go_and_all_that_an_alias_needs_stays(home):
    everything = {path.parent for path in (home / "store").glob(f"*/*/*/{MANIFEST}")}
    assert paths(planned(home, keep_days=0)) == set()
    old = build(home)
    made_of_it = build(home, "tokenizer", inputs={"corpus": old.digest})
    lately_used = build(home, content="lately", age=time.time() - 86_400)
    unfinished = workspace(home / "store" / "base" / "tiny-gpt" / "0123456789ab.run")
    finished_one = workspace(old.path.with_name(f"{old.path.name}.run"))
    for_champion = workspace(next((home / "store" / "base" / "tiny-gpt").glob("*[0-9a-f]")).with_suffix(".run"))
    download = workspace(home / "cache" / "models" / "tiny-gpt-1-abc")
    scratch = workspace(home / "scratch" / "verify-resume-1")
    partial = workspace(home / "store" / "corpus" / "tiny-gpt" / "0123456789cd.partial", time.time())
    plan = planned(home)
    going = {old.path, made_of_it.path, unfinished, finished_one, download, scratch, partial}
    assert paths(plan) == going
    assert (plan.artifacts, plan.pinned) == (len(everything) + 1, len(everything))
    assert plan.frees > 5000
    assert all(path.exists() for path in going), "looking touches nothing"
    assert {removal.path for removal in apply(Store(home), plan)} == going
    assert not any(path.exists() for path in going)
    assert {path.parent for path in (home / "store").glob(f"*/*/*/{MANIFEST}")} == {*everything, lately_used.path}
    assert for_champion.exists()
    assert not list(home.rglob(REMOVED))
    for path in everything:
        verify(path)
    assert paths(planned(home)) == set()


def test_what_a_run_uses_or_builds_right_now_stays(home):
    used, built = build(home, content="used"), build(home, content="built")
    assert Store(home).note_use(used)
    partial = workspace(built.path.with_suffix(".partial"))
    assert paths(planned(home, keep_days=0)) == {used.path, built.path, partial}
    with ActiveRun(home), Store(home).lock_at(built.path):
        assert paths(planned(home, keep_days=0)) == set()


def test_what_is_taken_into_use_after_it_was_looked_at_stays(home):
    store, artifact, other = Store(home), build(home), build(home, content="other")
    plan = planned(home)
    assert store.note_use(artifact)
    assert [removal.path for removal in apply(store, plan)] == [other.path]
    load_artifact(artifact.path)
    assert not store.note_use(other)


def _killed_when_it_deletes(store, plan):
    shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    apply(store, plan)


def test_a_clean_that_is_killed_leaves_a_home_that_works_and_the_next_one_sweeps(home):
    artifact = build(home)
    store, plan = Store(home), planned(home)
    cleaner = multiprocessing.get_context("fork").Process(target=_killed_when_it_deletes, args=(store, plan))
    cleaner.start()
    cleaner.join()
    assert cleaner.exitcode == -signal.SIGKILL
    (left,) = artifact.path.parent.glob(f"{REMOVED}/*")
    assert not artifact.path.exists()
    assert Store(home).newest("corpus", "tiny-gpt")["name"] == "tiny-gpt"
    half = home / "store" / "corpus" / "tiny-gpt" / "0123456789ef"  # where there was no room even for a folder to move it to
    workspace(half)
    plan = planned(home)
    assert paths(plan) == {left, half}
    apply(Store(home), plan)
    assert not half.exists()
    assert not list(home.rglob(REMOVED))
    assert build(home).path == artifact.path, "it can be built again"


def test_without_the_aliases_nothing_is_removed(home, monkeypatch):
    build(home)
    (home / "mlflow.db").rename(home / "elsewhere.db")
    with pytest.raises(RegistryError, match=r"artifacts but no mlflow\.db"):
        planned(home)
    (home / "elsewhere.db").rename(home / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(RegistryError, match="nothing is removed, because the aliases cannot be known"):
        planned(home)


def test_what_was_shipped_to_another_mlflow_stays_because_its_aliases_are_not_known_here(home):
    other, ours = build(home, content="other"), build(home, content="ours")
    for artifact, uri in ((other, "https://mlflow.example.org"), (ours, Registry(home).connection.address)):
        path = record_path(home, artifact)
        Record(path, artifact.stage, artifact.name, artifact.fingerprint, uri, digest=artifact.digest).save()
    assert paths(planned(home)) == {ours.path}


def test_the_command_tells_first_and_removes_with_yes(home, monkeypatch):
    monkeypatch.setenv("GPTCORE_HOME", str(home))
    artifact = build(home)
    told = CliRunner().invoke(app, ["clean"]).stdout
    assert "Nothing was removed. Remove it: gptcore clean --keep-days 30 --yes" in told
    assert artifact.path.name in told
    assert artifact.path.exists()
    answer = json.loads(CliRunner().invoke(app, ["clean", "--yes", "--json"]).stdout)
    assert answer["removed"] == [str(artifact.path)]
    assert [(item["what"], round(item["age_days"])) for item in answer["items"]] == [("artifact", 365)]
    assert not artifact.path.exists()
    assert "Nothing may go" in CliRunner().invoke(app, ["clean", "--yes"]).stdout


def test_the_command_deletes_a_version_only_by_its_number_and_never_a_champion(home, monkeypatch):
    monkeypatch.setenv("GPTCORE_HOME", str(home))
    refused = CliRunner().invoke(app, ["delete", "tiny-gpt/1"])
    assert isinstance(refused.exception, RegistryError)
    assert "tiny-gpt/1 is champion and is not deleted" in str(refused.exception)
    assert "say which version goes" in str(CliRunner().invoke(app, ["delete", "tiny-gpt"]).exception)
    assert "there is no model 'tiny-gpt/7'" in str(CliRunner().invoke(app, ["delete", "tiny-gpt/7"]).exception)
    Registry(home).connection.client.delete_registered_model_alias("tiny-gpt", "champion")
    assert "no longer registered" in CliRunner().invoke(app, ["delete", "tiny-gpt/1"]).stdout


# -------------------------------------------------------------------------------------------- backup and restore --


def test_a_backup_is_for_its_owner_only_and_names_no_old_place_once_restored(saved, home, finished):
    assert saved.stat().st_mode & 0o777 == 0o600
    assert (home / "prefect" / "auth").stat().st_mode & 0o777 == 0o600
    old = str(finished.home.home).encode()
    assert [path for path in home.rglob("*") if path.is_file() and old in path.read_bytes()] == []
    for manifest in (home / "store").glob(f"*/*/*/{MANIFEST}"):
        verify(manifest.parent)
    versions = Registry(home).all_versions()
    assert len(versions) == 3
    for version in versions:
        assert version.path.is_relative_to(home)
        assert load_artifact(Path(version.evidence["evaluation"])).digest
        assert Registry(home)._download(version).is_dir(), "MLflow finds the files of a model"


@pytest.mark.parametrize(
    ("old", "new", "text", "moved"),
    [
        ("/a/b", "/c d", "/a/b/store", "/c d/store"),
        ("/a/b", "/c d", "file:///a/b/mlartifacts", "file:///c%20d/mlartifacts"),
        ("/a/b", "/c d", "sqlite:////a/b/mlflow.db", "sqlite:////c d/mlflow.db"),
        ("/a/b", "/c", "/a/bc/d /x/a/b/c /a/b-old/d", "/a/bc/d /x/a/b/c /a/b-old/d"),
        ("/a/家 b", "/c", "file:///a/%E5%AE%B6%20b/x", "file:///c/x"),
        ("/a/家", "/c/屋", r'{"uri": "/a/\u5bb6/x"}', r'{"uri": "/c/\u5c4b/x"}'),
        ("/a/b", "/c", '{"home": "/a/b", "n": 1}', '{"home": "/c", "n": 1}'),
        ("/a/b", "/c", 7, 7),
        ("/a/b", "/c", b"/a/b/x", b"/a/b/x"),
    ],
)
def test_a_path_of_the_home_moves_however_it_is_spelled_and_no_other_path_does(old, new, text, moved):
    assert mover(old, new)(text) == moved


def test_a_backup_overwrites_nothing_and_a_restore_wants_an_empty_place(saved, home, tmp_path):
    with pytest.raises(ArtifactError, match="is there already and is not overwritten"):
        backup(home, saved)
    with pytest.raises(ArtifactError, match="lies inside the home"):
        backup(home, home / "results" / "mine.tar.zst")
    with pytest.raises(ArtifactError, match="there is no home of gptcore"):
        backup(tmp_path / "nowhere", tmp_path / "x.tar.zst")
    with pytest.raises(ArtifactError, match="is no folder"):
        backup(home, tmp_path / "nowhere" / "x.tar.zst")
    with pytest.raises(ArtifactError, match="is not empty and nothing is restored over it"):
        restore(saved, home)
    with pytest.raises(ArtifactError, match="there is no file"):
        restore(tmp_path / "nothing", tmp_path / "new")
    with upkeep(home), pytest.raises(ArtifactError, match="another gptcore clean or backup is at work"):
        backup(home, tmp_path / "x.tar.zst")
    assert not list(tmp_path.glob("*.partial")) + list((home / "scratch").glob("*"))


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    """A file as an attacker would make it: a good header, then whatever he likes."""
    header = json.dumps({"format": 1, "schema": 1, "home": "/old", "created": "now"}).encode()
    with pyarrow.CompressedOutputStream(str(path), "zstd") as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
        for member, content in [(tarfile.TarInfo("backup.json"), header), *members]:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_what_is_no_backup_or_was_changed_restores_nothing_and_writes_nowhere(saved, tmp_path):
    whole = saved.read_bytes()
    (tmp_path / "short").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    (tmp_path / "changed").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").touch()
    archive(tmp_path / "no-manifest")
    archive(tmp_path / "up", (tarfile.TarInfo("../outside"), b"x"))
    archive(tmp_path / "absolute", (tarfile.TarInfo(str(tmp_path / "outside")), b"x"))
    archive(tmp_path / "symlink", (link("store", str(tmp_path)), b""), (tarfile.TarInfo("store/outside"), b"x"))
    archive(tmp_path / "hardlink", (link("auth", "/etc/hostname", tarfile.LNKTYPE), b""))
    archive(tmp_path / "device", (link("null", "", tarfile.CHRTYPE), b""))
    archive(tmp_path / "twice", (tarfile.TarInfo("a"), b"x"), (tarfile.TarInfo("a"), b"y"))
    archive(tmp_path / "file-as-folder", (tarfile.TarInfo("a"), b"x"), (tarfile.TarInfo("a/b"), b"y"))
    archive(tmp_path / "unknown", (tarfile.TarInfo("a"), b"x"), (tarfile.TarInfo("manifest.json"), b"{}"))
    archive(tmp_path / "odd-manifest", (tarfile.TarInfo("manifest.json"), b"[1]"))
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    for path in files:
        with pytest.raises(ArtifactError, match="is no backup of a gptcore home, or is damaged or cut short"):
            restore(path, tmp_path / "new")
    newer = tarfile.TarInfo("backup.json"), json.dumps({"format": 1, "schema": 99, "home": "/old", "created": "now"}).encode()
    with pytest.raises(ArtifactError, match="was written by a newer gptcore"):
        restore(archive(tmp_path / "newer", newer), tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == sorted([*files, tmp_path / "newer"])


def test_of_a_training_that_is_not_finished_what_it_needs_to_go_on_is_saved_and_of_a_finished_one_the_model(tmp_path):
    home = open_home(tmp_path / "home")
    done = build(home, "base")
    workspace(done.path.with_suffix(".run"))
    run = workspace(home / "store" / "base" / "tiny-gpt" / "0123456789ab.run")
    (run / "checkpoints" / "step-000002.partial").mkdir()
    (run / "checkpoints" / "step-000002.partial" / "model.safetensors").write_text("torn")
    for name in ("job.json", "journal.jsonl", "resolved.json"):
        (run / name).write_text(json.dumps({"shards": f"{home}/store/shards/a/b"}))
    for name in ("trainer.json", "trainer.lock"):
        (run / name).write_text("123")
    with sqlite3.connect(home / "mlflow.db") as database:  # as MLflow leaves it when it is killed: half a transaction
        database.execute("CREATE TABLE tags (value TEXT)")
        database.execute("INSERT INTO tags VALUES (?)", (f"{home}/store/x",))
        database.commit()
        database.execute("INSERT INTO tags VALUES ('not committed')")
        new = restore(backup(home, tmp_path / "home.tar.zst").file, tmp_path / "new").home
    kept = {str(path.relative_to(new / "store" / "base" / "tiny-gpt")) for path in (new / "store").rglob("*") if path.is_file()}
    name = done.path.name
    assert kept == {
        f"{name}/artifact.json", f"{name}/data", "0123456789ab.run/checkpoints/step-000001/model.safetensors",
        "0123456789ab.run/job.json", "0123456789ab.run/journal.jsonl", "0123456789ab.run/resolved.json",
    }  # fmt: skip
    assert json.loads((new / "store/base/tiny-gpt/0123456789ab.run/job.json").read_text())["shards"].startswith(str(new))
    with contextlib.closing(sqlite3.connect(new / "mlflow.db")) as database:
        assert database.execute("SELECT value FROM tags").fetchall() == [(f"{new}/store/x",)]


def test_a_file_that_is_not_there_is_told_before_anything_else(saved, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ArtifactError, match=r"there is no file .*nosuch\.zst to restore from"):
        restore(tmp_path / "nosuch.zst", tmp_path / "full")


def test_a_restore_that_was_killed_is_done_again(saved, tmp_path):
    left = tmp_path / "new.restoring" / "store"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    home = restore(saved, tmp_path / "new").home
    assert not (home / "store" / "half").exists()
    assert not left.parent.exists()


# --------------------------------------------------------------------------------------------------- whole things --


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_restored_home_is_used_as_the_old_one_was_though_that_is_gone(finished, saved, tmp_path):
    old, away = finished.home.home, finished.home.folder / "away"
    there = tmp_path / "new home"

    def gptcore(*arguments):
        command = [sys.executable, "-c", "from flows.cli import main; main()", *map(str, arguments)]
        environment = {**finished.home.environment, "GPTCORE_HOME": str(there)}
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    old.rename(away)
    try:
        gptcore("restore", saved)
        with contextlib.closing(sqlite3.connect(there / "mlflow.db")) as database:
            count = "SELECT (SELECT count(*) FROM runs), (SELECT count(*) FROM logged_models), (SELECT count(*) FROM metrics)"
            runs, models, metrics = database.execute(count).fetchone()
        again = json.loads(gptcore("run", finished.home.config, "--json"))
        assert all(artifact["reused"] for artifact in again["artifacts"].values())
        assert again["models"] == finished.result["models"]
        with contextlib.closing(sqlite3.connect(there / "mlflow.db")) as database:
            after = database.execute(count).fetchone()
        assert (after[0], after[1]) == (runs + 1, models), "one parent run more, nothing shipped twice"
        assert after[2] - metrics <= 10, "the parent's own numbers"
        assert len(json.loads(gptcore("models", "--json"))) == 3
        (answer,) = json.loads(gptcore("generate", "tiny-gpt-classify", "About rain", "--json"))["outputs"]
        assert json.loads(gptcore("promote", "tiny-gpt/1", "--json"))["verdict"] == "champion already"
        code = (
            "import mlflow, sys\nmlflow.set_tracking_uri(f'sqlite:///{sys.argv[1]}/mlflow.db')\n"
            "print(mlflow.pyfunc.load_model('models:/tiny-gpt-classify@champion').predict(['About rain']))\n"
        )
        loaded = subprocess.run(
            [sys.executable, "-c", code, str(there)], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        assert loaded.stdout.strip() == str([answer]), "MLflow finds the same model"
    finally:
        away.rename(old)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_backup_taken_in_the_middle_of_a_training_goes_on_from_its_checkpoint(new_home, tmp_path):
    home = new_home(tmp_path / "old", tasks=[])
    changes = ("--set", "training.steps=4000", "--set", "training.checkpoint_seconds=0.3", "--set", "training.evaluations=1")
    command = [sys.executable, "-c", "from flows.cli import main; main()", "run", str(home.config), *changes]
    process = subprocess.Popen(command, env=home.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while not list(home.home.glob("store/base/*/*.run/checkpoints/step-*[0-9]")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        saved = backup(home.home, tmp_path / "home.tar.zst").file
        assert process.poll() is None, "the run did not notice"
    finally:
        trainers = [child for child in psutil.Process(process.pid).children(recursive=True) if "torch" in str(child.cmdline())]
        process.kill()
        process.wait()
        psutil.wait_procs(trainers, timeout=60)
    new = restore(saved, tmp_path / "new").home
    (run,) = new.glob("store/base/*/*.run")
    step = max(int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*"))
    (record,) = (new / "runs").glob("*.json")
    dead = json.loads(record.read_text())["mlflow_run_id"]
    # Shorter from here on is not allowed, it would be another training: end it as a person would, after it went on.
    process = subprocess.Popen(
        command, env={**home.environment, "GPTCORE_HOME": str(new)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 200
        while not [line for line in read_journal(run / "journal.jsonl") if line.get("event") == "resumed"]:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        process.terminate()
        process.wait()
    (resumed,) = [line for line in read_journal(run / "journal.jsonl") if line.get("event") == "resumed"]
    assert resumed["step"] == step > 0
    with contextlib.closing(sqlite3.connect(new / "mlflow.db")) as database:
        assert database.execute("SELECT status FROM runs WHERE run_uuid = ?", (dead,)).fetchone() == ("KILLED",)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_training_that_cannot_fit_is_refused_before_it_begins(new_home, tmp_path):
    home = new_home(tmp_path, tasks=[])
    result = home.gptcore("run", home.config, "--set", "model.width=40000000", check=False)
    assert result.returncode == 1
    said = result.stderr.strip().splitlines()[-1]
    assert said.startswith("gptcore: the training of base needs at least ")
    assert "keep fewer checkpoints (training.keep)" in said
    assert not list(home.home.glob("store/base/*/*.run/job.json"))
