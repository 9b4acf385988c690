"""`gptcore up` and what runs under it: real servers and a real worker, started once for the whole file."""

import http.server
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psutil
import pytest

from flows.operations.services import is_up, read_state
from flows.operations.supervisor import Service, Start
from gptcore.training.journal import read_journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


class Told(http.server.BaseHTTPRequestHandler):
    """A webhook that remembers what it was told."""

    messages: list[dict] = []  # noqa: RUF012  (one for the file)

    def do_POST(self):
        self.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def wait_until(condition, seconds: float = 120.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.2)
    return found


@dataclass
class Up:
    """A home whose services are up, and ways to ask them."""

    home: object
    answer: dict

    def gptcore(self, *arguments, check: bool = True):
        return self.home.gptcore(*arguments, check=check)

    def json(self, *arguments) -> dict:
        return json.loads(self.gptcore(*arguments, "--json").stdout)

    def ask(self, path: str, body: dict | list | None = None, method: str | None = None):
        """Prefect's API as it is for everybody."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.answer['prefect']}/api{path}", data, {"Content-Type": "application/json"}, method=method
        )
        self._sign(request)
        for patience in (True, True, True, False):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    text = answer.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                if not patience or error.code != 503:  # a server that has only just begun; Prefect's own client waits, too
                    raise
                time.sleep(2)
        return None

    def _sign(self, request) -> None:
        import base64

        secret = (self.home.home / "prefect" / "auth").read_bytes()
        request.add_header("Authorization", "Basic " + base64.b64encode(secret).decode())

    def deployment(self, flow: str, name: str = "tiny-gpt") -> dict:
        return self.ask(f"/deployments/name/{flow}/{name}")

    def start(self, flow: str, name: str = "tiny-gpt", **overrides) -> str:
        """What `prefect deployment run` does; the id of the flow run. `overrides` change sections of the settings."""
        deployment = self.deployment(flow, name)
        config = {**deployment["parameters"]["config"], **overrides}
        made = self.ask(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": {"config": config}})
        return made["id"]

    def state(self, run: str) -> str:
        return self.ask(f"/flow_runs/{run}")["state"]["name"]

    def wait_for(self, run: str, *states: str, seconds: float = 200.0) -> str:
        return wait_until(lambda: (now := self.state(run)) in states and now, seconds)

    def mlflow(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(f"sqlite:///{self.home.home}/mlflow.db")

    def mlflow_run(self, flow_run: str):
        """The pipeline's MLflow run that names a flow run."""
        client = self.mlflow()
        everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(everywhere, f"tags.`gptcore.prefect_flow_run_id` = '{flow_run}'")
        return next(run for run in found if "gptcore.stage" not in run.data.tags)

    def journal(self, name: str) -> list[dict]:
        file = next(iter((self.home.home / "store" / "base" / name).glob("*.run/journal.jsonl")), None)
        return read_journal(file) if file else []

    def training_of(self, name: str, step: int):
        return wait_until(lambda: any(line["step"] >= step and line["kind"] == "metric" for line in self.journal(name)), 200)


@pytest.fixture(scope="module")
def webhook():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Told)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/told"
    server.shutdown()


