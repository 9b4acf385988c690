"""What a command does around a flow: Prefect's server and its settings, what the dead have left, a clean end when interrupted.

Prefect reads its settings when it is imported, so nothing here imports it at the top, and a flow is imported inside:

    with flow_environment(terminal):
        from flows.pipeline import pipeline

        outcome = pipeline(settings)
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from flows.operations.runs import mark_dead_flow_runs
from flows.operations.server import private_server, set_default_environment
from gptcore.artifacts import home_folder, open_home
from gptcore.errors import Interrupted

if TYPE_CHECKING:
    from tasks.run import Watcher


@contextlib.contextmanager
def flow_environment(watcher: "Watcher", rebuild: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The home, in which flows can be called inside the block: `watcher` sees their runs, `rebuild` are stages to build anew.

    Ctrl-C and SIGTERM inside the block end in `Interrupted`. Raises what opening the home and its server raise.
    """
    set_default_environment()
    # The person sees one message; Prefect's own log, with the traceback, is in its UI.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    home = open_home(home_folder())
    with interruptible(), private_server(home) as server:
        os.environ.update(server.client_environment())
        import flows.chain  # noqa: F401  (imports prefect and all tasks, while the server starts)
        from flows.session import OPTIONS, Options
        from tasks.tracking import Connection

        # MLflow's import, and the first time its database, take seconds too: beside the server's start they cost nothing.
        with contextlib.suppress(Exception):  # whatever is wrong with it, the run says so when it matters
            _ = Connection(home).client
        server.wait_ready()
        mark_dead_flow_runs(home)
        before = OPTIONS.set(Options(watcher, rebuild))
        try:
            yield home
        finally:
            OPTIONS.reset(before)


_KEPT = "interrupted; what was finished and the last checkpoint are kept, run again to go on"


@contextlib.contextmanager
def interruptible(told: str = _KEPT) -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does, after the trainer has saved, and both end it with the sentence `told`."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(told) from error
    finally:
        signal.signal(signal.SIGTERM, before)
