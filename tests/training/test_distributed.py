"""Several processes and nodes learn what one process learns; whoever of them is killed, the run goes on."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from gptcore.artifacts import sha256_file
from gptcore.config import OptimizerConfig
from gptcore.errors import DiskFullError, SettingsError, TrainingError
from gptcore.training import checkpoint, step
from gptcore.training.attempts import Recorder, read_attempts
from gptcore.training.job import Job, Run
from gptcore.training.journal import read_journal
from gptcore.training.loop import train
from gptcore.training.process import RENDEZVOUS, TOLD, run_training
from gptcore.training.ranks import Rank

STEPS = 60


def job_of(tiny, **training) -> Job:
    settings = {"steps": STEPS, "evaluations": 6, "precision": "float32", "compile": False, "processes": 2, **training}
    settings.setdefault("optimizer", OptimizerConfig(algorithm="adamw", rate=0.005))  # at a wilder one roundings part
    return Job(
        model=tiny.model(),
        training=tiny.training(**settings),
        shards=str(tiny.shards),
        shards_digest="shards",
        tokenizer=str(tiny.tokenizer / "tokenizer"),
    )


def learn(run: Run, job: Job, stop=lambda: False) -> Run:
    """Train in this process, alone."""
    run.folder.mkdir(exist_ok=True)
    run.write(job)
    train(run, Rank(), stop, Recorder(Path(os.devnull)))
    return run


def losses_of(run: Run) -> list[float]:
    return [line["values"]["train/loss"] for line in read_journal(run.journal) if "train/loss" in line.get("values", {})]


def told(run: Run, event: str) -> list[str]:
    return [line["text"] for line in read_journal(run.journal) if line.get("event") == event]


def weights_of(run: Run) -> str:
    return sha256_file(run.model / "model.safetensors")


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory) -> Run:
    """A run on two processes that nobody disturbed. Not to be changed."""
    run = Run(tmp_path_factory.mktemp("two"))
    run_training(run, job_of(tiny), lambda line: None)
    return run


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory) -> Run:
    """The same on one process."""
    return learn(Run(tmp_path_factory.mktemp("one")), job_of(tiny, processes=1))


def test_two_processes_learn_what_one_does(two, one):
    assert losses_of(two)[:50] == pytest.approx(losses_of(one)[:50], abs=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two cards")
def test_two_cards_learn_what_one_process_does(tiny, tmp_path, one):
    run = Run(tmp_path / "run")
    run_training(run, job_of(tiny, device="cuda"), lambda line: None)
    assert losses_of(run)[:20] == pytest.approx(losses_of(one)[:20], abs=1e-2)


def test_when_one_of_two_processes_is_killed_both_start_again_and_no_bit_changes(tiny, tmp_path, two):
    run, starts = Run(tmp_path / "run"), []

    def kill_the_other_one(line):
        if line["step"] > 25 and not starts:
            first = psutil.Process(json.loads(run.holder.read_text())["pid"])
            (other,) = (p for p in first.parent().children() if p.pid != first.pid and "gptcore.training" in p.cmdline())
            starts.append(first.parent().pid)
            other.kill()

    run_training(run, job_of(tiny), kill_the_other_one)
    assert weights_of(run) == weights_of(two)
    assert [attempt.ended for attempt in read_attempts(run.attempts)] == ["killed", "finished"]
    assert told(run, "resumed")
    assert not told(run, "memory")
    steps = [line["step"] for line in read_journal(run.journal) if "train/loss" in line.get("values", {})]
    assert steps == list(range(1, STEPS + 1))


def test_a_sentence_of_one_of_two_processes_ends_both_and_is_not_tried_again(tiny, tmp_path, two):
    run = without_its_end(two, tmp_path / "run")
    with pytest.raises(TrainingError, match="belongs to another shards than this run"):
        run_training(run, job_of(tiny).model_copy(update={"shards_digest": "others"}), lambda line: None)
    assert [attempt.ended for attempt in read_attempts(run.attempts)] == ["finished", "failed"]


def test_two_nodes_learn_bit_for_bit_what_two_processes_of_one_node_do(tiny, tmp_path, monkeypatch, two):
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv(RENDEZVOUS, f"localhost:{free.getsockname()[1]}")
    run, joined = Run(tmp_path / "run"), []

    def join_as_told(line):
        if line.get("event") == "waiting":
            command = line["text"].partition("each of them: ")[2].split()
            assert command[0] == f"{RENDEZVOUS}={os.environ[RENDEZVOUS]}"
            joined.append(subprocess.Popen([sys.executable, *command[2:]], stderr=subprocess.DEVNULL))

    run_training(run, job_of(tiny, processes=1, nodes=2), join_as_told)
    assert joined[0].wait(60) == 0
    assert weights_of(run) == weights_of(two)


def test_several_nodes_need_an_address_and_a_joining_one_a_run(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv(RENDEZVOUS, raising=False)
    with pytest.raises(
        SettingsError, match=r"training\.nodes is 2, and GPTCORE_RENDEZVOUS is not set: set it, on every node, "
    ):
        run_training(Run(tmp_path / "run"), job_of(tiny, processes=1, nodes=2), lambda line: None)
    assert not (tmp_path / "run").exists()
    command = [sys.executable, "-m", "gptcore.training.process", str(tmp_path)]
    joining = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (joining.returncode, joining.stderr) == (
        1, f"gptcore: {tmp_path} is no run folder: it has no job.json; the first node tells which one it is\n",
    )  # fmt: skip


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8))
def test_a_gradient_goes_over_the_wire_in_buckets_and_comes_back_in_its_tensors(alone, sizes):
    tensors = [torch.rand(size, 2, device="cpu") for size in sizes]
    before = [tensor.clone() for tensor in tensors]
    step.add_up(tensors)
    assert all(map(torch.equal, tensors, before))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A group of this process alone, in which a sum is what was there; ten numbers go at once."""
    folder = tmp_path_factory.mktemp("group")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_BUCKET", 10)
        yield
    dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------- checkpoints --