@pytest.fixture(scope="module")
def up(new_home, tmp_path_factory, webhook):
    home = new_home(tmp_path_factory.mktemp("up"), tasks=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTCORE_NOTIFY", webhook)
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        answer = json.loads(home.gptcore("up", home.config, "--prefect-port", 0, "--mlflow-port", 0, "--json").stdout)
        supervisor = psutil.Process(answer["pid"])
        yield Up(home, answer)
        with_children = [supervisor, *supervisor.children(recursive=True)]
        home.gptcore("down", check=False)
        left = [process for process in with_children if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        for process in left:
            process.kill()
        assert not left, "down left something behind"
        assert not is_up(home.home)


def status_of(address: str) -> int:
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_everything_listens_on_loopback_and_asks_for_the_password(up):
    assert up.answer["deployed"]["tiny-gpt"]["cron"] == "0 3 * * *"
    for address in (f"{up.answer['prefect']}/api/admin/version", f"{up.answer['mlflow']}/api/2.0/mlflow/experiments/search"):
        assert address.startswith("http://127.0.0.1:")
        assert status_of(address) == 401
    supervisor = psutil.Process(up.answer["pid"])
    listening = [
        connection.laddr.ip
        for process in supervisor.children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {"127.0.0.1"}
    folder = up.home.home / "services"
    for secret in (folder / "mlflow-auth.ini", folder / "mlflow-key", up.home.home / "prefect" / "auth"):
        assert secret.stat().st_mode & 0o777 == 0o600, secret


def test_up_again_deploys_and_starts_nothing_twice(up):
    again = up.json("up", up.home.config)
    assert (again["pid"], again["prefect"], again["mlflow"]) == (up.answer["pid"], up.answer["prefect"], up.answer["mlflow"])
    flows = {"pipeline", "ingest", "tokenizer", "pretrain", "finetune", "evaluate", "promote"}
    for flow in flows:
        deployment = up.deployment(flow)
        assert deployment["entrypoint"] == f"flows.{flow}.{flow}"
        assert deployment["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    assert [schedule["schedule"]["cron"] for schedule in up.deployment("pipeline")["schedules"]] == ["0 3 * * *"]
    pools = {pool["name"]: pool["concurrency_limit"] for pool in up.ask("/work_pools/filter", {})}
    assert pools["gptcore-gpu"] == 1


def test_a_stage_deployed_alone_is_reused_by_the_next_pipeline_and_both_uis_link_to_each_other(up):
    alone = up.start("ingest")
    assert up.wait_for(alone, "Completed", "Failed", "Crashed") == "Completed"
    whole = up.start("pipeline")
    assert up.wait_for(whole, "Completed", "Failed", "Crashed") == "Completed", up.gptcore("logs").stdout
    tasks = up.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [whole]}}})
    states = {task["name"]: task["state"]["name"] for task in tasks}
    assert states["corpus"] == "Reused"
    assert states["base"] == "Completed"
    run = up.mlflow_run(whole)
    assert run.info.status == "FINISHED"
    assert run.data.tags["gptcore.prefect_flow_run_url"].endswith(whole)
    artifacts = up.ask("/artifacts/filter", {"flow_runs": {"id": {"any_": [whole]}}})
    shown = {artifact["key"]: artifact for artifact in artifacts}
    assert f"{up.answer['mlflow']}/#/runs/{run.info.run_id}" in shown["mlflow-of-tiny-gpt"]["data"]
    assert shown["base-of-tiny-gpt"]["type"] == "progress"
    assert "results-of-tiny-gpt" in shown
    told = up.gptcore("logs", whole).stdout
    assert "corpus: reused" in told
    assert "base: built in" in told
    hand = up.home.run()
    assert all(artifact["reused"] for artifact in hand["artifacts"].values()), "gptcore run beside it reuses the same"
    assert up.state(hand["prefect_flow_run_id"]) == "Completed"


def test_a_better_version_is_shown_beside_the_champion(up):
    training = {**up.deployment("pipeline")["parameters"]["config"]["training"], "steps": 120}
    run = up.start("pipeline", training=training)
    assert up.wait_for(run, "Completed", "Failed", "Crashed") == "Completed"
    artifacts = up.ask("/artifacts/filter", {"flow_runs": {"id": {"any_": [run]}}})
    (rows,) = [json.loads(shown["data"]) for shown in artifacts if shown["key"] == "comparison-of-tiny-gpt"]
    assert [row["model"] for row in rows] == ["tiny-gpt/2", "tiny-gpt/1 @champion"]


def test_a_schedule_fires_and_a_run_that_overlaps_is_cancelled(up):
    deployment = up.deployment("ingest")
    schedule = [{"active": True, "schedule": {"interval": 10.0}, "slug": "soon"}]
    up.ask(f"/deployments/{deployment['id']}/schedules", schedule)
    only = {"deployments": {"id": {"any_": [deployment["id"]]}}, "flow_runs": {"state": {"name": {"any_": ["Completed"]}}}}
    fired = wait_until(lambda: [run for run in up.ask("/flow_runs/filter", only) if run["auto_scheduled"]], 200)
    assert fired[0]["state"]["name"] == "Completed"
    for made in up.deployment("ingest")["schedules"]:
        up.ask(f"/deployments/{deployment['id']}/schedules/{made['id']}", method="DELETE")


