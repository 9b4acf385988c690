"""Every stage is a flow of its own; what it builds is reused by the whole chain, and the other way round."""

import json
import subprocess
import sys

import pytest

CALL = """
import json, os, sys
from pathlib import Path
from flows.operations.server import private_server
from gptcore.config import load_config
config = load_config(Path(sys.argv[1]))
with private_server(Path(os.environ["GPTCORE_HOME"])) as server:
    os.environ.update(server.client_environment())
    import importlib
    server.wait_ready()
    told = {}
    for name in sys.argv[2:]:
        flow = getattr(importlib.import_module(f"flows.{name}"), name)
        result = flow("tiny-gpt/1") if name == "promote" else flow(config)
        found = result if isinstance(result, dict) else {"": result}
        told[name] = result if name == "promote" else {what: [a.stage, a.reused] for what, a in found.items()}
    print(json.dumps(told))
"""


def call(home, *flows: str) -> dict:
    result = subprocess.run(
        [sys.executable, "-c", CALL, str(home.config), *flows],
        env=home.environment, cwd=home.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_stage_flow_builds_what_it_needs_and_the_chain_reuses_it(new_home, tmp_path):
    home = new_home(tmp_path / "alone", tasks=[])
    assert call(home, "ingest", "tokenizer") == {"ingest": {"": ["corpus", False]}, "tokenizer": {"": ["shards", False]}}
    plan = json.loads(home.gptcore("plan", home.config, "--json").stdout)
    assert {stage: entry["action"] for stage, entry in plan.items()} == {
        "corpus": "reuse", "tokenizer": "reuse", "shards": "reuse", "base": "build", "evaluation-base": "build",
    }  # fmt: skip


@pytest.mark.slow
def test_after_a_run_every_stage_flow_reuses_everything(finished):
    told = call(finished.home, "ingest", "tokenizer", "pretrain", "finetune", "evaluate", "promote")
    assert told.pop("promote")["verdict"] == "champion already"
    assert told == {
        "ingest": {"": ["corpus", True]},
        "tokenizer": {"": ["shards", True]},
        "pretrain": {"": ["base", True]},
        "finetune": {
            "base": ["base", True],
            "summarize": ["finetune-summarize", True],
            "classify": ["finetune-classify", True],
        },
        "evaluate": {
            "base": ["evaluation-base", True],
            "summarize": ["evaluation-summarize", True],
            "classify": ["evaluation-classify", True],
        },
    }
