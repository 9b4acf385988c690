"""The supervisor of `gptcore up`: Prefect's server, MLflow's server and a worker of one home, kept together.

Everything listens on loopback only and asks for the password in <home>/prefect/auth. MLflow's server is a window: runs write to
the home's database directly, with or without it, so that its death costs no run anything. Prefect's server is the one that
`gptcore run` shares (server.py); the supervisor is one more of its users, and starts it again when it dies. MLflow's server and
the workers are on a leash (leash.py): they end when the supervisor does, however it ends. It imports neither Prefect nor
MLflow: what needs them is a process of its own.
"""

import contextlib
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from flows.operations.deployment import CPU_POOL, GPU_POOL
from flows.operations.leash import GRACE, PARENT
from flows.operations.server import (
    DEFAULTS,
    Server,
    auth_of,
    ensure_server,
    is_alive,
    listen,
    private_server,
    set_default_environment,
)
from flows.operations.services import Deployed, ServicesError, State, answers, deployed, read_state, server_pid, set_aside
from gptcore.artifacts import open_home, write_json
from gptcore.errors import GptcoreError
from gptcore.training.process import has_card
from tasks.active import active_runs, has_dead_runs
from tasks.tracking import Connection

_TICK = 0.5
_LOOK = 10.0
"""Seconds between two looks at whether the servers answer."""
_DEAF = 3
"""Looks in a row without an answer, after which a server is started again."""
_START = 120.0
"""Seconds that a server may take to answer for the first time."""
_SETTLE_PAUSE = 60.0
"""Shortest time in seconds between two tries to settle what killed runs left."""
_LONGEST_HELP = 120.0
"""Seconds that a helper may take; nothing is tended meanwhile."""
_CALM = 60.0
"""Seconds after which a service that was started again counts as well."""
_LONGEST_PAUSE = 60.0


