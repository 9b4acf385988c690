"""Runs that are at work, were killed, or are to be ended: settle, cancel, logs.

    python -m flows.operations.runs settle        sets right in both UIs what killed runs left
    python -m flows.operations.runs stop PID…     ends these runs, whose trainers save; both for the supervisor

Whether a run lives is told by its record (`tasks/active.py`): it holds a lock on it, which the kernel drops with the process.
A run that a worker started and that never came to write one is known by the pid that Prefect noted. Prefect is imported when
it is needed; its address stands in the environment.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID

import psutil

from gptcore.artifacts import home_folder, open_home
from gptcore.errors import GptcoreError
from tasks.active import PREFECT, RunRecord, active_runs, settle_dead_runs

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

DIED = "The process of this run is gone; it was killed or the machine went down."
_SAVE = 45.0
"""Seconds a run has to save after SIGTERM: the trainer's 30 and what comes around it."""
_FOLLOW = 1.0
_NEVER_BEGAN = timedelta(minutes=5)
"""A run for which no process is known after this long never had one."""
_PAGE = 200


class RunError(GptcoreError):
    """A run that is not there, or that cannot be ended."""


# -------------------------------------------------------------------------------------------------------- settle --


def mark_dead_flow_runs(home: Path) -> int:
    """Set flow runs of processes that no longer exist to Crashed, with their task runs; return how many there were.

    Raises what Prefect's client raises when it cannot reach its server.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        count = 0
        if any((home / "runs").glob("*.json")):
            count = settle_dead_runs(home, PREFECT, lambda flow_run_id: _crash(client, UUID(flow_run_id)))
        for run in _unfinished(client):
            if _process_is_gone(run, home):
                _crash(client, run.id)
                count += 1
    return count


def _crash(client: "SyncPrefectClient", flow_run_id: UUID) -> None:
    from prefect.states import Crashed

    end_flow_run(client, flow_run_id, Crashed(message=DIED))


def end_flow_run(client: "SyncPrefectClient", flow_run_id: UUID, state: "State[Any]") -> bool:
    """Set a flow run and its task runs to a final state, those that have none yet; whether there was anything to set."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.exceptions import ObjectNotFound

    try:
        before = client.read_flow_run(flow_run_id).state
    except ObjectNotFound:
        return False  # of another server, or deleted
    if before is not None and before.is_final():
        return False
    only = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    for task_run in client.read_task_runs(flow_run_filter=only):
        if task_run.state is not None and not task_run.state.is_final():
            client.set_task_run_state(task_run.id, state, force=True)
    client.set_flow_run_state(flow_run_id, state, force=True)
    return True


def _unfinished(client: "SyncPrefectClient") -> "list[FlowRun]":
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    types = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    at_work = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types)))
    return client.read_flow_runs(flow_run_filter=at_work, limit=_PAGE)


def _process_is_gone(run: "FlowRun", home: Path) -> bool:
    """Whether a worker of this machine started the run and its process is gone. After a reboot its pid may be another's."""
    if str(run.id) in {record.prefect_flow_run_id for record in active_runs(home)}:
        return False
    host, _, pid = (run.infrastructure_pid or "").rpartition(":")
    # A worker tells the bare pid. With a server of this machine alone it can only be one of this machine.
    if not (host == socket.gethostname() if host else is_local_server()):
        return False
    if not pid.isdigit():  # its worker was killed before it could start a process
        return run.state is not None and datetime.now(UTC) - run.state.timestamp > _NEVER_BEGAN
    try:
        born = psutil.Process(int(pid)).create_time()
    except psutil.Error:
        return True
    began = run.start_time or run.expected_start_time
    return began is not None and born > began.timestamp() + 60


def settle(home: Path) -> None:
    """Set right in Prefect and MLflow what killed runs left behind."""
    from tasks.tracking import Tracking

    if count := mark_dead_flow_runs(home):
        print(f"{count} run(s) had been killed and are Crashed now")
    Tracking(home, "", print).settle()


def is_local_server() -> bool:
    """Whether Prefect's server is this machine's alone."""
    return urlsplit(os.environ.get("PREFECT_API_URL", "")).hostname == "127.0.0.1"


