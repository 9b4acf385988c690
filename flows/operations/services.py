"""The services of a home as others see them: whether they are up, where they are, how to start and end them.

    <home>/services/supervisor.lock    locked by the supervisor for its life: free means down
    <home>/services/state.json         its pid, the addresses, every service with pid, start and restarts
    <home>/services/deployed.json      the settings files that are deployed, when they run, whether their sources are watched
    <home>/services/*.log              what each of them said
    <home>/services/mlflow-*           MLflow's own users and secret key (0600); the password is that of Prefect's server

`flows/operations/supervisor.py` keeps them. Nothing here imports Prefect or MLflow.
"""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from flows.operations.server import Server, auth_of, is_alive
from gptcore.artifacts import write_json
from gptcore.errors import GptcoreError

_LONGEST_LOG = 10_000_000
"""Bytes after which a log is set aside at the next start."""


class ServicesError(GptcoreError):
    """The services of a home could not be started or ended."""


@dataclass
class State:
    """What `state.json` holds."""

    pid: int
    started: float
    ready: bool = False
    prefect: str | None = None
    """Address of Prefect's pages; None while the user's own server is used."""
    mlflow: str | None = None
    """Address of MLflow's pages; None while the user's own tracking server is used."""
    services: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> pid, since, restarts."""


def read_state(home: Path) -> State | None:
    """What the supervisor told last, whether it lives or not."""
    try:
        return State(**json.loads((home / "services" / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_up(home: Path) -> bool:
    """Whether a supervisor of this home lives."""
    try:
        with (home / "services" / "supervisor.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def mlflow_pages(home: Path) -> str | None:
    """Where a person sees MLflow's pages of this home: a tracking server of the user's own, or the one that `up` keeps."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith(("http://", "https://")):
        return uri.rstrip("/")
    state = read_state(home)
    return state.mlflow if state and is_up(home) else None


@dataclass(frozen=True)
class Deployed:
    """A settings file whose flows are deployed."""

    config: str
    """Its absolute path."""
    folder: str
    """Where the relative paths in it begin."""
    cron: str
    """When its pipeline runs."""
    watch: bool
    """Whether new text in its sources starts a round of continual training."""


def deployed(home: Path) -> dict[str, Deployed]:
    """What is deployed, by the name of the pipeline; `up` brings it back."""
    try:
        found = json.loads((home / "services" / "deployed.json").read_text(encoding="utf-8"))
        return {str(name): Deployed(**entry) for name, entry in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def note_deployed(home: Path, entries: Mapping[str, Deployed]) -> None:
    """From now on these are deployed too. The supervisor notices within seconds whose sources are to be watched."""
    (home / "services").mkdir(mode=0o700, exist_ok=True)
    everything = {**deployed(home), **entries}
    write_json(home / "services" / "deployed.json", {name: asdict(entry) for name, entry in everything.items()})


def set_aside(log: Path) -> None:
    """Begin a log that grew long anew; the one before it goes."""
    if log.exists() and log.stat().st_size > _LONGEST_LOG:
        log.replace(log.with_suffix(".old.log"))


def start_supervisor(home: Path, prefect_port: int, mlflow_port: int) -> subprocess.Popen[bytes]:
    """Start the supervisor in the background; `wait_ready` tells when everything answers."""
    folder = home / "services"
    folder.mkdir(mode=0o700, exist_ok=True)
    code = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))}
    log_file = folder / "supervisor.log"
    set_aside(log_file)
    with log_file.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "flows.operations.supervisor", str(home), str(prefect_port), str(mlflow_port)],
            env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def wait_ready(home: Path, process: subprocess.Popen[bytes] | None, seconds: float = 120.0) -> State:
    """Until everything answers. Raises `ServicesError` with the supervisor's own sentence when it ends, or takes too long."""
    deadline = time.monotonic() + seconds
    log = home / "services" / "supervisor.log"
    while time.monotonic() < deadline:
        state = read_state(home)
        if state is not None and state.ready and is_up(home) and (process is None or state.pid == process.pid):
            return state
        if process is not None and process.poll() is not None:
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            raise ServicesError(last.removeprefix("gptcore: "))
        time.sleep(0.1)
    raise ServicesError(f"the services did not answer within {seconds:.0f} seconds; see {log.parent}/*.log, and gptcore down")


def down(home: Path, seconds: float = 150.0) -> bool:
    """End the supervisor and all that it keeps; whether there was one. Raises `ServicesError` if something does not end."""
    if not is_up(home):
        return False
    state = read_state(home)
    if state is None or not _is(state.pid, state.started):
        raise ServicesError(f"a supervisor of {home} is only starting or ending; wait a moment and say it again")
    os.kill(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while is_up(home):
        if time.monotonic() > deadline:
            raise ServicesError(f"the supervisor (process {state.pid}) does not end; see {home}/services/supervisor.log")
        time.sleep(0.1)
    return True


def wait_for_prefect_to_end(home: Path, seconds: float = 20.0) -> bool:
    """Whether the home's Prefect server ended too: it stays while a run uses it."""
    deadline, pid = time.monotonic() + seconds, server_pid(home)
    while (alive := is_alive(home) or memory(pid)[0]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not alive


def status(home: Path) -> dict[str, Any]:
    """Whether the services are up, where they are, and how each of them is; plain values."""
    state, up = read_state(home), is_up(home)
    if state is None or not up:
        return {"up": False, "prefect": None, "mlflow": None, "services": {}}
    addresses = {
        "prefect": state.prefect and f"{state.prefect}/api/health",
        "mlflow": state.mlflow and f"{state.mlflow}/health",
    }
    rows = {}
    for name, facts in state.services.items():
        row = dict(facts)
        row["alive"], row["memory_mb"] = memory(facts["pid"])
        row["answers"] = answers(address, timeout=3) if (address := addresses.get(name)) else None
        row["since"] = datetime.fromtimestamp(facts["since"], UTC).isoformat(timespec="seconds")
        rows[name] = row
    return {
        "up": True, "ready": state.ready, "prefect": state.prefect, "mlflow": state.mlflow, "pid": state.pid,
        "password": str(home / "prefect" / "auth"), "services": rows,
    }  # fmt: skip


def shell(home: Path) -> str:
    """What the plain `prefect` command needs to reach this home's server, for a shell's `eval`."""
    state = read_state(home)
    if state is None or not is_up(home):
        raise ServicesError(f"the services of {home} are down; gptcore up starts them")
    if state.prefect is None:
        raise ServicesError("PREFECT_API_URL names a server of your own; the prefect command uses that one already")
    server = Server(f"{state.prefect}/api", home, auth_of(home))
    names = ("PREFECT_HOME", "PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "NO_PROXY", "no_proxy")
    environment = server.client_environment()
    return "\n".join(f"export {name}={shlex.quote(environment[name])}" for name in names)


def memory(pid: int | None) -> tuple[bool, float]:
    """Whether a process lives, and what it and all below it hold, in MB."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False, 0.0
        whole = [process, *process.children(recursive=True)]
        return True, round(sum(part.memory_info().rss for part in whole if part.is_running()) / 1e6, 1)
    except (psutil.Error, TypeError):
        return False, 0.0


def _is(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 0.05
    except psutil.Error:
        return False


def answers(address: str, timeout: float = 1.0) -> bool:
    """Whether somebody answers there, be it with a refusal; no proxy stands in between."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=timeout):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


def server_pid(home: Path) -> int | None:
    """Of the home's Prefect server, the last one."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        pid: int | None = json.loads((home / "server.json").read_text())["pid"]
        return pid
    return None
