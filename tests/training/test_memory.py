"""Where memory runs out the next trainer computes half as many sequences at a time; a kill by hand changes nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch

from gptcore.errors import TrainingError
from gptcore.training.attempts import Recorder
from gptcore.training.job import Job, Run
from gptcore.training.journal import read_journal
from gptcore.training.loop import train
from gptcore.training.memory import Kills, is_out_of_memory, oom_kills
from gptcore.training.ranks import Rank


def job_of(tiny, **training) -> Job:
    return Job(
        model=tiny.model(),
        training=tiny.training(**{"precision": "float32", "compile": False, **training}),
        shards=str(tiny.shards),
        shards_digest="shards",
        tokenizer=str(tiny.tokenizer / "tokenizer"),
    )


def learn(run: Run, job: Job, kills: Kills | None = None, stop=lambda: False) -> None:
    """Train in this process, as an attempt that is recorded."""
    run.folder.mkdir(exist_ok=True)
    run.write(job)
    with Recorder(run.attempts, kills=kills) as recorder:
        recorder.ended = "finished" if train(run, Rank(), stop, recorder) else "killed"


def told(run: Run) -> list[str]:
    return [line["text"] for line in read_journal(run.journal) if line.get("event") == "memory"]


def stop_after(steps: int):
    asked = iter(range(10_000))
    return lambda: next(asked) + 1 >= steps


@pytest.mark.parametrize(
    ("now", "micro_batch"),
    [
        (Kills("group", 8), 2),
        (Kills("group", 7), 4),  # a kill by hand
        (Kills("another group", 8), 4),
        (None, 4),
    ],
)
def test_a_kill_that_the_kernel_counted_halves_the_micro_batch_and_no_other_kill_does(tiny, tmp_path, now, micro_batch):
    run, job = Run(tmp_path / "run"), job_of(tiny)
    learn(run, job, Kills("group", 7), stop_after(3))
    learn(run, job, now)
    resolved = run.resolved()
    assert resolved is not None
    assert (resolved.micro_batch, resolved.batch) == (micro_batch, 4)
    halved = "memory ran out with 4 sequences at a time: 2 from here on, in a step 4 as before"
    assert told(run) == ([halved] if micro_batch == 2 else [])


def test_one_sequence_at_a_time_cannot_be_halved_and_the_next_run_may_try_again(tiny, tmp_path):
    run, job = Run(tmp_path / "run"), job_of(tiny, micro_batch=1)
    learn(run, job, Kills("group", 0), stop_after(3))
    with pytest.raises(
        TrainingError, match="memory ran out with one sequence at a time, which cannot be halved: set a shorter"
    ):
        learn(run, job, Kills("group", 1))
    learn(run, job, Kills("group", 1))
    assert (run.model / "model.safetensors").is_file()


def test_a_smaller_micro_batch_in_the_settings_is_followed_and_a_larger_one_undoes_no_halving(tiny, tmp_path):
    run = Run(tmp_path / "run")
    learn(run, job_of(tiny), stop=stop_after(2))
    learn(run, job_of(tiny, micro_batch=2), stop=stop_after(2))
    assert run.resolved().micro_batch == 2
    learn(run, job_of(tiny, micro_batch=4))
    assert run.resolved().micro_batch == 2


# Too little address space for all sequences of a step at once, enough for half of them: a real error of the allocator. The
# limit counts from what is taken once torch is loaded.
LIMITED = """
import resource, runpy, sys
from pathlib import Path
import torch
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[2]),) * 2)
runpy.run_module("gptcore.training", run_name="__main__")
"""


def test_an_error_of_the_allocator_halves_the_micro_batch_of_the_next_trainer(tiny, tmp_path):
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    run.write(job_of(tiny, steps=1, batch=4096, micro_batch=4096, evaluations=1))
    command = [sys.executable, "-c", LIMITED, str(run.folder), str(1000 << 20)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # memory is given back and asks for no more than it needs
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 1, "torchrun starts it again"
    assert json.loads(first.stderr.rpartition("gptcore-error: ")[2]) == {
        "type": "TrainerDied",
        "text": "the trainer ran out of memory with 4096 sequences at a time; the next one computes half as many",
    }
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert told(run) == ["memory ran out with 4096 sequences at a time: 2048 from here on, in a step 4096 as before"]


def test_errors_of_both_allocators_are_known_and_others_are_not():
    with pytest.raises(RuntimeError) as told:
        torch.empty(1 << 60, dtype=torch.uint8, device="cpu")
    assert is_out_of_memory(told.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/user/run\n", "user/run/memory.events"),
        ("0::/of/the/host\n", "memory.events"),
        ("5:cpu:/a\n4:memory:/user/run\n0::/\n", "memory/user/run/memory.oom_control"),
    ],
)
def test_the_kernels_count_is_read_from_both_kinds_of_control_groups(tmp_path, groups, file):
    texts = {"proc/sys/kernel/random/boot_id": "a-boot\n", "proc/self/cgroup": groups}
    for name, text in {**texts, f"sys/fs/cgroup/{file}": "oom 1\noom_kill 3\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    kills = oom_kills(tmp_path)
    assert kills is not None
    assert kills.count == 3
    assert kills.group.startswith("a-boot ")
    assert oom_kills(tmp_path / "nowhere") is None