class Service:
    """A process on a leash that is started again when it ends, after a pause that grows while it keeps ending."""

    def __init__(self, home: Path, name: str, command: Callable[[], "Start"]) -> None:
        self.name, self.log = name, home / "services" / f"{name}.log"
        self._command = command
        self.process: subprocess.Popen[bytes] | None = None
        self.since, self.restarts = 0.0, -1
        self._pause, self._not_before = 1.0, 0.0

    def tend(self) -> bool:
        """Start it if it does not live; whether anything changed."""
        if self.process is not None and self.process.poll() is None:
            if time.time() - self.since > _CALM:
                self._pause = 1.0
            return False
        if self.process is not None:
            self._not_before = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self.process = None
        if time.monotonic() < self._not_before:
            return False
        self._start()
        return True

    def _start(self) -> None:
        set_aside(self.log)
        with self._command() as start, self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows.operations.leash", *start.command],
                env={**start.environment, PARENT: str(os.getpid()), GRACE: str(start.grace)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=start.folder or self.log.parent,
                pass_fds=[start.listener.fileno()] if start.listener else [],
            )  # fmt: skip
        self.since, self.restarts = time.time(), self.restarts + 1

    def end(self) -> None:
        """Ask it to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def wait(self, seconds: float) -> None:
        """Until it ended; kill it, and all below it, if it does not."""
        if self.process is None:
            return
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    child.kill()
            self.process.kill()
            self.process.wait()


@dataclass
class Start:
    """How to start a service once."""

    command: list[str]
    environment: dict[str, str]
    grace: float = 5.0
    listener: socket.socket | None = None
    folder: Path | None = None
    """Where relative paths begin."""

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *_: object) -> None:
        if self.listener is not None:
            self.listener.close()  # the child holds its own


class Supervisor:
    """Keeps the services of a home until it is told to end."""

    def __init__(self, home: Path, server: Server, mlflow_port: int) -> None:
        self.home, self.server = home, server
        self.state = State(os.getpid(), psutil.Process().create_time(), prefect=server.ui if server.auth else None)
        self.services = []
        self._mlflow_port = mlflow_port
        if Connection(home).is_private:
            self._mlflow_port = _free_port(_remembered(home, "mlflow"), mlflow_port)
            self.state.mlflow = f"http://127.0.0.1:{self._mlflow_port}"
            self.services.append(Service(home, "mlflow", self._mlflow))
        pools = [CPU_POOL, GPU_POOL] if has_card() else [CPU_POOL]
        self.services += [Service(home, f"worker-{pool}", partial(self._worker, pool)) for pool in pools]
        self._watch()
        self._prefect_since, self._prefect_restarts = time.time(), 0
        self._prefect_pid = server_pid(home)
        self._deaf = {"prefect": 0, "mlflow": 0}
        self._looked, self._settle_from = time.monotonic(), 0.0
        self._settle = False

    def keep(self, ready: Callable[[], None]) -> None:
        """Start everything and look after it for ever; `ready` is called once all of it answers."""
        told = False
        while True:
            changed = self._tend_prefect()
            for service in self.services:
                if service.tend():
                    changed = True
                    # A run of a worker that died may have left no record of its own.
                    self._settle |= service.restarts > 0 and service.name.startswith("worker")
            if not told and self._all_answer():
                told = self.state.ready = changed = True
                ready()
            if changed:
                self.write()
            if time.monotonic() - self._looked > _LOOK:
                self._look()
            time.sleep(_TICK)

    def end(self) -> None:
        """The runs of the workers first, which save; then everything else. Prefect's server ends with its last user."""
        if pids := self._runs_of_workers():
            helper("flows.operations.runs", "stop", *pids)
        for service in reversed(self.services):
            service.end()
        for service in reversed(self.services):
            service.wait(60.0)

    def _runs_of_workers(self) -> list[str]:
        """Pids of the flow runs that a worker started, and not a person; the worker itself may be dead."""
        return [str(record.pid) for record in active_runs(self.home) if "prefect.engine" in _command(record.pid)]

    def write(self) -> None:
        """Tell in state.json how things are."""
        self.state.services = {
            service.name: {"pid": service.process.pid, "since": service.since, "restarts": service.restarts}
            for service in self.services
            if service.process is not None
        }
        if self.server.auth is not None:
            prefect = {"pid": self._prefect_pid, "since": self._prefect_since, "restarts": self._prefect_restarts}
            self.state.services = {"prefect": prefect, **self.state.services}
        write_json(self.home / "services" / "state.json", asdict(self.state))

    # -------------------------------------------------------------------------------------------------- looking --

    def _tend_prefect(self) -> bool:
        """Start the home's Prefect server again when it died; its address stays, unless somebody else took it.

        A command that needed it may have been quicker.
        """
        if self.server.auth is None or (is_alive(self.home) and server_pid(self.home) in (self._prefect_pid, None)):
            return False
        if self._prefect_pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._prefect_pid, os.WNOHANG)  # a child of ours, if we started it
        url = ensure_server(self.home)
        self._prefect_pid = server_pid(self.home)
        self._prefect_since, self._prefect_restarts = time.time(), self._prefect_restarts + 1
        if url != self.server.url:
            self.server = Server(url, self.home, self.server.auth)
            self.state.prefect = self.server.ui
            os.environ.update(self.server.client_environment())
            for service in self.services:
                if service.name.startswith("worker"):
                    service.end()  # it starts again with the new address
        return True

    def _all_answer(self) -> bool:
        return answers(f"{self.server.url}/health") and (self.state.mlflow is None or answers(f"{self.state.mlflow}/health"))

    def _look(self) -> None:
        """End a server that does not answer, and settle what killed runs left."""
        self._looked = time.monotonic()
        addresses = {"prefect": f"{self.server.url}/health", "mlflow": self.state.mlflow and f"{self.state.mlflow}/health"}
        for name, address in addresses.items():
            if address is None or answers(address, timeout=5):
                self._deaf[name] = 0
                continue
            facts = self.state.services.get(name, {})
            if time.time() - facts.get("since", 0.0) < _START:
                continue
            self._deaf[name] += 1
            if self._deaf[name] >= _DEAF and (pid := facts.get("pid")):
                print(f"{name} does not answer: starting it again", flush=True)
                self._deaf[name] = 0
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM if name == "mlflow" else signal.SIGKILL)
                return  # whoever needs it waits until it is there again
        self._watch()
        if (self._settle or has_dead_runs(self.home)) and time.monotonic() > self._settle_from:
            self._settle = False
            self._settle_from = time.monotonic() + _SETTLE_PAUSE  # what cannot be settled now is tried again, but not at once
            helper("flows.operations.runs", "settle")

    def _watch(self) -> None:
        """A service for every settings file whose sources are watched, and none for the others."""
        wanted = {f"watch-{name}": entry for name, entry in deployed(self.home).items() if entry.watch}
        gone = [service for service in self.services if service.name.startswith("watch-") and service.name not in wanted]
        for service in gone:
            service.end()
            service.wait(10.0)
            self.services.remove(service)
            self.write()
        for name in wanted.keys() - {service.name for service in self.services}:
            self.services.append(Service(self.home, name, partial(self._watcher, wanted[name])))

    # ------------------------------------------------------------------------------------------------- commands --

    def _watcher(self, entry: Deployed) -> Start:
        command = [sys.executable, "-P", "-m", "flows.cli", "watch", entry.config, "--every", str(_LOOK)]
        return Start(command, dict(os.environ), folder=Path(entry.folder))

    def _worker(self, pool: str) -> Start:
        command = [sys.executable, "-P", "-m", "prefect", "worker", "start", "--type", "process", "--pool", pool]
        command += ["--name", f"{socket.gethostname()}-{pool}", "--install-policy", "never"]
        command += ["--no-create-pool-if-not-found"]  # it would have no limit
        environment = {**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "5"}
        if self.server.auth is None:  # one of ours needs no signs of life: the supervisor sees who is gone
            environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = "30"
        return Start(command, environment)

    def _mlflow(self) -> Start:
        """MLflow's web application under uvicorn: one process, where `mlflow server` would be two, on a socket that is open
        before it starts. The variables are those that `mlflow server` hands on."""
        listener = listen(self._mlflow_port)
        if listener.getsockname()[1] != self._mlflow_port:
            print(f"port {self._mlflow_port} was taken by somebody else; MLflow moved", flush=True)
            self._mlflow_port = listener.getsockname()[1]
            self.state.mlflow = f"http://127.0.0.1:{self._mlflow_port}"
        command = [sys.executable, "-P", "-m", "uvicorn", "--fd", str(listener.fileno()), "--factory", "--no-access-log"]
        command += ["--timeout-graceful-shutdown", "3", "--log-level", "warning", "mlflow.server.auth:create_app"]
        environment = {name: value for name, value in os.environ.items() if not name.lstrip("_").startswith("MLFLOW_")}
        connection = Connection(self.home)
        environment |= {
            **{name: value for name, value in DEFAULTS.items() if name.startswith(("MLFLOW_", "DO_NOT"))},
            **_mlflow_users(self.home),
            "_MLFLOW_SERVER_FILE_STORE": connection.uri,
            "_MLFLOW_SERVER_ARTIFACT_ROOT": connection.artifacts,
            "_MLFLOW_SGI_NAME": "uvicorn",
        }
        return Start(command, environment, listener=listener)


