"""The private Prefect server of a home: started when first needed, shared by all who run, gone when nobody does.

    <home>/prefect/             its database, its log, its auth string (0600)
    <home>/server.json          pid, process start time and url of the server that runs
    <home>/server.lock          held while somebody looks for or starts a server
    <home>/server.alive         locked by the server process for its life: free means dead
    <home>/server.users         every user holds a shared lock; the server ends once it can lock it alone

Both locks belong to processes, so the kernel tells the truth about them after any kill -9. The socket is opened before the
server's process starts: the address is known at once, and a request that comes early waits instead of failing.

Prefect reads its settings when it is imported, so this module imports it nowhere at its top. The order of a client is:

    with private_server(home) as server:
        os.environ.update(server.client_environment())
        import prefect                                      # while the server starts, in a process of its own
        server.wait_ready()
"""

import base64
import contextlib
import fcntl
import gc
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

import psutil
from filelock import FileLock

from gptcore.artifacts import write_json
from gptcore.errors import DiskFullError, GptcoreError

if TYPE_CHECKING:
    import uvicorn

DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "TOKENIZERS_PARALLELISM": "false",
}
_DRAIN_SECONDS = 1.5  # longest wait for what clients have sent to reach the database
_ROOM = 16 * 2**20  # bytes without which the database cannot be made
_STOP_SECONDS = 3.0  # longest wait for an orderly end after that


class ServerError(GptcoreError):
    """Prefect's server did not start or does not answer."""


