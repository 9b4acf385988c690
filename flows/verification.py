"""`gptcore verify-resume`: the promise of exact resume, put to the test on a person's own machine and settings."""

import json
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from flows.operations.server import set_default_environment
from flows.terminal import Terminal
from gptcore.artifacts import MANIFEST, Store, home_folder, read_manifest, sha256_file
from gptcore.config import PipelineConfig
from gptcore.errors import ArtifactError, SettingsError, TrainingError
from gptcore.scratch import scratch_folder
from gptcore.training.job import Job, Run
from gptcore.training.journal import Follower
from gptcore.training.process import run_training


def verify_resume(config: PipelineConfig, kills: int, seed: int, terminal: Terminal) -> dict[str, Any]:
    """Train twice in a scratch folder, once straight and once with `kills` kills -9 at random steps; compare the weights."""
    set_default_environment()
    store = Store(home_folder())
    job = _job(store, config)
    with scratch_folder(store.home, "verify-resume") as scratch:
        straight = Run(scratch / "straight")
        terminal.say("[bold]training straight[/bold]")
        terminal.stage("straight")
        run_training(straight, job, lambda line: terminal.journal("straight", line))
        killed = Run(scratch / "killed")
        done = _with_kills(killed, straight, job, kills, random.Random(seed), terminal)
        digests = [sha256_file(run.model / "model.safetensors") for run in (straight, killed)]
    return {"straight": digests[0], "killed": digests[1], "equal": digests[0] == digests[1], "kills": done}


def _job(store: Store, config: PipelineConfig) -> Job:
    """The base's training on the newest shards of this pipeline."""
    shards = store.newest("shards", config.name)
    if shards is None:
        raise ArtifactError(f"there are no shards of {config.name} in {store.home} yet: gptcore run makes them")
    path = store.root / "shards" / config.name / shards["fingerprint"][:12]
    tokenizers = [
        folder.parent
        for folder in (store.root / "tokenizer" / config.name).glob("*/artifact.json")
        if read_manifest(folder.parent)["digest"] == shards["inputs"]["tokenizer"]
    ]
    if config.base.import_from is not None:
        raise SettingsError("base.import: an imported base is not trained, so there is no resume to verify: take it out")
    model, start = config.model, None
    if config.base.init_from is not None:
        from flows.session import plan_run  # loads prefect
        from flows.start import open_chain

        chain = open_chain(plan_run(), config)
        model, start = chain.config.model, chain.tokenizer.path
        tokenizers = [start] if (start / MANIFEST).exists() else []
    if not tokenizers:
        raise ArtifactError(f"the tokenizer of the shards {path} is gone: gptcore run makes it again")
    # A checkpoint as often as possible: the more there are, the more moments a kill can hit. A kill ends the run.
    training = config.training.model_copy(update={"checkpoint_seconds": 0.5, "evaluations": 20, "restarts": 0})
    return Job(
        model=model, training=training, shards=str(path), shards_digest=shards["digest"],
        tokenizer=str(tokenizers[0] / "tokenizer"), init_from=None if start is None else str(start),
    )  # fmt: skip


def _with_kills(run: Run, straight: Run, job: Job, kills: int, drawn: random.Random, terminal: Terminal) -> int:
    """Train to the end although the trainer is killed `kills` times, each time at a random moment."""
    run.folder.mkdir(parents=True)
    # The same answers: minutes or an automatic choice must not be decided a second time.
    shutil.copy(straight.resolved_file, run.resolved_file)
    steps = job.training.steps or 1
    moments = sorted(drawn.randrange(1, steps) for _ in range(kills))
    done = 0
    for moment in moments:
        terminal.say(f"[bold]killing[/bold] the trainer after step {moment}")
        terminal.stage("killed")
        killer = threading.Thread(target=_kill_after, args=(run, moment, drawn.random() * 0.2), daemon=True)
        killer.start()
        try:
            run_training(run, job, lambda line: terminal.journal("killed", line))
        except TrainingError:
            done += 1
        killer.join(timeout=5)
    if not (run.model / "model.safetensors").exists():
        terminal.stage("killed")
        run_training(run, job, lambda line: terminal.journal("killed", line))
    return done


def _kill_after(run: Run, step: int, pause: float) -> None:
    """Kill -9 the trainer a moment after it has done `step` steps."""
    follower, deadline = Follower(run.journal, since=time.time()), time.monotonic() + 600
    while time.monotonic() < deadline and not (run.model / "model.safetensors").exists():
        if any(line["step"] >= step for line in follower.lines()):
            time.sleep(pause)
            _kill_holder(run.holder)
            return
        time.sleep(0.01)


def _kill_holder(holder: Path) -> None:
    try:
        record = json.loads(holder.read_text(encoding="utf-8"))
        process = psutil.Process(record["pid"])
        if round(process.create_time(), 2) == record["started"]:
            process.kill()
    except (OSError, ValueError, psutil.Error):
        return
