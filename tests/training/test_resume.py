"""A run that is killed and goes on reaches the same bits as one that is left alone."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from gptcore.artifacts import sha256_file
from gptcore.errors import DiskFullError, TrainerDied, TrainingError
from gptcore.training.attempts import read_attempts, training_cost
from gptcore.training.job import Job, Run
from gptcore.training.journal import read_journal
from gptcore.training.process import run_training, start

STEPS = 60


def job_of(tiny, **training) -> Job:
    return Job(
        model=tiny.model(),
        training=tiny.training(**{"steps": STEPS, "evaluations": 6, "precision": "float32", "restarts": 0, **training}),
        shards=str(tiny.shards),
        shards_digest="shards",
        tokenizer=str(tiny.tokenizer / "tokenizer"),
    )


def train(run: Run, job: Job) -> str:
    run_training(run, job, lambda line: None)
    return sha256_file(run.model / "model.safetensors")


def steps_of(run: Run) -> list[int]:
    return [line["step"] for line in read_journal(run.journal) if "train/loss" in line.get("values", {})]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory) -> str:
    return train(Run(tmp_path_factory.mktemp("undisturbed")), job_of(tiny))


def trainer_of(process: subprocess.Popen) -> psutil.Process:
    """The worker that torchrun started."""
    while True:
        for child in psutil.Process(process.pid).children(recursive=True):
            if "gptcore.training" in child.cmdline():
                return child
        time.sleep(0.05)


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def kill_at(run: Run, job: Job, step: int, kill) -> None:
    """Start a trainer, wait until it has done `step` steps, call `kill(torchrun, trainer)` and wait for both to be gone."""
    process = start(run)
    worker = trainer_of(process)
    wait_for(lambda: any(s >= step for s in steps_of(run)))
    kill(process, worker)
    wait_for(lambda: process.poll() is not None and not worker.is_running(), 40)


def test_the_same_job_gives_the_same_bits(tiny, tmp_path, undisturbed):
    assert train(Run(tmp_path / "run"), job_of(tiny)) == undisturbed


def test_the_end_tells_how_long_saves_and_records_took(tiny, tmp_path):
    run = Run(tmp_path / "run")
    train(run, job_of(tiny))
    end = read_journal(run.journal)[-1]
    [attempt] = read_attempts(run.attempts)
    assert 0.0 < end["seconds_aside"] < attempt.seconds
    assert "saves and records took" in end["text"]


@pytest.mark.slow
def test_kill_9_of_the_trainer_at_three_moments_changes_no_bit(tiny, tmp_path, undisturbed):
    run, job = Run(tmp_path / "run"), job_of(tiny)
    run.folder.mkdir()
    run.write(job)
    for step in (5, 25, 45):
        kill_at(run, job, step, lambda process, worker: worker.kill())
    assert train(run, job) == undisturbed
    assert steps_of(run) == sorted(set(steps_of(run))), "the curve has a gap or a step twice"
    assert set(steps_of(run)) == set(range(1, STEPS + 1))
    assert any(line.get("event") == "resumed" for line in read_journal(run.journal))
    attempts = read_attempts(run.attempts)
    assert [attempt.ended for attempt in attempts] == ["killed", "killed", "killed", "finished"]
    cost = training_cost(attempts)
    assert cost["repeated_steps"] == sum(attempt.steps for attempt in attempts) - STEPS
    assert cost["repeated_steps"] > 0, "the first kill came before the first checkpoint"
    assert cost["tokens"] == (STEPS + cost["repeated_steps"]) * 4 * 32
    assert all(attempt.seconds > 0 for attempt in attempts)


def test_kill_9_of_whoever_started_it_leaves_no_process_and_saves(tiny, tmp_path, undisturbed):
    run, job = Run(tmp_path / "run"), job_of(tiny)
    run.folder.mkdir()
    run.write(job)
    kill_at(run, job, 15, lambda process, worker: process.kill())
    saved = [line for line in read_journal(run.journal) if line.get("event") == "stopped"]
    assert saved, "the trainer did not save when torchrun died"
    assert train(run, job) == undisturbed


@pytest.mark.slow
def test_a_stopped_training_says_so_and_goes_on_later(tiny, tmp_path, undisturbed):
    run, job = Run(tmp_path / "run"), job_of(tiny, restarts=2)

    def interrupt_soon():
        wait_for(lambda: len(steps_of(run)) > 10)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_soon, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_training(run, job, lambda line: None)
    assert read_journal(run.journal)[-1]["event"] == "stopped"
    assert train(run, job) == undisturbed


@pytest.mark.slow
def test_an_orphaned_trainer_is_ended_before_the_next_one_starts(tiny, tmp_path, undisturbed):
    run, job = Run(tmp_path / "run"), job_of(tiny, steps=STEPS, restarts=2)
    run.folder.mkdir()
    run.write(job)
    process = start(run)
    worker = trainer_of(process)
    wait_for(lambda: len(steps_of(run)) > 3)
    process.send_signal(signal.SIGSTOP)  # a torchrun that does nothing any more
    assert train(run, job) == undisturbed
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "no manifest"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(tiny, tmp_path, undisturbed, damage):
    run, job = Run(tmp_path / "run"), job_of(tiny)
    run.folder.mkdir()
    run.write(job)
    kill_at(run, job, 35, lambda process, worker: worker.kill())
    newest = sorted(run.checkpoints.glob("step-*"))[-1]
    weights = newest / "model.safetensors"
    if damage == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    elif damage == "bit flipped":
        data = bytearray(weights.read_bytes())
        data[-100] ^= 1
        weights.write_bytes(data)
    else:
        (newest / "checkpoint.json").unlink()
    assert train(run, job) == undisturbed
    assert any(line.get("event") == "broken_checkpoint" for line in read_journal(run.journal))
    assert newest.with_name(newest.name + ".broken").is_dir()


def test_a_full_disk_during_a_save_is_one_clear_error_and_keeps_what_was_there(tiny, tmp_path, undisturbed):
    run, job = Run(tmp_path / "run"), job_of(tiny)
    run.folder.mkdir()
    run.write(job)
    kill_at(run, job, 15, lambda process, worker: worker.kill())
    before = sorted(path.name for path in run.checkpoints.glob("step-*"))
    limit = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); sys.argv = sys.argv[1:]; " \
        "runpy.run_module('gptcore.training', run_name='__main__')"  # fmt: skip
    result = subprocess.run(
        [os.sys.executable, "-c", limit, "gptcore.training", str(run.folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    told = json.loads(result.stderr.strip().splitlines()[-1].removeprefix("gptcore-error: "))
    assert told["type"] == DiskFullError.__name__
    assert "no space left" in told["text"]
    assert sorted(path.name for path in run.checkpoints.glob("step-*")) == before
    assert train(run, job) == undisturbed


def test_a_checkpoint_of_other_shards_or_another_tokenizer_is_refused(tiny, tmp_path):
    run, job = Run(tmp_path / "run"), job_of(tiny, steps=4, evaluations=1, restarts=2)
    train(run, job)
    with pytest.raises(TrainingError, match="belongs to another shards than this run"):
        train(run, job.model_copy(update={"shards_digest": "others"}))
    manifest = next(run.checkpoints.glob("step-*")) / "checkpoint.json"
    values = json.loads(manifest.read_text())
    values["identity"]["tokenizer"] = "another"
    manifest.write_text(json.dumps(values))
    with pytest.raises(TrainingError, match="belongs to another tokenizer than this run"):
        train(run, job)
    ended = [attempt.ended for attempt in read_attempts(run.attempts)]
    assert ended == ["finished", "failed", "failed"], "who told why it ends is not started again"


def test_a_trainer_that_dies_is_reported_with_what_is_kept(tiny, tmp_path):
    run, job = Run(tmp_path / "run"), job_of(tiny)

    def kill_soon():
        wait_for(lambda: len(steps_of(run)) > 30)
        psutil.Process(json.loads(run.holder.read_text())["pid"]).kill()

    threading.Thread(target=kill_soon, daemon=True).start()
    with pytest.raises(TrainerDied, match=r"the trainer died of SIGKILL, .* the checkpoint of step \d+ is kept") as told:
        run_training(run, job, lambda line: None)
    assert "\n" not in str(told.value)


def test_minutes_are_turned_into_steps_before_step_1_and_kept(tiny, tmp_path):
    run, job = Run(tmp_path / "run"), job_of(tiny).model_copy(update={"training": tiny.training(minutes=0.03)})
    started = time.monotonic()
    train(run, job)
    assert time.monotonic() - started < 40
    resolved = run.resolved()
    assert resolved is not None
    assert resolved.steps > 10
    assert steps_of(run)[-1] == resolved.steps
    assert resolved.tokens_per_second > 0


@pytest.mark.slow
def test_a_compiled_run_that_was_killed_reaches_the_bits_of_one_that_was_not(tiny, tmp_path):
    # More tokens in a batch than a thread takes at a time, so that two threads meet in the table's gradient.
    job = job_of(tiny, compile=True, batch=64, threads=2)
    left_alone, killed = train(Run(tmp_path / "alone"), job), Run(tmp_path / "killed")
    killed.folder.mkdir()
    killed.write(job)
    shutil.copy(tmp_path / "alone" / "resolved.json", killed.folder)
    kill_at(killed, job, 20, lambda _, worker: worker.kill())
    assert train(killed, job) == left_alone
    assert killed.resolved().compiled


def test_compiling_that_is_impossible_falls_back_to_eager_and_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(os.sys.executable).parent))
    monkeypatch.delenv("CXX", raising=False)
    run = Run(tmp_path / "run")
    train(run, job_of(tiny, steps=2, compile=True))
    resolved = run.resolved()
    assert resolved is not None
    assert not resolved.compiled
    assert "no C++ compiler" in resolved.compile_reason