def test_cancel_saves_and_a_later_run_goes_on_in_the_same_mlflow_run(up):
    config = up.home.folder / "long.yaml"
    config.write_text(
        up.home.config.read_text().replace("name: tiny-gpt", "name: long-gpt").replace("steps: 240", "steps: 3000")
    )
    assert list(up.json("up", config)["deployed"]) == ["long-gpt"]
    first = up.start("pipeline", "long-gpt")
    up.training_of("long-gpt", 24)
    second = up.start("pipeline", "long-gpt")
    assert up.wait_for(second, "Cancelled") == "Cancelled", "two runs of one deployment do not overlap"
    told = up.json("cancel", first[-8:])
    assert (told["run"], told["state"], told["saved"]) == (first, "Cancelled", True)
    assert up.journal("long-gpt")[-1]["event"] == "stopped"
    assert up.wait_for(first, "Cancelled", seconds=10) == "Cancelled"
    assert up.mlflow_run(first).info.status == "KILLED"
    assert "has ended already" in up.gptcore("cancel", first, check=False).stderr

    third = up.start("pipeline", "long-gpt")
    wait_until(lambda: any(line.get("event") == "resumed" for line in up.journal("long-gpt")), 200)
    up.training_of("long-gpt", up.journal("long-gpt")[-1]["step"] + 12)
    # Killed this time, with its worker: both UIs hear of it from the supervisor.
    record = wait_until(lambda: [run for run in up.json("status")["running"] if run["run"] == third])[0]
    for process in (psutil.Process(record["pid"]), psutil.Process(worker_of(up)["pid"])):
        process.kill()
    assert up.wait_for(third, "Crashed") == "Crashed"
    wait_until(lambda: up.mlflow_run(third).info.status == "KILLED", 60)
    assert wait_until(lambda: worker_of(up)["restarts"] >= 1)
    client = up.mlflow()
    experiment = client.get_experiment_by_name("long-gpt")
    bases = client.search_runs([experiment.experiment_id], "tags.`gptcore.stage` = 'base'")
    assert len(bases) == 1, "every run went on in the same MLflow run"
    steps = [metric.step for metric in client.get_metric_history(bases[0].info.run_id, "train/loss")]
    assert len(set(steps)) == len(steps)
    wait_until(lambda: not [p for p in psutil.process_iter() if "gptcore.training" in " ".join(_cmdline(p))
                            and str(up.home.home) in " ".join(_cmdline(p))], 60)  # fmt: skip


