"""`python -m flows.operations.leash COMMAND…`: a command that leaves nothing behind, whoever is killed.

The leash gets SIGTERM when its parent dies, and adopts every process that loses its own parent below it. When it is asked to
end, or the command ends, it ends all of them: first kindly, then for good. It imports little: it lives as long as its service.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
PARENT = "GPTCORE_LEASH_PARENT"
"""Variable with the pid of whoever starts a leash: it may be dead before the leash could ask to be told."""
GRACE = "GPTCORE_LEASH_GRACE"
"""Variable with the seconds between asking everybody to end and insisting."""


_LIBC = ctypes.CDLL(None)
_INSIST = 35.0
"""Seconds between asking everybody and killing: what a trainer has to save, and a little more."""


def _follow() -> None:
    """In the new process: should the leash itself be killed, the command goes with it; asking alone does not end a worker."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Asked(BaseException):
    """SIGTERM came."""


def _ask(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Asked


def main(command: list[str]) -> int:
    """Run `command` to its end, or until SIGTERM; returns its exit code."""
    signal.signal(signal.SIGTERM, _ask)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is heard by whoever holds the leash
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    process: subprocess.Popen[bytes] | None = None
    # Not for those below, who may hold leashes of their own.
    parent, grace = int(os.environ.pop(PARENT, os.getppid())), float(os.environ.pop(GRACE, "10"))
    try:
        if os.getppid() == parent:
            # What the starter passed on (a listening socket) is passed on again.
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False, preexec_fn=_follow)
            _bury_until(process)
    except _Asked:
        pass
    if process is not None and process.returncode is None:
        process.terminate()  # it alone: a server ends its own workers in its own order
    end_all(psutil.Process(), grace)
    return process.returncode or 0 if process is not None else 1


def _bury_until(process: "subprocess.Popen[bytes]") -> None:
    """Wait for the command, and for whatever was adopted, so that no zombie stays."""
    while True:
        pid, status = os.wait()
        if pid == process.pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return


def end_all(of: psutil.Process, grace: float) -> None:
    """End every process below `of`: wait `grace` seconds for those that were asked, ask the others, then kill."""
    deadline = time.monotonic() + grace
    if _gone(of, deadline):
        return
    for number, until in ((signal.SIGTERM, deadline + _INSIST), (signal.SIGKILL, deadline + _INSIST + 5)):
        for child in of.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.send_signal(number)
        if _gone(of, until):
            return


def _gone(of: psutil.Process, until: float) -> bool:
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        if not of.children(recursive=True):
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
