"""`python -m gptcore.training RUN`: one trainer process, started by torchrun."""

import contextlib
import json
import os
import platform
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from gptcore.artifacts import write_json
from gptcore.errors import GptcoreError, TrainerDied, TrainingError
from gptcore.training.attempts import Recorder, note_out_of_memory
from gptcore.training.energy import rapl
from gptcore.training.job import Run
from gptcore.training.memory import ONE_IS_TOO_MUCH, is_out_of_memory, oom_kills
from gptcore.training.process import ERROR_MARK, STOPPED, TOLD, die_with_parent, start_time


class _Stop:
    """Remembers that SIGTERM or SIGINT came; before the loop there is nothing to save, so the process ends at once."""

    def __init__(self) -> None:
        self.asked, self.in_loop = False, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        if not self.in_loop:
            os._exit(STOPPED)

    def __call__(self) -> bool:
        self.in_loop = True
        return self.asked


def main(folder: Path) -> int:
    """Train the run in `folder`; returns the exit code: torchrun starts it again after any but 0, STOPPED and TOLD."""
    stop = _Stop()
    die_with_parent()
    run = Run(folder)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    lock = FileLock(run.lock)
    try:
        if rank == 0:
            # Held until this process ends, however it ends: never two trainers in one folder.
            lock.acquire(timeout=0)
            write_json(run.holder, {"pid": os.getpid(), "started": start_time(os.getpid()), "host": platform.node()})
        # The first one speaks for all of them: the packages are the whole machine's.
        recorder = Recorder(run.attempts, rapl(), kills=oom_kills()) if rank == 0 else Recorder(Path(os.devnull))
        with recorder, _clear(run, recorder, world):
            finished = _train(run, rank, world, stop, recorder)
            recorder.ended = "finished" if finished else "stopped"
        return 0 if finished else STOPPED
    except Timeout:
        return _fail(run, TrainingError(f"another trainer is at work in {folder}; wait for it or end it"), TOLD)
    except TrainerDied as error:
        return _fail(run, error, 1)
    except GptcoreError as error:
        return _fail(run, error, TOLD)


@contextlib.contextmanager
def _clear(run: Run, recorder: Recorder, world: int) -> Iterator[None]:
    """Memory that ran out becomes a sentence; an error for which another process is to blame is none of this one's."""
    try:
        yield
    except GptcoreError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            if world > 1 and isinstance(error, RuntimeError):  # what gloo and nccl raise when a peer is gone
                recorder.ended = "killed"
            raise
        if recorder.micro_batch == 1:
            raise TrainingError(ONE_IS_TOO_MUCH) from error
        note_out_of_memory(run.attempts)
        at_once = f" with {recorder.micro_batch} sequences at a time" if recorder.micro_batch else ""
        raise TrainerDied(f"the trainer ran out of memory{at_once}; the next one computes half as many") from error


def _train(run: Run, rank: int, world: int, stop: _Stop, recorder: Recorder) -> bool:
    # torch takes seconds to import: the lock is held and signals are heard before that.
    import torch
    import torch.distributed as dist

    from gptcore.training.loop import train
    from gptcore.training.ranks import Rank

    if world > 1:
        cuda = torch.cuda.is_available() and run.job().training.device != "cpu"
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo")
    finished = train(run, Rank(rank, world), stop, recorder)
    if world > 1:
        # One that left earlier would close the connections of those still at work; the farewell itself may be cut short.
        with contextlib.suppress(RuntimeError):
            Rank(rank, world).wait()
        dist.destroy_process_group()
    return finished


def _fail(run: Run, error: GptcoreError, code: int) -> int:
    """Hand the one sentence to the process that started us; the disk may be full, so not through a file alone."""
    report = {"type": type(error).__name__, "text": str(error)}
    print(f"{ERROR_MARK}{json.dumps(report)}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        write_json(run.error, report)
    return code


if __name__ == "__main__":
    if code := main(Path(sys.argv[1])):
        # At once: when other processes notice that this one is gone, torchrun can see how it ended.
        os._exit(code)
