"""Trouble takes a training back and past what caused it; averages, early stopping and the gap to validation."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcore.artifacts import sha256_file, write_json
from gptcore.config import ModelConfig
from gptcore.errors import TrainingError
from gptcore.model import GPT
from gptcore.tokens.batches import StreamBatches
from gptcore.training import checkpoint
from gptcore.training.attempts import Recorder
from gptcore.training.average import Average
from gptcore.training.fit import overfits, progress
from gptcore.training.guard import Guard
from gptcore.training.job import Job, Run
from gptcore.training.journal import read_journal
from gptcore.training.loop import train
from gptcore.training.ranks import Rank
from gptcore.training.trainer import Trainer

STEPS = 40


def job_of(tiny, **training) -> Job:
    return Job(
        model=tiny.model(),
        training=tiny.training(**{"steps": STEPS, "evaluations": 4, "precision": "float32", **training}),
        shards=str(tiny.shards),
        shards_digest="shards",
        tokenizer=str(tiny.tokenizer / "tokenizer"),
    )


def learn(folder: Path, job: Job, stop=lambda: False) -> Run:
    """Train in this process."""
    run = Run(folder)
    run.folder.mkdir(exist_ok=True)
    run.write(job)
    train(run, Rank(), stop, Recorder(Path(os.devnull)))
    return run


def weights_of(run: Run) -> str:
    return sha256_file(run.model / "model.safetensors")


def told(run: Run, event: str) -> list[dict]:
    return [line for line in read_journal(run.journal) if line.get("event") == event]


def stop_after(steps: int):
    """A `stop_asked` that says yes once so many steps were asked about."""
    asked = iter(range(10_000))
    return lambda: next(asked) + 1 >= steps


@pytest.fixture
def poison(monkeypatch):
    """A function that makes the loss of some batches, by number, not a number."""

    def poisoned(is_bad):
        now = [0]
        at, loss = StreamBatches.at, Trainer.plain_loss.fget

        def noted(self, step):
            now[0] = step
            return at(self, step)

        def worse(self):
            plain = loss(self)
            return lambda *arguments: plain(*arguments) * (float("nan") if is_bad(now[0]) else 1.0)

        monkeypatch.setattr(StreamBatches, "at", noted)
        monkeypatch.setattr(Trainer, "plain_loss", property(worse))

    return poisoned


@given(st.sets(st.integers(0, 60)), st.integers(0, 80))
def test_steps_read_the_batches_that_are_not_skipped_in_order(tmp_path_factory, skipped, step):
    guard = Guard(tmp_path_factory.getbasetemp() / "none", 3.0)
    guard.skipped = sorted(skipped)
    left = [batch for batch in range(200) if batch not in skipped]
    assert guard.batch_of(step) == left[step]


@pytest.mark.parametrize("stops", [[], [10], [25, 34]])
def test_a_loss_that_is_no_number_is_as_if_its_batches_had_never_been_there(tiny, tmp_path, poison, stops):
    (tmp_path / "without").mkdir()
    write_json(tmp_path / "without" / "skipped.json", {"batches": [26, 27], "rollbacks": 0})
    without = learn(tmp_path / "without", job_of(tiny))
    poison(lambda batch: batch == 27)
    for steps in stops:  # wherever it is stopped and goes on
        learn(tmp_path / "poisoned", job_of(tiny), stop_after(steps))
    poisoned = learn(tmp_path / "poisoned", job_of(tiny))
    assert weights_of(poisoned) == weights_of(without)
    (line,) = told(poisoned, "rolled_back")
    assert line["text"] == (
        f"the loss of step 28 or its gradient is not a number: back at step {line['step']}, without the batches 26, 27"
    )
    steps = [entry["step"] for entry in read_journal(poisoned.journal) if "train/loss" in entry.get("values", {})]
    assert steps == list(range(1, STEPS + 1))


def test_trouble_that_does_not_end_is_one_sentence(tiny, tmp_path, poison):
    poison(lambda batch: batch >= 20)
    with pytest.raises(
        TrainingError, match=r"went back 3 times already and skipped batches 17, 18, 19, .*: lower training.optimizer"
    ):
        learn(tmp_path / "hopeless", job_of(tiny))
    assert not (tmp_path / "hopeless" / "model").exists()


@given(st.lists(st.floats(1.0, 2.0), min_size=16, max_size=80), st.floats(0.0, 12.0))
def test_a_jump_is_far_above_the_usual_and_a_noisy_loss_is_none(tmp_path_factory, losses, last):
    guard = Guard(tmp_path_factory.getbasetemp() / "none", 3.0)
    for step, loss in enumerate([*losses, last]):
        guard.add(step, torch.tensor(loss), torch.tensor(1.0))
    found = guard.look()
    if last <= 4.0:
        assert found is None
    if last > 10.0:
        assert found.step == len(losses)
        assert "the loss jumped to " in found.what


def test_an_average_follows_its_formula_and_lends_its_weights():
    model = GPT(ModelConfig(layers=1, width=8, heads=1, context=8), 20).initialise(0)
    average, expected = Average(model, 0.9), model.embedding.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            model.embedding.weight += 1.0
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.embedding.weight.detach()
    own = model.embedding.weight.detach().clone()
    with average.used():
        torch.testing.assert_close(model.embedding.weight.detach(), expected)
    assert torch.equal(model.embedding.weight, own)


def test_averaged_weights_are_measured_published_and_survive_a_stop(tiny, tmp_path):
    job = job_of(tiny, ema=0.9)
    straight = learn(tmp_path / "straight", job)
    learn(tmp_path / "stopped", job, stop_after(17))
    stopped = learn(tmp_path / "stopped", job)
    assert weights_of(stopped) == weights_of(straight)
    last = max(straight.checkpoints.glob("step-*"), key=lambda path: path.name)
    assert weights_of(straight) == sha256_file(last / "average.safetensors") != sha256_file(last / "model.safetensors")
    assert weights_of(straight) != weights_of(learn(tmp_path / "plain", job_of(tiny)))


def test_training_ends_when_validation_no_longer_falls_and_the_best_is_published(tiny, tmp_path, monkeypatch):
    scripted = [3.0, 2.0, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0]
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"valid/loss": scripted[self.step // 5 - 1]})
    job = job_of(tiny, evaluations=8, patience=2, keep=1)
    straight = learn(tmp_path / "straight", job)
    (line,) = told(straight, "stopped_early")
    assert line["text"] == f"stopped early after 20 of {STEPS} steps; step-000010 was the best"
    assert weights_of(straight) == sha256_file(checkpoint.best(straight.checkpoints) / "model.safetensors")
    learn(tmp_path / "stopped", job, stop_after(13))
    assert weights_of(learn(tmp_path / "stopped", job)) == weights_of(straight)


def test_overfitting_is_told_once_when_it_begins():
    falling = [(10, 3.0, 3.1), (20, 2.5, 2.4), (30, 2.6, 2.0), (40, 2.7, 1.5), (50, 2.8, 1.2)]
    assert [bool(overfits(falling[:count])) for count in range(6)] == [False, False, False, False, True, False]
    assert "since step 20 the validation loss rose from 2.500 to 2.700 while the training loss fell to 1.500" in overfits(
        falling[:4]
    )
    rising_both = [(10, 2.0, 2.0), (20, 2.1, 2.1), (30, 2.2, 2.2)]
    assert overfits(rising_both) == ""


def test_a_journal_tells_the_gap(tiny, tmp_path):
    run = learn(tmp_path / "run", job_of(tiny))
    lines = read_journal(run.journal)
    points, left = progress(lines)
    assert [step for step, _, _ in points] == [10, 20, 30, 40]
    gaps = [line["values"]["valid/gap"] for line in lines if "valid/gap" in line.get("values", {})]
    assert gaps == pytest.approx([valid - seen for _, valid, seen in points])
    assert left is None, "nothing was trained since the last evaluation"


def test_a_profile_tells_where_the_time_went(tiny, tmp_path):
    run = learn(tmp_path / "run", job_of(tiny, steps=10, profile=True))
    with gzip.open(run.profile / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert any("mm" in event.get("name", "") for event in events)
    assert "aten::" in (run.profile / "table.txt").read_text()
    assert weights_of(run) == weights_of(learn(tmp_path / "plain", job_of(tiny, steps=10)))