def _cmdline(process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def service(up, name: str) -> dict:
    return read_state(up.home.home).services.get(name, {"restarts": -1, "pid": None})


def worker_of(up) -> dict:
    return service(up, "worker-gptcore-cpu")


def test_new_text_starts_a_round_of_continual_training(up):
    """Two rows are too few for a round, so it says that they wait."""
    assert up.json("up", up.home.config, "--watch")["deployed"]["tiny-gpt"]["watch"]
    wait_until(lambda: (up.home.home / "watch" / "tiny-gpt.json").exists())  # the first look only remembers
    rows = up.home.folder / "rows.jsonl"
    before = rows.read_text()
    added = [{"text": f"Something {n}, " + "never heard of before " * 5, "topic": "-", "summary": "-", "place": f"new-{n}"}
             for n in range(2)]  # fmt: skip
    rows.write_text(before + "".join(json.dumps(row) + "\n" for row in added))
    deployment = up.deployment("continual")
    runs = wait_until(lambda: up.ask("/flow_runs/filter", {"deployments": {"id": {"any_": [deployment["id"]]}}}), 200)
    assert up.wait_for(runs[0]["id"], "Waiting", "Completed", "Failed", "Crashed", "Kept", "Promoted") == "Waiting"
    rows.write_text(before)
    assert not up.json("up", up.home.config, "--no-watch")["deployed"]["tiny-gpt"]["watch"]
    wait_until(lambda: service(up, "watch-tiny-gpt")["pid"] is None)


def test_a_failure_is_told(up):
    Told.messages.clear()
    sources = [{"type": "files", "paths": [str(up.home.folder / "nowhere.txt")]}]
    run = up.start("ingest", corpus={"sources": sources})
    assert up.wait_for(run, "Failed", "Crashed", "Completed") == "Failed"
    wait_until(lambda: [told for told in Told.messages if run in told["body"]], 60)
    assert "nowhere.txt" in Told.messages[-1]["body"]


def test_servers_that_are_killed_come_back_at_the_same_address(up):
    for name in ("mlflow", "prefect"):
        before = read_state(up.home.home).services[name]
        pid = before["pid"]
        process = psutil.Process(pid)
        for one in (*process.children(recursive=True), process):
            one.kill()
        wait_until(lambda name=name, before=before: service(up, name)["restarts"] == before["restarts"] + 1)
        address = f"{up.answer[name]}/health" if name == "mlflow" else f"{up.answer[name]}/api/health"
        wait_until(lambda address=address: _answers(address))
    run = up.start("ingest")
    assert up.wait_for(run, "Completed", "Failed", "Crashed", "Cancelled") == "Completed", "the worker found the new server"


def _answers(address: str) -> bool:
    try:
        return status_of(address) == 200
    except OSError:
        return False


def test_of_runs_that_were_missed_the_newest_catches_up(up):
    """Three nights without a machine: three late runs, of which one is wanted."""
    environment = {**up.home.environment, "PREFECT_API_URL": f"{up.answer['prefect']}/api",
                   "PREFECT_API_AUTH_STRING": (up.home.home / "prefect" / "auth").read_text()}  # fmt: skip
    code = (
        "import sys\nfrom datetime import UTC, datetime, timedelta\nfrom prefect.client.orchestration import get_client\n"
        "from flows.operations.deployment import skip_missed\n"
        "with get_client(sync_client=True) as client:\n"
        "    print(len(skip_missed(client)))\n"
    )
    leash = psutil.Process(worker_of(up)["pid"])
    for process in leash.children(recursive=True):
        process.suspend()
    ids = [up.start("tokenizer") for _ in range(3)]
    with closing(sqlite3.connect(up.home.home / "prefect" / "prefect.db", timeout=60)) as connection:
        marks = ",".join("?" * len(ids))
        connection.execute(f"update flow_run set auto_scheduled = 1 where id in ({marks})", ids)
        connection.commit()
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=up.home.folder, capture_output=True, text=True, check=False
    )
    for process in leash.children(recursive=True):
        process.resume()
    assert printed.stdout.strip() == "2", printed.stderr[-2000:]
    assert sorted(up.state(run) == "Missed" for run in ids) == [False, True, True]


def test_a_service_that_keeps_ending_is_started_ever_more_slowly(tmp_path):
    (tmp_path / "services").mkdir()
    service = Service(tmp_path, "short", lambda: Start([sys.executable, "-c", ""], dict(os.environ)))
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        service.tend()
        time.sleep(0.05)
    service.end()
    service.wait(10)
    assert 1 <= service.restarts <= 3


def test_a_leash_leaves_nothing_behind(tmp_path):
    """Not when it is asked, nor when whoever holds it is killed -9; not even a grandchild that lost its parent."""
    orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)', sys.argv[1]]); "
    orphan += "import time; time.sleep(99)"
    command = f"[sys.executable, '-m', 'flows.operations.leash', sys.executable, '-c', {orphan!r}, sys.argv[1]]"
    variables = "os.environ['GPTCORE_LEASH_PARENT'] = str(os.getpid()); os.environ['GPTCORE_LEASH_GRACE'] = '1'"
    holder = f"import subprocess, sys, os\n{variables}\nsubprocess.run({command})\n"
    mark = str(tmp_path)

    def marked():
        return [process for process in psutil.process_iter() if mark in _cmdline(process)]

    root = str(Path(__file__).parents[2])
    for kill in (lambda process: process.kill(), lambda process: psutil.Process(process.pid).children()[0].terminate()):
        process = subprocess.Popen([sys.executable, "-c", holder, mark], env={**os.environ, "PYTHONPATH": root})
        wait_until(lambda: len(marked()) == 4)
        kill(process)
        process.wait()
        wait_until(lambda: not marked(), 30)
