"""The trainer as a process of its own: start it through torchrun, follow it, end it, never leave it behind. No torch here.

torchrun starts the trainers of this machine again when one of them was killed, from the last checkpoint. Where several machines
train together, the first one runs the pipeline and the others join by this module's command, `python -m
gptcore.training.process RUN_FOLDER`: what torchrun is told follows from `job.json` and is the same everywhere.

Whoever is started here asks the kernel for a signal when its parent dies (PR_SET_PDEATHSIG), torchrun included: after a
kill -9 of the flow, torchrun gets SIGTERM and passes it on, the trainer saves and ends.
"""

import contextlib
import ctypes
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from gptcore import errors
from gptcore.config import TrainingConfig
from gptcore.errors import GptcoreError, Interrupted, SettingsError, TrainerDied, TrainingError
from gptcore.training.job import Job, Run
from gptcore.training.journal import Follower, Line, read_journal

ERROR_MARK = "gptcore-error: "
STOPPED = 75
"""Exit code of a trainer that was asked to stop and saved (EX_TEMPFAIL: try again)."""
TOLD = 65
"""Exit code of a trainer that ended with a sentence of ours (EX_DATAERR): started again, it would end with the same."""
RENDEZVOUS = "GPTCORE_RENDEZVOUS"
"""host:port of the first of several nodes, reachable from all."""
_WAIT = 600
"""Seconds that nodes wait for each other."""
_PR_SET_PDEATHSIG = 1
_PARENT = "GPTCORE_PARENT"
_GRACE = 30.0
"""Seconds that torchrun, too, gives its workers between SIGTERM and SIGKILL."""


def die_with_parent() -> None:
    """Get SIGTERM when the parent dies; end at once if it is dead already. Not when a person started it: a shell may end."""
    if _PARENT in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        # Checked after the call above: the parent may have died before it.
        if os.getppid() != int(os.environ[_PARENT]):
            os._exit(STOPPED)
    os.environ[_PARENT] = str(os.getpid())  # for those who are started from here


def run_training(run: Run, job: Job, follow: Callable[[Line], None]) -> None:
    """Train `job` in its run folder to the end, from wherever an earlier process got; `follow` sees every journal line.

    Raises what the trainer reported, `Interrupted` when it was asked to stop, `TrainerDied` when it was killed,
    `TrainingError` when it ended in any other way.
    """
    address = rendezvous(job.training)
    run.folder.mkdir(parents=True, exist_ok=True)
    with _cards(job, follow):
        end_leftover(run)
        run.error.unlink(missing_ok=True)
        run.write(job)
        if (others := job.training.nodes - 1) > 0:
            join = f"{RENDEZVOUS}={address} python -m gptcore.training.process {run.folder}"
            _say(follow, f"waits for {others} more node(s); on each of them: {join}")
        _train(run, follow)


def _train(run: Run, follow: Callable[[Line], None]) -> None:
    follower = Follower(run.journal, since=time.time())
    process = start(run)
    assert process.stderr is not None
    said: deque[str] = deque(maxlen=60)
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            for line in follower.lines():
                follow(line)
            time.sleep(0.2)
    except BaseException:
        stop(process)
        raise
    finally:
        reader.join(timeout=5)
        for line in follower.lines():
            follow(line)
    if not (run.model / "model.safetensors").exists() or process.returncode != 0:
        raise _why(process.returncode, list(said), run)


