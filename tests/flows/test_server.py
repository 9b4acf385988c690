import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from flows.operations.runs import mark_dead_flow_runs
from flows.operations.server import Server, ServerError, private_server
from gptcore.artifacts import open_home
from tasks.active import ActiveRun, active_runs

# A run of a pipeline, as far as the server sees it: it lives until it is killed.
CLIENT = """
import os, sys, time
from pathlib import Path
from flows.operations.server import private_server
from tasks.active import ActiveRun

home = Path(sys.argv[1])
with private_server(home) as server, ActiveRun(home, "quick") as run:
    print(server.url, flush=True)
    if sys.argv[2:]:
        os.environ.update(server.client_environment())
        import prefect

        server.wait_ready()

        @prefect.task
        def wait():
            print(prefect.runtime.flow_run.id, flush=True)
            time.sleep(99)

        @prefect.flow
        def pipeline():
            run.note(prefect_flow_run_id=str(prefect.runtime.flow_run.id))
            wait()

        pipeline()
    time.sleep(99)
"""


@pytest.fixture
def start_client():
    """Start a client of a home; it is killed at the latest when the test ends."""
    clients = []

    def start(home: Path, *what: str) -> subprocess.Popen:
        command = [sys.executable, "-c", CLIENT, str(home), *what]
        clients.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return clients[-1]

    yield start
    for client in clients:
        client.kill()
        client.wait()


def server_process(home: Path) -> psutil.Process:
    return psutil.Process(json.loads((home / "server.json").read_text())["pid"])


def kill(process: subprocess.Popen | psutil.Process) -> None:
    process.kill()
    wait_until_gone(psutil.Process(process.pid))


def wait_until_gone(process: psutil.Process, seconds: float = 5) -> None:
    """A dead child that its parent has not asked for counts as gone."""
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.02)


def ask(url: str, server: Server | None = None):
    request = urllib.request.Request(url, headers=server.headers if server else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return open_home(tmp_path_factory.mktemp("server") / "home")


@pytest.fixture(scope="module")
def server(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.delenv("PREFECT_API_AUTH_STRING", raising=False)
        with private_server(home) as server:
            server.wait_ready()
            yield server


def test_only_who_knows_the_auth_string_is_answered(home, server):
    assert server.url.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(f"{server.url}/admin/version")
    assert refused.value.code == 401
    assert ask(f"{server.url}/admin/version", server)
    assert ask(f"{server.ui}/ui-settings")["api_url"] == server.url
    assert (home / "prefect" / "auth").stat().st_mode & 0o777 == 0o600
    assert ask(f"{server.url}/admin/settings", server)["server"]["analytics_enabled"] is False
    assert (home / "prefect" / "prefect.db").exists()


def test_a_run_that_was_killed_is_crashed_and_the_server_stays_for_others(home, server, start_client, monkeypatch):
    client = start_client(home, "run a flow")
    assert client.stdout.readline().strip() == server.url
    flow_run = client.stdout.readline().strip()
    assert [run.prefect_flow_run_id for run in active_runs(home)] == [flow_run]

    for name, value in server.client_environment().items():
        monkeypatch.setenv(name, value)
    import prefect.settings

    with prefect.settings.temporary_settings(
        {prefect.settings.PREFECT_API_URL: server.url, prefect.settings.PREFECT_API_AUTH_STRING: server.auth}
    ):
        assert mark_dead_flow_runs(home) == 0, "it lives"
        kill(client)
        assert mark_dead_flow_runs(home) == 1
        assert mark_dead_flow_runs(home) == 0
    assert ask(f"{server.url}/flow_runs/{flow_run}", server)["state"]["type"] == "CRASHED"
    assert not list((home / "runs").iterdir())
    with ActiveRun(home) as run:
        run.note(prefect_flow_run_id="unknown")
        assert len(active_runs(home)) == 1
    assert active_runs(home) == []
    assert server_process(home).is_running()


def test_a_dead_server_is_noticed_and_replaced_and_none_is_left_when_all_are_killed(tmp_path, start_client, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    home = open_home(tmp_path / "home")
    clients = [start_client(home) for _ in range(2)]
    first, second = (client.stdout.readline().strip() for client in clients)
    assert first == second, "two at once start one server"
    with private_server(home) as server:
        assert server.url == first
        kill(server_process(home))
        with pytest.raises(ServerError, match=r"does not answer.*server\.log"):
            server.wait_ready()
    clients.append(start_client(home))
    assert clients[2].stdout.readline().strip() == first, "whoever still looks for it there finds the next one"
    process = server_process(home)
    for client in clients:
        kill(client)
    wait_until_gone(process)


def test_a_server_of_the_users_own_is_taken_as_it_is(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}/api"
    monkeypatch.setenv("PREFECT_API_URL", f"{address}/")
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    with private_server(tmp_path) as server:
        assert server.url == address
        with pytest.raises(ServerError, match="nobody answers at PREFECT_API_URL"):
            server.wait_ready()
    assert list(tmp_path.iterdir()) == []
    environment = server.client_environment()
    assert environment["DO_NOT_TRACK"] == "0"
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert "PREFECT_API_AUTH_STRING" not in environment


def test_nothing_is_imported_before_it_must_be():
    code = "import flows.operations.server, sys; assert not {'prefect', 'uvicorn', 'mlflow', 'torch'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
