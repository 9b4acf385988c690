"""What a team leaves running: up, down, status, logs, cancel."""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.common import Json, quickstart, tell
from gptcore.artifacts import home_folder, open_home
from gptcore.config import load_config
from gptcore.errors import GptcoreError

app = typer.Typer()

Configs = Annotated[
    list[Path] | None, typer.Argument(help="Settings (YAML) to deploy; default: the quickstart.", show_default=False)
]
Cron = Annotated[str | None, typer.Option(help="When the pipeline runs; default: every night at 03:00.", show_default=False)]
SomeRun = Annotated[str | None, typer.Argument(metavar="[RUN]", help="As for cancel; default: the newest.", show_default=False)]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="The id of a run, its last eight letters, or a model's name: its newest run.")
]
PrefectPort = Annotated[int, typer.Option(help="Where Prefect's server goes the first time, if it is free.")]
MlflowPort = Annotated[int, typer.Option(help="Where MLflow's server goes the first time, if it is free.")]


@app.command()
def up(
    configs: Configs = None, cron: Cron = None,
    watch: Annotated[bool, typer.Option("--watch", help="Run continual whenever the sources hold something new.")] = False,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, for systemd or a container.")] = False,
    prefect_port: PrefectPort = 4200, mlflow_port: MlflowPort = 5000, as_json: Json = False,
) -> None:  # fmt: skip
    """Keep Prefect's server, MLflow's server and a worker running, with a schedule; what dies is started again."""
    from flows.operations.services import is_up, set_watched, start_supervisor, status, wait_ready, watched
    from flows.operations.supervisor import supervise

    files = configs or [quickstart()]
    names = {load_config(file).name: file for file in files}  # a mistake is told before anything starts
    home = open_home(home_folder())
    set_watched(home, names, watch=watch)
    if foreground:
        supervise(home, prefect_port, mlflow_port, lambda: print("deployed", *_deploy(home, files, cron), flush=True))
        return
    process = None if is_up(home) else start_supervisor(home, prefect_port, mlflow_port)
    wait_ready(home, process)
    if process is not None:
        process.returncode = 0  # it stays when we end
    _deploy(home, files, cron)
    answer = {**status(home), "deployed": list(names), "watched": sorted(watched(home))}
    tell(answer, as_json, lambda: _up(answer))


def _up(answer: dict[str, Any]) -> str:
    lines = [f"Prefect  {answer['prefect']}" if answer["prefect"] else "Prefect  your own server"]
    lines.append(f"MLflow   {answer['mlflow']}" if answer["mlflow"] else "MLflow   your own server")
    lines.append(f"both ask for the user and password in {answer['password']}")
    lines += [f"deployed {name}: pipeline every night, and every stage by hand" for name in answer["deployed"]]
    lines += [f"watching the sources of {name}: new text starts continual" for name in answer["watched"]]
    lines.append("gptcore status shows them, gptcore down ends them")
    return "\n".join(lines)


def _deploy(home: Path, files: list[Path], cron: str | None) -> list[str]:
    from flows.operations.deployment import deploy

    with prefect_at(home):
        return [deploy(file, Path.cwd(), cron) for file in files]


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
    answer["running"] = [
        {"run": record.prefect_flow_run_id, "name": record.config, "pid": record.pid,
         "since": datetime.fromtimestamp(record.started).astimezone().isoformat(timespec="seconds")}
        for record in active_runs(home)
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
    tell(told, as_json, lambda: f"{told['name']} {short(told['run'])} was {told['was']} and is {told['state']}; "
         "what was finished and the last checkpoint are kept")  # fmt: skip


@contextlib.contextmanager
def prefect_at(home: Path) -> Iterator[None]:
    """The server of the home, started if need be, for a command that asks or tells it something."""
    from flows.operations.server import private_server, set_default_environment

    set_default_environment()
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    with private_server(home) as server:
        os.environ.update(server.client_environment())
        server.wait_ready()
        try:
            yield
        except GptcoreError:
            raise
        except Exception as error:
            if type(error).__module__.startswith(("httpx", "prefect")):
                raise GptcoreError(f"Prefect's server at {server.url} refused: {str(error).splitlines()[0]}") from error
            raise