def newest(run: Run) -> Path:
    return max(run.checkpoints.glob("step-??????"))


def test_every_process_writes_its_share_of_a_checkpoint(two):
    names = {file.name for file in newest(two).iterdir()}
    assert names == {"checkpoint.json"} | {
        f"{part}-{number}-of-2.safetensors" for part in ("model", "optimizer") for number in (1, 2)
    }
    sizes = [(newest(two) / f"model-{number}-of-2.safetensors").stat().st_size for number in (1, 2)]
    assert max(sizes) < 1.2 * min(sizes)
    file = two.folder / "whole.safetensors"
    checkpoint.extract_weights(checkpoint.verify(newest(two)), file)
    assert sha256_file(file) == weights_of(two)


@given(st.dictionaries(st.text(max_size=4), st.integers(0, 1000)), st.integers(1, 9))
def test_shares_are_disjoint_whole_and_balanced(sizes, world):
    tensors = {name: torch.empty(size, dtype=torch.uint8, device="cpu") for name, size in sizes.items()}
    shares = [checkpoint.share_of(tensors, Rank(number, world)) for number in range(world)]
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    loads = [sum(tensor.nbytes for tensor in share.values()) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


def without_its_end(run: Run, folder: Path) -> Run:
    """A copy as it was when most of it was done."""
    shutil.copytree(run.folder, folder)
    copy = Run(folder)
    shutil.rmtree(copy.model)
    shutil.rmtree(newest(copy))
    return copy


def test_what_two_processes_began_one_ends_even_when_a_share_of_the_newest_checkpoint_is_broken(tiny, tmp_path, two, one):
    run = without_its_end(two, tmp_path / "run")
    job = job_of(tiny, keep=3)
    last = newest(run)
    shutil.copytree(last, run.checkpoints / "step-000055")  # another one, newer
    manifest = json.loads((run.checkpoints / "step-000055" / "checkpoint.json").read_text())
    (run.checkpoints / "step-000055" / "checkpoint.json").write_text(json.dumps({**manifest, "step": 55}))
    os.truncate(run.checkpoints / "step-000055" / "optimizer-2-of-2.safetensors", 100)
    learn(run, job.model_copy(update={"training": job.training.model_copy(update={"processes": 1})}))
    (broken,) = told(run, "broken_checkpoint")
    assert "optimizer-2-of-2.safetensors is not the file that was saved" in broken
    assert told(run, "adapted") == [
        "goes on with 1 node(s) x 1 process(es) x 1 thread(s), 2 sequences at a time; "
        "it was 1 node(s) x 2 process(es) x 1 thread(s), 2 sequences at a time"
    ]
    resolved = run.resolved()
    assert resolved is not None
    assert (resolved.processes, resolved.batch) == (1, 4)
    assert losses_of(run) == pytest.approx(losses_of(one), abs=1e-3)


def test_what_one_process_began_two_end(tiny, tmp_path, one):
    run = without_its_end(one, tmp_path / "run")
    run_training(run, job_of(tiny), lambda line: None)
    assert told(run, "adapted") == [
        "goes on with 1 node(s) x 2 process(es) x 1 thread(s), 2 sequences at a time; "
        "it was 1 node(s) x 1 process(es) x 1 thread(s), 4 sequences at a time"
    ]
    assert losses_of(run) == pytest.approx(losses_of(one), abs=1e-3)
    assert (newest(run) / "model-2-of-2.safetensors").is_file()


LIMITED = (
    "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); sys.argv = sys.argv[1:]; "
    "runpy.run_module('gptcore.training', run_name='__main__')"
)


def test_a_full_disk_under_one_process_is_the_same_sentence_on_all(tiny, tmp_path):
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    run.write(job_of(tiny, steps=2, evaluations=1))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    trainers = [
        subprocess.Popen(
            [sys.executable, "-c", LIMITED, limit, str(run.folder)], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
        )
        for rank, limit in enumerate(("-1", "20000"))
    ]  # fmt: skip
    said = [json.loads(trainer.communicate(timeout=120)[1].rpartition("gptcore-error: ")[2]) for trainer in trainers]
    assert [trainer.returncode for trainer in trainers] == [TOLD, TOLD]
    assert said[0] == said[1]
    assert said[0]["type"] == DiskFullError.__name__
    assert said[0]["text"].startswith(f"no space left while writing to {run.checkpoints}: ")
    assert list(run.checkpoints.iterdir()) == []
