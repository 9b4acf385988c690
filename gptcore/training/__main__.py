"""`python -m gptcore.training RUN`: one trainer process, started by torchrun."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from gptcore.artifacts import write_json
from gptcore.errors import GptcoreError, TrainingError
from gptcore.training.attempts import Recorder
from gptcore.training.energy import rapl
from gptcore.training.job import Run
from gptcore.training.process import ERROR_MARK, STOPPED, die_with_parent, start_time


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
    """Train the run in `folder`; returns the exit code."""
    stop = _Stop()
    die_with_parent()
    run = Run(folder)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    lock = FileLock(run.lock)
    try:
        if rank == 0:
            # Held until this process ends, however it ends: never two trainers in one folder.
            lock.acquire(timeout=0)
            write_json(run.holder, {"pid": os.getpid(), "started": start_time(os.getpid())})
        # The first one speaks for all of them: the packages are the whole machine's.
        with Recorder(run.attempts, rapl()) if rank == 0 else Recorder(Path(os.devnull)) as recorder:
            finished = _train(run, rank, world, stop, recorder)
            recorder.ended = "finished" if finished else "stopped"
        return 0 if finished else STOPPED
    except Timeout:
        return _fail(TrainingError(f"another trainer is at work in {folder}; wait for it or end it"))
    except GptcoreError as error:
        return _fail(error)


def _train(run: Run, rank: int, world: int, stop: _Stop, recorder: Recorder) -> bool:
    # torch takes seconds to import: the lock is held and signals are heard before that.
    import torch
    import torch.distributed as dist

    from gptcore.training.loop import train
    from gptcore.training.trainer import Rank

    if world > 1:
        cuda = torch.cuda.is_available() and run.job().training.device != "cpu"
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        finished = train(run, Rank(rank, world), stop, recorder)
        # One that left earlier would close the connections of those still at work; the farewell itself may be cut short.
        with contextlib.suppress(RuntimeError):
            Rank(rank, world).wait()
        return finished
    finally:
        if world > 1:
            dist.destroy_process_group()


def _fail(error: GptcoreError) -> int:
    """Hand the one sentence to the process that started us; the disk may be full, so not through a file."""
    print(f"{ERROR_MARK}{json.dumps({'type': type(error).__name__, 'text': str(error)})}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
