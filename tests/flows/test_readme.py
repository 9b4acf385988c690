"""Every command in the README does what it says."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from gptcore.config import load_config, parse_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def test_make_knows_what_the_readme_opens_with():
    for target in (command[1] for command in COMMANDS if command[0] == "make"):
        assert subprocess.run(["make", "-n", target], cwd=ROOT, check=False, capture_output=True).returncode == 0


def _case(command):
    """Whatever runs something or loads a model is slow: `make test` leaves it out, `make slow` runs it."""
    slow = command[1] not in ("plan", "models", "history", "lineage")
    return pytest.param(command, id=" ".join(command[1:3]), marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("command", [_case(command) for n, command in enumerate(COMMANDS)
                                     if command[0] == "gptcore" and command not in COMMANDS[:n]])  # fmt: skip
def test_a_command_of_the_readme_runs(own_finished, command):
    """On the tiny home: its names in place of the quickstart's, its settings in place of my.yaml and of the default."""
    home = own_finished.home
    arguments = [part.replace("docs-gpt", "tiny-gpt").replace("my.yaml", str(home.config)) for part in command[1:]]
    if "my-texts" in arguments:
        arguments[arguments.index("my-texts")] = str(home.folder / "rows.jsonl")
        arguments += ["--set", "tokenizer.vocabulary=400", "--set", "model.width=48", "--set", "split.valid=0.1"]
        arguments += ["--set", "training.steps=3"]
    elif arguments[0] in ("run", "plan", "verify-resume") and str(home.config) not in arguments:
        arguments.insert(1, str(home.config))
    result = home.gptcore(*arguments, stdin="About rain\n")
    assert result.stdout.strip() or "stages were reused" in result.stderr or "stage(s) built" in result.stderr


def test_the_settings_that_it_shows_are_valid():
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert [parse_config(yaml.safe_load(block)).name for block in blocks] == ["tales"]


def test_the_quickstart_is_valid_and_within_its_budget():
    config = load_config(ROOT / "deployments" / "configs" / "quickstart.yaml")
    assert config.training.minutes <= 3.5, "the whole run takes at most six"
    assert [task.type for task in config.tasks] == ["summarize", "classify"]


def test_every_picture_and_file_that_the_readme_names_is_there():
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name
