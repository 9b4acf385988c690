"""One finished pipeline run, made once through the command line, on which many facts can be checked."""

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from flows.operations.relocation import relocate

TOPICS = {
    "weather": ["rain", "cloud", "wind", "storm", "sun", "snow", "frost", "fog", "thunder", "heat", "sky", "breeze"],
    "music": ["chord", "melody", "rhythm", "song", "choir", "violin", "drum", "tune", "verse", "harmony", "tempo", "piano"],
    "cooking": ["salt", "pan", "oven", "butter", "soup", "onion", "flour", "pepper", "sauce", "knife", "boil", "bake"],
}
FILLERS = "the a of and with over under near very often slowly brightly old new small great every some".split()  # noqa: SIM905


def write_rows(path: Path, count: int = 900) -> Path:
    """Rows of made-up prose with a topic and a summary that really follow from the text."""
    drawn = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            topic = drawn.choice(sorted(TOPICS))
            words = [drawn.choice(TOPICS[topic] if drawn.random() < 0.5 else FILLERS) for _ in range(40)]
            text = f"About {words[0]} {number}. " + " ".join(words) + "."
            row = {"text": text, "topic": topic, "summary": f"On {topic} and {words[0]}", "place": f"group-{number}"}
            file.write(json.dumps(row) + "\n")
    return path


def settings(rows: Path, **changes) -> dict:
    source = {"type": "files", "paths": [str(rows)], "group": "place"}
    training = {"steps": 20, "batch": 8, "evaluations": 2, "evaluation_tokens": 2000, "threads": 1}
    return {
        "name": "tiny-gpt",
        "corpus": {"sources": [source], "min_characters": 20, "workers": 1},
        "split": {"valid": 0.1, "test": 0.1},
        "tokenizer": {"vocabulary": 400},
        "model": {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "context": 64},
        "training": {**training, "steps": 240, "evaluations": 8},
        "tasks": [
            {"type": "summarize", "source": {**source, "target": "summary"}, "max_new_tokens": 12, "max_test_rows": 30,
             "training": training},
            {"type": "classify", "source": {**source, "target": "topic"}, "max_test_rows": 60,
             "training": {**training, "steps": 60}},
        ],
        "evaluation": {"resamples": 200, "samples": 2},
        **changes,
    }  # fmt: skip


@dataclass(frozen=True)
class Home:
    """A working folder with settings and a home."""

    folder: Path
    config: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "GPTCORE_HOME": str(self.home)}

    def gptcore(self, *arguments, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in a process of its own, as a person would."""
        result = subprocess.run(
            [sys.executable, "-c", "from flows.cli import main; main()", *map(str, arguments)],
            env=self.environment, cwd=self.folder, input=stdin, capture_output=True, text=True, check=False, timeout=280,
        )  # fmt: skip
        assert not check or result.returncode == 0, result.stderr[-4000:]
        return result

    def run(self, *arguments) -> dict:
        return json.loads(self.gptcore("run", self.config, "--json", *arguments).stdout)


def make_home(folder: Path, **changes) -> Home:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings(write_rows(folder / "rows.jsonl"), **changes)))
    return Home(folder, config)


@dataclass(frozen=True)
class Finished:
    """A home after its first run, and the object that the run printed."""

    home: Home
    result: dict


@pytest.fixture(scope="session")
def databases(tmp_path_factory) -> Path:
    """A home whose databases are made and in which nothing ran yet: making them takes longer than a tiny run."""
    home = tmp_path_factory.mktemp("databases") / "home"
    code = (
        "import os\nfrom flows.operations.server import private_server\nfrom gptcore.artifacts import home_folder, open_home\n"
        "from tasks.tracking import Connection\nhome = open_home(home_folder())\n"
        "with private_server(home) as server:\n    Connection(home).client\n    server.wait_ready()\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "GPTCORE_HOME": str(home)}, check=True)
    return home


@pytest.fixture(scope="session")
def new_home(databases):
    """A function that makes a working folder with the tiny settings: (folder, **changed sections) -> Home."""

    def make(folder: Path, **changes) -> Home:
        home = make_home(folder, **changes)
        shutil.copytree(databases, home.home, ignore=shutil.ignore_patterns("server.*", "locks"))
        return home

    return make


@pytest.fixture(scope="session")
def first_run(new_home, tmp_path_factory) -> Finished:
    """The one run of a home, made by whichever of the processes of pytest-xdist asks first. Nobody else's to use or change."""
    temporary = tmp_path_factory.getbasetemp()
    folder = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "first-run"
    folder.mkdir(exist_ok=True)
    printed = folder / "printed.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            shutil.rmtree(folder / "work", ignore_errors=True)  # of one that failed
            home = new_home(folder / "work")
            printed.write_text(json.dumps(home.run()))
    return Finished(Home(folder / "work", folder / "work" / "tiny.yaml"), json.loads(printed.read_text()))


def copied(run: Finished, folder: Path) -> Finished:
    """The same run in a home of its own at `folder`, so that a test may promote, break or move what it likes."""
    shutil.copytree(run.home.folder, folder, dirs_exist_ok=True)
    home = Home(folder, folder / run.home.config.name)
    relocate(home.home, run.home.home, home.home)
    return Finished(home, run.result)


@pytest.fixture(scope="session")
def finished(first_run, tmp_path_factory) -> Finished:
    """A home after its first run. What a test does to it must leave it as good as it was."""
    return copied(first_run, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def own_finished(first_run, tmp_path_factory) -> Finished:
    """The same, for the tests of one file, which may promote and run in it."""
    return copied(first_run, tmp_path_factory.mktemp("own-finished"))
