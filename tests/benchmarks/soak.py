"""Scheduled runs in a row: does anything leak?   python tests/benchmarks/soak.py [RUNS]

A tiny pipeline under `gptcore up`, on a schedule of half a minute. A text is added before every run, so that each builds
every stage, trains, evaluates and registers. After each run: memory, open files and processes of every service, and what lies
in the home. The last lines compare the second run with the last one (the first one imports and migrates).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

GPTCORE = [sys.executable, "-c", "from flows.cli import main; main()"]
WORDS = "array value index column matrix vector sum mean float integer return given shape axis input output data frame".split()  # noqa: SIM905
SETTINGS = {
    "name": "soak-gpt", "split": {"valid": 0.1, "test": 0.1}, "tokenizer": {"vocabulary": 400},
    "model": {"layers": 2, "width": 64, "heads": 4, "context": 64},
    "training": {"steps": 30, "batch": 8, "evaluations": 2, "evaluation_tokens": 2000, "threads": 1},
    "evaluation": {"resamples": 100, "samples": 2},
}  # fmt: skip


def main(runs: int) -> None:
    """Soak, and print a line per run."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        root = Path(folder)
        os.environ["GPTCORE_HOME"] = str(root / "home")
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
        texts = root / "texts"
        texts.mkdir()
        for number in range(400):
            add(texts, number)
        config = root / "soak.yaml"
        config.write_text(yaml.safe_dump({**SETTINGS, "corpus": {"sources": [{"type": "files", "paths": [str(texts)]}]}}))
        up = json.loads(
            subprocess.run([*GPTCORE, "up", str(config), "--json"], check=True, capture_output=True, text=True).stdout
        )
        try:
            soak(up, texts, runs)
        finally:
            subprocess.run([*GPTCORE, "down"], check=True)
        left = [process.pid for process in psutil.process_iter() if str(root) in " ".join(cmdline(process))]
        print(f"processes left after down: {len(left)}")


def soak(up: dict, texts: Path, runs: int) -> None:
    """Wait for run after run of the schedule."""
    exports = subprocess.run([*GPTCORE, "status", "--shell"], check=True, capture_output=True, text=True).stdout
    for line in exports.splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        os.environ[name] = value.strip("'")
    from datetime import timedelta

    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
    from prefect.client.schemas.schedules import IntervalSchedule

    measured: list[dict[str, float]] = []
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("pipeline/soak-gpt")
        client.create_deployment_schedules(deployment.id, [(IntervalSchedule(interval=timedelta(seconds=30)), True)])
        only = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
        seen: set[str] = set()
        while len(seen) < runs:
            ended = [run for run in client.read_flow_runs(deployment_filter=only) if run.state and run.state.is_final()]
            for run in (run for run in ended if str(run.id) not in seen and run.state_name != "Cancelled"):
                seen.add(str(run.id))
                measured.append(measure(up))
                print(
                    f"{len(seen):3} {run.state_name:<10} {run.total_run_time.total_seconds():5.1f} s  {measured[-1]}",
                    flush=True,
                )
                add(texts, 400 + len(seen))
            time.sleep(1)
    print("second run", measured[1])
    print("last run  ", measured[-1])


def measure(up: dict) -> dict[str, float]:
    """Memory in MB, open files and processes of the supervisor and each service, and what lies in the home."""
    state = json.loads(subprocess.run([*GPTCORE, "status", "--json"], check=True, capture_output=True, text=True).stdout)
    numbers: dict[str, float] = {}
    for name, pid in {"supervisor": up["pid"], **{name: row["pid"] for name, row in state["services"].items()}}.items():
        tree = [psutil.Process(pid), *(psutil.Process(pid).children(recursive=True) if name != "supervisor" else [])]
        name = name.removesuffix("-gptcore-cpu")
        numbers[f"{name}_mb"] = round(sum(process.memory_info().rss for process in tree) / 1e6, 1)
        numbers[f"{name}_files"] = sum(process.num_fds() for process in tree)
        numbers[f"{name}_processes"] = len(tree)
        numbers[f"{name}_threads"] = sum(process.num_threads() for process in tree)
    home = Path(os.environ["GPTCORE_HOME"])
    numbers["restarts"] = sum(row["restarts"] for row in state["services"].values())
    numbers["zombies"] = sum(
        child.status() == psutil.STATUS_ZOMBIE for child in psutil.Process(up["pid"]).children(recursive=True)
    )
    numbers["run_records"] = len(list((home / "runs").glob("*")))
    numbers["partial"] = len(list((home / "store").glob("*/*/*.partial")))
    locks = [line for line in Path("/proc/locks").read_text().splitlines() if "FLOCK" in line]
    numbers["flocks"] = sum(line.split()[4] in {str(pid) for pid in psutil.pids()} for line in locks)
    return numbers


def add(texts: Path, number: int) -> None:
    """A text that no other one overlaps with."""
    import random

    drawn = random.Random(number)
    lines = [f"The {' '.join(drawn.choices(WORDS, k=9))} number {drawn.randint(0, 9999)}." for _ in range(6)]
    (texts / f"text-{number:04d}.txt").write_text("\n".join(lines) + "\n")


def cmdline(process: psutil.Process) -> list[str]:
    """Empty for a process that is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