def set_default_environment() -> None:
    """Give every variable that an entry point of ours needs its default, only where the user has not set it."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Server:
    """A Prefect server and how to reach it."""

    url: str
    """Of its API."""
    home: Path
    auth: str | None = None
    """`user:password`; None for a server of the user's own, whose secrets stand in the environment already."""

    @property
    def ui(self) -> str:
        """Address of its pages."""
        return self.url.removesuffix("/api")

    @property
    def headers(self) -> dict[str, str]:
        """What a request to the API must carry."""
        return {"Authorization": "Basic " + base64.b64encode(self.auth.encode()).decode()} if self.auth else {}

    def client_environment(self) -> dict[str, str]:
        """What must stand in the environment before prefect is imported; the user's own settings go first."""
        environment = {
            **DEFAULTS,
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
            # The terminal belongs to our progress display; the server still gets every line.
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
        }
        environment = {name: os.environ.get(name, value) for name, value in environment.items()}
        environment["PREFECT_API_URL"] = self.url
        if self.auth is not None:
            environment["PREFECT_API_AUTH_STRING"] = self.auth
            for name in ("NO_PROXY", "no_proxy"):  # a proxy cannot reach our loopback, and must not see the auth string
                environment[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
        return environment

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Return once the server answers with our auth string. Raises `ServerError` if it died or took too long."""
        if self.auth is None:
            self._check_answers()
            return
        request = urllib.request.Request(f"{self.url}/admin/version", headers=self.headers)
        deadline = time.monotonic() + timeout
        # No proxy of the environment stands between us and loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            try:
                with opener.open(request, timeout=max(0.1, deadline - time.monotonic())):
                    return
            except OSError as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if refused or not is_alive(self.home) or time.monotonic() > deadline:
                    if shutil.disk_usage(self.home).free < _ROOM:
                        raise DiskFullError(f"no space left for Prefect's database in {self.home}: free some space") from error
                    raise ServerError(
                        f"Prefect's server at {self.url} does not answer ({error}); "
                        f"see {self.home / 'prefect' / 'server.log'}, or set PREFECT_API_URL to a server of your own"
                    ) from error
            time.sleep(0.05)

    def _check_answers(self) -> None:
        """A server of the user's own: say at once when nobody is there. Whether it lets us in, Prefect's client finds out."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10):
                return
        except urllib.error.HTTPError:
            return
        except (OSError, ValueError) as error:
            raise ServerError(
                f"nobody answers at PREFECT_API_URL, {self.url} ({error}); start that server, correct the address, "
                "or unset it to use the private server"
            ) from error


# ------------------------------------------------------------------------------------------------------- clients --


@contextlib.contextmanager
def private_server(home: Path, port: int | None = None) -> Iterator[Server]:
    """The user's server if PREFECT_API_URL is set, else the home's own one, started if need be; does not wait for it.

    `port` is where a first server is wanted; one that runs, or ran before, stays where it is.
    """
    url = (os.environ.get("PREFECT_API_URL") or "").rstrip("/")
    if url and url != address(home):  # ours may stand there too, in a shell that `gptcore status --shell` told of it
        yield Server(url, home)
        return
    (home / "prefect").mkdir(mode=0o700, parents=True, exist_ok=True)
    with (home / "server.users").open("w") as users:
        # While an idle server is ending it holds this lock alone, so that nobody joins a server that is about to go.
        fcntl.flock(users, fcntl.LOCK_SH)
        url = ensure_server(home, port)
        try:
            yield Server(url, home, auth_of(home))
        finally:
            _send_what_is_pending()


@contextlib.contextmanager
def use_server(home: Path) -> Iterator[None]:
    """Keep the home's server, if it has one, for as long as the block lasts: for a run that somebody else started."""
    if not (home / "server.users").exists():
        yield
        return
    with (home / "server.users").open("w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        yield


def ensure_server(home: Path, port: int | None = None) -> str:
    """URL of the server that lives, or of one that was started now. Only for who holds `server.users`: see `private_server`."""
    with FileLock(home / "server.lock"):
        return _running(home) or _start(home, port)


def _running(home: Path) -> str | None:
    """URL of the server that lives, if any."""
    if not is_alive(home):
        return None
    try:
        return str(json.loads((home / "server.json").read_text())["url"])
    except (OSError, ValueError, KeyError):
        raise ServerError(
            f"{home / 'server.json'} cannot be read though a server runs; wait until no gptcore runs in {home}, then run again"
        ) from None


def listen(*ports: int | None) -> socket.socket:
    """A listening socket of loopback, on the first of `ports` that is free, else on any."""
    for port in ports:
        if port:
            with contextlib.suppress(OSError):
                return socket.create_server(("127.0.0.1", port), backlog=128)
    return socket.create_server(("127.0.0.1", 0), backlog=128)


def address(home: Path) -> str | None:
    """Where the last server of this home is or was."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        url: str = json.loads((home / "server.json").read_text())["url"]
        return url
    return None


def _start(home: Path, port: int | None) -> str:
    """Start a server on loopback, where the last one was, on `port`, or on a free one; return its URL at once."""
    # Whoever still looks for the one before, or has a bookmark, finds the next one at the same place.
    before = urlsplit(address(home) or "").port
    with listen(before, port) as listener, (home / "server.alive").open("w") as alive:
        # The lock goes with the open file to the child, and stays when our copy of it is closed.
        fcntl.flock(alive, fcntl.LOCK_EX)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        write_json(home / "server.json", {"pid": None, "started": None, "url": url})
        handles = (listener.fileno(), alive.fileno())
        with (home / "prefect" / "server.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows.operations.server", str(home), *map(str, handles)],
                env=_server_environment(home, url),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=handles,
                start_new_session=True,
            )
    with contextlib.suppress(psutil.Error):
        started = psutil.Process(process.pid).create_time()
        write_json(home / "server.json", {"pid": process.pid, "started": started, "url": url})
    # It outlives us on purpose when others use it; without this Python would warn of a child that was not waited for.
    process.returncode = 0
    return url


def _server_environment(home: Path, url: str) -> dict[str, str]:
    """The environment of the server: none of the user's Prefect settings, which belong to servers of his own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    code = str(Path(__file__).parents[2])
    return {
        **DEFAULTS,
        **environment,
        "PYTHONPATH": os.pathsep.join(filter(None, [code, environment.get("PYTHONPATH")])),
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect' / 'prefect.db'}",
        "PREFECT_SERVER_API_AUTH_STRING": auth_of(home),
        "PREFECT_API_AUTH_STRING": auth_of(home),
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": url.rsplit(":", 1)[1].removesuffix("/api"),
        # On another port than 4200 its pages would ask the wrong address.
        "PREFECT_UI_API_URL": url,
        "PREFECT_UI_URL": url.removesuffix("/api"),  # links in messages
        # In memory, the leases of concurrency limits would die with the server, and the runs that hold them with the leases.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # One transaction for many task states: one each is too slow to have all of them when the last client leaves.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    }


def auth_of(home: Path) -> str:
    """The random auth string of this home, in a file that only its owner reads."""
    path = home / "prefect" / "auth"
    if not path.exists():
        unnamed = path.with_name(f"auth.{os.getpid()}")
        unnamed.touch(mode=0o600)
        unnamed.write_text(f"gptcore:{secrets.token_urlsafe(32)}")
        with contextlib.suppress(FileExistsError):
            os.link(unnamed, path)  # the first one stays
        unnamed.unlink()
    return path.read_text()


def is_alive(home: Path) -> bool:
    """Whether a server process of this home lives."""
    with (home / "server.alive").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _send_what_is_pending() -> None:
    """Let Prefect's client send the states and logs it still holds: its own moment, the process's end, is too late."""
    if "prefect" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        for worker in (EventsWorker, APILogWorker):
            worker.drain_all(timeout=5)


# ------------------------------------------------------------------------------------------------ server process --


class _Process:
    """The server's process: Prefect's API and pages until nobody uses the home any more."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.server: uvicorn.Server | None = None
        threading.Thread(target=self._end_when_unused, daemon=True).start()

    def serve(self, listener: socket.socket) -> None:
        gc.disable()  # collecting while the modules come in costs half a second of the start
        import uvicorn
        from prefect.server.api.server import create_app

        app = create_app(final=True)
        gc.enable()
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1))
        self.server.run(sockets=[listener])

    def _end_when_unused(self) -> None:
        with (self.home / "server.users").open("w") as users:
            fcntl.flock(users, fcntl.LOCK_EX)
            if self.server is not None:
                while not self.server.started:  # never in the middle of a migration
                    time.sleep(0.05)
                _wait_until_taken()
                self.server.should_exit = True
                time.sleep(_STOP_SECONDS)
            os._exit(0)  # what a client left open must not keep us


def _wait_until_taken() -> None:
    """Wait until Prefect's services have taken the events that clients sent: what is still queued is lost when they stop."""
    from prefect.server.utilities.messaging.memory import Topic

    deadline = time.monotonic() + _DRAIN_SECONDS
    while time.monotonic() < deadline:
        queues = [subscription._queue for topic in Topic._topics.values() for subscription in topic._subscriptions]
        if not any(queue.qsize() for queue in queues):
            return
        time.sleep(0.05)


def main() -> None:
    """`python -m flows.operations.server HOME LISTENER ALIVE`: the last two are open files that the starter passes on."""
    process, listener = _Process(Path(sys.argv[1])), socket.socket(fileno=int(sys.argv[2]))
    alive: IO[str] = open(int(sys.argv[3]), "w")  # noqa: SIM115, PTH123  (its lock says that we live)
    with alive:
        process.serve(listener)


if __name__ == "__main__":
    main()