def _command(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


def _mlflow_users(home: Path) -> dict[str, str]:
    """MLflow's basic authentication with the same user and password as Prefect's server, as variables of the environment."""
    folder, (user, _, password) = home / "services", auth_of(home).partition(":")
    users, settings, key = folder / "mlflow-users.db", folder / "mlflow-auth.ini", folder / "mlflow-key"
    told = "\n".join([
        "[mlflow]",
        "default_permission = NO_PERMISSIONS",
        f"database_uri = sqlite:///{users}",
        f"admin_username = {user}",
        f"admin_password = {password}",
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
        "auth_cache_ttl_seconds = 3600",  # hashing the password anew takes 0.3 s a request
    ]) + "\n"  # fmt: skip
    if not settings.exists() or settings.read_text(encoding="utf-8") != told:
        users.unlink(missing_ok=True)  # it keeps the first password it was made with
        _write_secret(settings, told)
    if not key.exists():
        _write_secret(key, secrets.token_urlsafe(32))
    return {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": key.read_text(encoding="utf-8")}


def _write_secret(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")


def _free_port(*wanted: int | None) -> int:
    with listen(*wanted) as found:
        return int(found.getsockname()[1])


def _remembered(home: Path, name: str) -> int | None:
    """The port that a server of this home had before."""
    known = read_state(home)
    address = getattr(known, name) if known else None
    return int(address.rsplit(":", 1)[1]) if address else None


def helper(module: str, *arguments: str) -> tuple[int, str]:
    """Run a part that needs Prefect as a process of its own, so that the supervisor stays small; its exit code and words."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=_LONGEST_HELP
        )
    except subprocess.TimeoutExpired:
        print(f"{module} {' '.join(arguments)} took longer than {_LONGEST_HELP:.0f} s and was ended", flush=True)
        return 1, ""
    said = "\n".join(filter(None, [result.stdout.strip(), result.stderr.strip()]))
    if said:
        print(said, flush=True)
    return result.returncode, said


# --------------------------------------------------------------------------------------------------------- process --


class _Asked(BaseException):
    """SIGTERM or SIGINT came."""


def _ask(_number: int, _frame: FrameType | None) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise _Asked


@contextlib.contextmanager
def _only_one(home: Path) -> Iterator[IO[str]]:
    with (home / "services" / "supervisor.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServicesError(f"the services of {home} are up already; gptcore status shows them") from None
        yield lock


def supervise(home: Path, prefect_port: int, mlflow_port: int, ready: Callable[[], None] = lambda: None) -> None:
    """Be the supervisor of a home until SIGTERM or Ctrl-C."""
    (home / "services").mkdir(mode=0o700, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ask)
    set_default_environment()
    os.environ["GPTCORE_HOME"] = str(home)  # always absolute: flows run elsewhere
    supervisor = None
    with _only_one(home), contextlib.suppress(_Asked), private_server(home, prefect_port) as server:
        try:
            os.environ.update(server.client_environment())
            server.wait_ready()
            supervisor = Supervisor(home, server, mlflow_port)
            supervisor.write()
            helper("flows.operations.runs", "settle")  # makes MLflow's database too, before its server looks for it
            code, said = helper("flows.operations.deployment", "prepare")
            if code != 0:  # without it a worker might start runs that were missed, or two on one card
                raise ServicesError(said.splitlines()[-1].removeprefix("gptcore: ") if said else "Prefect took no work pools")
            supervisor.keep(ready)
        finally:
            if supervisor is not None:
                supervisor.end()
                supervisor.state.ready, supervisor.state.services = False, {}
                write_json(home / "services" / "state.json", asdict(supervisor.state))


def main() -> None:
    """`python -m flows.operations.supervisor HOME PREFECT_PORT MLFLOW_PORT`."""
    try:
        supervise(open_home(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
    except GptcoreError as error:
        print(f"gptcore: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