def has_card() -> bool:
    """Whether this machine has an NVIDIA card; asked without loading torch."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


@contextlib.contextmanager
def _cards(job: Job, follow: Callable[[Line], None]) -> Iterator[None]:
    """Hold this machine's cards while training on them: two runs, of whatever homes, never fight for one."""
    if job.training.device == "cpu" or not has_card():
        yield
        return
    lock = FileLock(Path(tempfile.gettempdir()) / f"gptcore-cards-{os.getuid()}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(follow, "waits for the card, another training is at work on it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _say(follow: Callable[[Line], None], text: str) -> None:
    """An event from before there is a trainer."""
    follow({"t": time.time(), "step": 0, "kind": "event", "event": "waiting", "text": text})


def rendezvous(training: TrainingConfig) -> str:
    """Where the trainers meet. Raises `SettingsError` when several nodes are asked for and the environment does not say."""
    if training.nodes == 1:
        return "localhost:0"
    address = os.environ.get(RENDEZVOUS, "")
    if not re.fullmatch(r"[^\s:]+:\d+", address):
        raise SettingsError(
            f"training.nodes is {training.nodes}, and {RENDEZVOUS} is {address or 'not set'}: set it, on every node, to the "
            "first node's name or address and a free port of it, as in node0:29500"
        )
    return address


def start(run: Run) -> subprocess.Popen[str]:
    """Start torchrun on the job of the run folder; its standard error is a pipe."""
    # A session of its own: Ctrl-C reaches the flow only, which passes it on and waits for the save.
    command = [sys.executable, "-m", "gptcore.training.process", str(run.folder)]
    environment = {**os.environ, _PARENT: str(os.getpid())}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip


def stop(process: subprocess.Popen[str]) -> None:
    """Ask torchrun and through it the trainer to save and end; insist after a while."""
    process.terminate()
    try:
        process.wait(_GRACE + 5)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


def end_leftover(run: Run) -> None:
    """End a trainer of this run folder whose flow is gone; wait for the save it may be making."""
    try:
        record = json.loads(run.holder.read_text(encoding="utf-8"))
        if record.get("host", platform.node()) != platform.node():
            return  # torchrun ends it there, once this node is gone
        trainer = psutil.Process(record["pid"])
        if start_time(trainer.pid) != record["started"]:
            return  # the number belongs to another process by now
        trainer.terminate()
        if not _gone_within(_GRACE, trainer):
            trainer.kill()
            _gone_within(_GRACE, trainer)
    except (FileNotFoundError, ValueError, KeyError, psutil.NoSuchProcess):
        return


def _gone_within(seconds: float, process: psutil.Process) -> bool:
    """Whether a process ends in time; one that its parent has not yet buried has ended too."""
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def start_time(pid: int) -> float:
    """When a process started; with the pid it names a process for good."""
    return round(psutil.Process(pid).create_time(), 2)


def _why(code: int, said: list[str], run: Run) -> GptcoreError:
    """What its exit tells, or the trainer's own sentence."""
    lines = read_journal(run.journal)
    saved = [line["step"] for line in lines if line.get("event") == "checkpoint"]
    kept = f"the checkpoint of step {saved[-1]} is kept" if saved else "there was no checkpoint yet"
    if killed := _killed_by(code, said):
        cause = ", by hand or by the kernel for want of memory" if killed == signal.SIGKILL else ""
        return TrainerDied(f"the trainer died of {killed.name}{cause}; {kept}, the next run continues from there")
    if (report := _reported(said, run)) is not None:
        kind = getattr(errors, report["type"], TrainingError)
        return kind(report["text"]) if issubclass(kind, GptcoreError) else TrainingError(report["text"])
    if lines and lines[-1].get("event") == "stopped":
        return Interrupted(f"training was stopped; {kept}, the next run continues from it")
    told = [line.rstrip() for line in said if "Error" in line and "ChildFailedError" not in line]
    detail = f" ({told[-1].strip()[:300]})" if told else ""
    return TrainingError(f"the trainer died (exit code {code}){detail}; {kept}, the next run continues from there")


def _reported(said: list[str], run: Run) -> dict[str, str] | None:
    """The last sentence of a trainer, of this node or of another one."""
    told = [line.removeprefix(ERROR_MARK) for line in said if line.startswith(ERROR_MARK)]
    with contextlib.suppress(OSError):
        told = told or [run.error.read_text(encoding="utf-8")]
    return json.loads(told[-1]) if told else None


def _killed_by(code: int, said: list[str]) -> signal.Signals | None:
    """The signal that ended torchrun, or the worker that torchrun names as the root cause; None if it only asks to stop."""
    told = re.findall(r"exitcode\s*:\s*(-?\d+)", "".join(said))
    number = -code if code < 0 else -int(told[-1]) if told else 0
    if number <= 0 or number in (signal.SIGTERM, signal.SIGINT):
        return None
    return signal.Signals(number)


# ------------------------------------------------------------------------------------------------------ torchrun --


def main(folder: Path) -> None:
    """Be torchrun for the trainers of this node."""
    run = Run(folder.absolute())
    try:
        training = run.job().training
        address = rendezvous(training)
    except FileNotFoundError:
        sys.exit(f"gptcore: {folder} is no run folder: it has no job.json; the first node tells which one it is")
    except GptcoreError as error:
        sys.exit(f"gptcore: {error}")
    hosts = _PARENT in os.environ  # the first node: a person starts the others
    die_with_parent()
    threads = training.threads or max(1, len(os.sched_getaffinity(0)) // training.processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # else torchrun sets 1 for several processes; the trainer itself sets its own
    # A store of its own for every start: in a shared one a restarted gloo reads the addresses of those that died.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    arguments = [f"--nnodes={training.nodes}", f"--nproc-per-node={training.processes}", f"--max-restarts={training.restarts}"]
    arguments += ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}", f"--rdzv-id={folder.name}", "--monitor-interval=0.1"]
    if training.nodes > 1:
        arguments += [f"--rdzv-conf=is_host={int(hosts)},join_timeout={_WAIT},read_timeout={_WAIT}"]
    _launch([*arguments, "-m", "gptcore.training", str(run.folder)])


def _launch(arguments: list[str]) -> None:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher import api

    class Agent(LocalElasticAgent):
        """torchrun's, which would start everybody again who does not end with 0: not whoever was asked to stop or told why."""

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if any(failure.exitcode in (STOPPED, TOLD) for failure in result.failures.values()):
                self._remaining_restarts = 0
            return result

    api.LocalElasticAgent = Agent  # type: ignore[attr-defined]
    torchrun.main(arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