# ------------------------------------------------------------------------------------------------------------ find --


def short(flow_run_id: UUID | str) -> str:
    """The last eight letters of an id: its beginning is the time, and so the same for all runs of an hour."""
    return str(flow_run_id)[-8:]


def find_run(client: "SyncPrefectClient", what: str | None, home: Path) -> "FlowRun":
    """The flow run that a person means: an id or its last eight letters, a model's name (its newest run), or none: the newest.

    Of several, one that is at work goes first. Raises `RunError` that lists the last ones.
    """
    from prefect.exceptions import ObjectNotFound

    with contextlib.suppress(ValueError, ObjectNotFound):
        return client.read_flow_run(UUID(what or ""))
    begun = _begun(client, _PAGE)
    waiting = _scheduled(client, _PAGE) if what else []
    living = {record.prefect_flow_run_id for record in active_runs(home)}
    known = sorted(begun, key=lambda run: str(run.id) not in living)
    if what is None and known:
        return known[0]
    for run in (*known, *waiting):
        if what and (short(run.id) == what.lower() or run.name == what):
            return run
    last = ", ".join(f"{short(run.id)} ({run.name}, {run.state_name})" for run in begun[:5])
    raise RunError(
        f"there is no run {what!r}; the last ones: {last}" if what and last else "there is no run yet: gptcore run makes one"
    )


# ---------------------------------------------------------------------------------------------------------- cancel --


def cancel(home: Path, what: str) -> dict[str, Any]:
    """End a run: its trainer saves, and a later run continues from there. One that has not begun never will.

    Returns what it was and what it is now: a run that ends by itself meanwhile keeps its own state. Raises `RunError` when
    there is no such run, or when it has ended already.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import StateType

    why = "Cancelled with gptcore cancel"
    with get_client(sync_client=True) as client:
        run = find_run(client, what, home)
        if run.state is not None and run.state.is_final():
            raise RunError(f"the run {short(run.id)} of {run.name} has ended already: it is {run.state_name}")
        told: dict[str, Any] = {"run": str(run.id), "name": run.name, "was": run.state_name}
        records = active_runs(home)
        pids = {record.pid for record in records if record.prefect_flow_run_id == str(run.id)}
        if pids:
            state = _stop(client, [record for record in records if record.pid in pids], why)[str(run.id)]
        elif run.state is not None and run.state.type in (StateType.RUNNING, StateType.PENDING):
            # Its process is only starting, or is on another machine: its worker ends it.
            _ask_to_cancel(client, run.id, why)
            state = "Cancelling"
        else:
            state = _note_cancelled(client, run.id, why)
        return told | {"state": state, "saved": bool(pids)}


def stop(home: Path, pids: set[int]) -> None:
    """End the runs with these pids, all at once: the services go down."""
    from prefect.client.orchestration import get_client

    records = [record for record in active_runs(home) if record.pid in pids]
    with get_client(sync_client=True) as client:
        for flow_run_id, state in _stop(client, records, "Stopped by gptcore down").items():
            print(f"the run {short(flow_run_id)} is {state}; a later run continues from there")


def _stop(client: "SyncPrefectClient", records: list[RunRecord], why: str) -> dict[str, str]:
    """Have all of these runs save and end; the state of each by its id. Runs of one process, as a sweep's, end together."""
    runs = [record.prefect_flow_run_id for record in records if record.prefect_flow_run_id]
    for flow_run_id in runs:
        _ask_to_cancel(client, UUID(flow_run_id), why)  # before the signal: otherwise its end would be told as a crash
    with ThreadPoolExecutor(max_workers=max(1, len(records))) as pool:
        list(pool.map(end_process, records))
    return {flow_run_id: _note_cancelled(client, UUID(flow_run_id), why) for flow_run_id in runs}


def _ask_to_cancel(client: "SyncPrefectClient", flow_run_id: UUID, why: str) -> None:
    from prefect.states import Cancelling

    client.set_flow_run_state(flow_run_id, Cancelling(message=f"{why}; it saves."))


