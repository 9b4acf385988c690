"""What a team leaves running: up, down, status, logs, cancel."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.common import Json, quickstart, tell
from gptcore.artifacts import home_folder, open_home
from gptcore.config import load_config
from gptcore.errors import GptcoreError

if TYPE_CHECKING:
    from flows.operations.services import Deployed

app = typer.Typer()

Configs = Annotated[
    list[Path] | None,
    typer.Argument(help="Settings (YAML) to deploy; default: those of before, at first the quickstart.", show_default=False),
]
Cron = Annotated[str | None, typer.Option(help="When the pipeline runs; at first every night at 03:00.", show_default=False)]
Watch = Annotated[
    bool | None,
    typer.Option("--watch/--no-watch", help="Run continual whenever the sources hold something new.", show_default=False),
]
SomeRun = Annotated[str | None, typer.Argument(metavar="[RUN]", help="As for cancel; default: the newest.", show_default=False)]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="The id of a run, its last eight letters, or a model's name: its newest run.")
]
PrefectPort = Annotated[int, typer.Option(help="Where Prefect's server goes the first time, if it is free.")]
MlflowPort = Annotated[int, typer.Option(help="Where MLflow's server goes the first time, if it is free.")]


@app.command()
def up(
    configs: Configs = None, cron: Cron = None, watch: Watch = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, for systemd or a container.")] = False,
    prefect_port: PrefectPort = 4200, mlflow_port: MlflowPort = 5000, as_json: Json = False,
) -> None:  # fmt: skip
    """Keep Prefect's server, MLflow's server and a worker running, with a schedule; what dies is started again."""
    from flows.operations.services import deployed, is_up, note_deployed, start_supervisor, status, wait_ready
    from flows.operations.supervisor import supervise

    home = open_home(home_folder())
    wanted = _wanted(deployed(home), configs, cron, watch)  # a mistake is told before anything starts
    note_deployed(home, wanted)
    if foreground:
        supervise(home, prefect_port, mlflow_port, lambda: _deploy(home, wanted))
        return
    process = None if is_up(home) else start_supervisor(home, prefect_port, mlflow_port)
    wait_ready(home, process)
    if process is not None:
        process.returncode = 0  # it stays when we end
    _deploy(home, wanted)
    answer = {**status(home), "deployed": {name: asdict(entry) for name, entry in wanted.items()}}
    tell(answer, as_json, lambda: _up(answer))


def _wanted(
    known: "Mapping[str, Deployed]", configs: list[Path] | None, cron: str | None, watch: bool | None
) -> "dict[str, Deployed]":
    """What is to be deployed: these files, else what was deployed before, else the quickstart. What is not said stays."""
    from flows.operations.deployment import NIGHTLY, check_cron
    from flows.operations.services import Deployed

    if cron is not None:
        check_cron(cron)
    entries: dict[str, Deployed] = {}
    if not configs and known:
        for entry in known.values():
            entries[load_config(entry.config).name] = entry
    for file in configs or ([] if known else [quickstart()]):
        name = load_config(file).name
        before = known.get(name) or Deployed("", "", NIGHTLY, False)
        entries[name] = replace(before, config=str(file.absolute()), folder=str(Path.cwd()))
    return {
        name: replace(entry, cron=cron or entry.cron, watch=entry.watch if watch is None else watch)
        for name, entry in entries.items()
    }


def _up(answer: dict[str, Any]) -> str:
    ours = [name for name in ("prefect", "mlflow") if answer[name]]
    lines = [f"{name:<9}{answer[name] or 'a server of your own'}" for name in ("prefect", "mlflow")]
    if ours:
        lines.append(f"the user and password of {' and '.join(ours)}: {answer['password']}")
    for name, entry in answer["deployed"].items():
        lines.append(f"deployed {name}: pipeline at {entry['cron']!r}, every stage by hand")
        lines += [f"watching the sources of {name}: new text starts continual"] if entry["watch"] else []
    lines.append("gptcore status shows them, gptcore down ends them")
    return "\n".join(lines)


def _deploy(home: Path, wanted: "Mapping[str, Deployed]") -> None:
    from flows.operations.deployment import deploy

    with prefect_at(home):
        for entry in wanted.values():
            print("deployed", deploy(Path(entry.config), Path(entry.folder), entry.cron), file=sys.stderr, flush=True)


@app.command()
def down(as_json: Json = False) -> None:
    """End what `gptcore up` started. Runs of the worker save; the next run continues from there."""
    from flows.operations.services import down as end
    from flows.operations.services import wait_for_prefect_to_end
    from tasks.active import active_runs

    home = open_home(home_folder())
    was_up = end(home)
    gone = wait_for_prefect_to_end(home, 20.0 if not active_runs(home) else 2.0)
    said = "everything is down" if was_up else "nothing was up"
    if not gone:
        said += "; Prefect's server stays until the runs that use it have ended"
    tell({"was_up": was_up, "prefect_stays": not gone}, as_json, lambda: said)


@app.command()
def status(
    shell: Annotated[bool, typer.Option("--shell", help='For eval "$(gptcore status --shell)": the prefect command.')] = False,
    as_json: Json = False,
) -> None:
    """Show the services, the runs at work, the last ones and the next scheduled ones."""
    from flows.operations.runs import recent
    from flows.operations.services import shell as variables
    from flows.operations.services import status as services
    from flows.tables import status_tables
    from tasks.active import active_runs

    home = open_home(home_folder())
    if shell:
        print(variables(home))
        return
    answer = services(home)
    running = {record.prefect_flow_run_id: record for record in active_runs(home)}
    answer["running"] = [
        {"run": run, "name": record.config, "pid": record.pid,
         "since": datetime.fromtimestamp(record.started).astimezone().isoformat(timespec="seconds")}
        for run, record in running.items()
    ]  # fmt: skip
    if answer["up"]:
        with prefect_at(home):
            answer |= recent()
    tell(answer, as_json, lambda: status_tables(answer))


@app.command()
def logs(
    run: SomeRun = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Print what a run logged: stages, training, trouble."""
    from flows.operations.runs import logs as read
    from flows.operations.runs import short

    lines: list[dict[str, str]] = []

    def show(when: datetime, level: str, text: str) -> None:
        if as_json:
            lines.append({"at": when.isoformat(), "level": level, "text": text})
        else:
            mark = "" if level == "info" else f"{level.upper()} "
            print(f"{when.astimezone():%H:%M:%S} {mark}{text}", flush=True)

    with prefect_at(open_home(home_folder())):
        found = read(home_folder(), run, follow, show)
    answer = {"run": str(found.id), "name": found.name, "state": found.state_name, "lines": lines}
    if as_json:
        tell(answer, True, str)
    else:
        print(f"{found.name} {short(found.id)}: {found.state_name}", file=sys.stderr)


@app.command()
def cancel(run: Run, as_json: Json = False) -> None:
    """End a run. Its trainer saves, and a later run continues from there."""
    from flows.operations.runs import cancel as end
    from flows.operations.runs import short

    home = open_home(home_folder())
    with prefect_at(home):
        told = end(home, run)
    kept = "; what was finished and the last checkpoint are kept" if told["saved"] else ""
    tell(told, as_json, lambda: f"{told['name']} {short(told['run'])} was {told['was']} and is {told['state']}{kept}")


@contextlib.contextmanager
def prefect_at(home: Path) -> Iterator[None]:
    """The server of the home, started if need be, for a command that asks or tells it something."""
    from flows.operations.server import private_server, set_default_environment

    set_default_environment()
    before = dict(os.environ)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    try:
        with private_server(home) as server:
            os.environ.update(server.client_environment())
            server.wait_ready()
            yield
    except GptcoreError:
        raise
    except Exception as error:
        if type(error).__module__.startswith(("httpx", "prefect")):
            raise GptcoreError(f"Prefect's server at {server.url} refused: {str(error).strip().splitlines()[0]}") from error
        raise
    finally:
        os.environ.clear()  # a supervisor in the foreground goes on with its own
        os.environ.update(before)