def _note_cancelled(client: "SyncPrefectClient", flow_run_id: UUID, why: str) -> str:
    """Set a run that was ended to Cancelled, unless it ended by itself in time; the name of its state."""
    from prefect.states import Cancelled

    state: State[Any] = Cancelled(message=f"{why}; what was finished and the last checkpoint are kept.")
    if not end_flow_run(client, flow_run_id, state):
        before = client.read_flow_run(flow_run_id).state
        if before is None or not before.is_crashed():
            return before.name or "" if before is not None else ""
        client.set_flow_run_state(flow_run_id, state, force=True)  # the run, or its worker, called it a crash
    return "Cancelled"


def end_process(record: RunRecord, seconds: float = _SAVE) -> None:
    """Ask the process of a run to save and end, and wait for it; insist after a while."""
    try:
        process = psutil.Process(record.pid)
        if abs(process.create_time() - record.started) > 0.05:
            return
        process.send_signal(signal.SIGTERM)
        process.wait(seconds)
    except psutil.TimeoutExpired:
        process.kill()
    except psutil.NoSuchProcess:
        return


# ------------------------------------------------------------------------------------------------------------ logs --


def logs(home: Path, what: str | None, follow: bool, show: Callable[[datetime, str, str], None]) -> "FlowRun":
    """Hand every line that a run logged to `show(when, level, text)`; with `follow`, until it has ended. Returns the run."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        run = find_run(client, what, home)
        seen = 0
        while True:
            run = client.read_flow_run(run.id)
            ended = run.state is not None and run.state.is_final()
            for line in _lines(client, run.id, seen):
                show(line.timestamp, _LEVELS.get(line.level, str(line.level)), line.message)
                seen += 1
            if ended or not follow:
                return run
            time.sleep(_FOLLOW)


_LEVELS = {10: "debug", 20: "info", 30: "warning", 40: "error", 50: "critical"}


def _lines(client: "SyncPrefectClient", flow_run_id: UUID, seen: int) -> Iterator[Any]:
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import LogSort

    only = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id]))
    while page := client.read_logs(log_filter=only, sort=LogSort.TIMESTAMP_ASC, offset=seen, limit=_PAGE):
        yield from page
        seen += len(page)


# ---------------------------------------------------------------------------------------------------------- recent --


def _begun(client: "SyncPrefectClient", most: int) -> "list[FlowRun]":
    """The newest runs that have begun, newest first."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterStartTime
    from prefect.client.schemas.sorting import FlowRunSort

    begun = FlowRunFilter(start_time=FlowRunFilterStartTime(is_null_=False))
    return client.read_flow_runs(flow_run_filter=begun, sort=FlowRunSort.START_TIME_DESC, limit=most)


def _scheduled(client: "SyncPrefectClient", most: int) -> "list[FlowRun]":
    """The next runs that have not begun."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort

    scheduled = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
    return client.read_flow_runs(flow_run_filter=scheduled, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=most)


def recent(most: int = 5) -> dict[str, list[dict[str, Any]]]:
    """The runs at work, the last ones and the next scheduled ones, as plain values."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        flows = {flow.id: flow.name for flow in client.read_flows()}
        deployments = {deployment.id: deployment.name for deployment in client.read_deployments()}
        last, coming = _begun(client, most), _scheduled(client, most)
    return {
        "last": [_row(run, flows, run.name, run.start_time) for run in last],
        # One that has not begun has no name of its own yet.
        "next": [_row(run, flows, deployments.get(run.deployment_id or run.id, ""), run.expected_start_time) for run in coming],
    }


def _row(run: "FlowRun", flows: dict[UUID, str], name: str, when: datetime | None) -> dict[str, Any]:
    return {
        "run": str(run.id), "flow": flows.get(run.flow_id, ""), "name": name, "state": run.state_name,
        "at": when.isoformat(timespec="seconds") if when else None,
        "seconds": round(run.total_run_time.total_seconds(), 1),
    }  # fmt: skip


def main() -> None:
    """See the module's docstring."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    home = open_home(home_folder())
    try:
        if sys.argv[1] == "settle":
            settle(home)
        else:
            stop(home, set(map(int, sys.argv[2:])))
    except GptcoreError as error:
        print(f"gptcore: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:  # whatever Prefect's client raises: this is tried again later
        print(f"gptcore: {sys.argv[1]}: {str(error).strip().partition(chr(10))[0]}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
