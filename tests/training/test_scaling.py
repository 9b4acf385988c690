"""bfloat16 learns as float32 does. float16: small gradients survive, overflows are skipped, and a stop changes no bit."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from gptcore.artifacts import sha256_file
from gptcore.config import ModelConfig, OptimizerConfig
from gptcore.model import GPT
from gptcore.model.inputs import Inputs
from gptcore.model.loss import mean_loss
from gptcore.training import scaling
from gptcore.training.attempts import Recorder
from gptcore.training.budget import precision_for
from gptcore.training.job import Job, Run
from gptcore.training.journal import read_journal
from gptcore.training.loop import train
from gptcore.training.optimizers import Optimizers
from gptcore.training.ranks import Rank
from gptcore.training.scaling import LossScale
from gptcore.training.step import update

STEPS = 30


def learn(tiny, folder: Path, stop=lambda: False, **training) -> Run:
    run = Run(folder)
    run.folder.mkdir(exist_ok=True)
    job = Job(
        model=tiny.model(),
        training=tiny.training(**{"steps": STEPS, "evaluations": 3, "precision": "float16", "compile": False, **training}),
        shards=str(tiny.shards),
        shards_digest="shards",
        tokenizer=str(tiny.tokenizer / "tokenizer"),
    )
    run.write(job)
    train(run, Rank(), stop, Recorder(Path(os.devnull)))
    return run


def stop_after(steps: int):
    asked = iter(range(10_000))
    return lambda: next(asked) + 1 >= steps


def values_of(run: Run, name: str) -> list[float]:
    return [line["values"][name] for line in read_journal(run.journal) if name in line.get("values", {})]


def told(run: Run, event: str) -> list[str]:
    return [line["text"] for line in read_journal(run.journal) if line.get("event") == event]


def weights_of(run: Run) -> str:
    return sha256_file(run.model / "model.safetensors")


CARD = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CARD)])
def test_float16_learns_what_float32_learns(tiny, tmp_path, device):
    half, full = (learn(tiny, tmp_path / name, precision=name, device=device) for name in ("float16", "float32"))
    losses = values_of(half, "train/loss")
    assert losses[-1] < losses[0] - 0.5
    assert losses == pytest.approx(values_of(full, "train/loss"), abs=0.05)


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CARD)])
def test_bfloat16_has_the_loss_curve_of_float32_to_one_percent_over_100_steps(tiny, tmp_path, device, algorithm):
    # At a rate at which a step is stable: where it is not, two float32 runs of other roundings part as far.
    asked = {"steps": 100, "device": device, "optimizer": {"algorithm": algorithm, "rate": 0.002}}
    runs = (learn(tiny, tmp_path / name, precision=name, **asked) for name in ("bfloat16", "float32"))
    half, full = (np.reshape(values_of(run, "train/loss"), (10, 10)).mean(1) for run in runs)
    assert half == pytest.approx(full, rel=0.01)


def test_a_gradient_that_overflows_is_skipped_and_a_stop_in_between_changes_no_bit(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "_START", 2.0**30)
    straight = learn(tiny, tmp_path / "straight")
    skipped = told(straight, "overflow")
    assert skipped[0] == "the gradient of step 1 overflowed and is left out; the loss scale is halved to 5.36871e+08"
    assert not told(straight, "rolled_back")
    assert values_of(straight, "gradient_norm")[0] == 0.0
    assert values_of(straight, "train/loss")[-1] < values_of(straight, "train/loss")[0]
    assert values_of(straight, "loss_scale")[-1] == 2.0 ** (30 - len(skipped))
    for steps in (2, 12):  # while the scale still falls, and later
        learn(tiny, tmp_path / "stopped", stop_after(steps))
    stopped = learn(tiny, tmp_path / "stopped")
    assert weights_of(stopped) == weights_of(straight)
    assert told(stopped, "overflow") == skipped


def test_a_skipped_step_leaves_weights_and_moments_alone_until_the_scale_ran_out():
    model = GPT(ModelConfig(layers=1, width=8, heads=1, context=8), 20).initialise(0)
    optimizers, scale = Optimizers(model, OptimizerConfig(algorithm="adamw")), LossScale()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tokens = torch.arange(8, device="cpu")[None]

    def overflowing(*arguments):
        return mean_loss(*arguments) * torch.tensor(3e38, device="cpu")

    norms = []
    while not norms or norms[-1] == 0.0:
        norms.append(
            float(update(model, overflowing, optimizers, [Inputs(tokens, tokens)], 8.0, share=1, clip_to=1, scale=scale)[1])
        )
    assert len(norms) == 17, "2**16 can be halved 16 times"
    assert scale.ran_out
    assert optimizers.state() == {}
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_the_scale_is_doubled_after_many_good_steps_and_remembers_them():
    scale, again = LossScale(), LossScale()
    for _ in range(1999):
        assert scale.fits(torch.tensor(1.0, device="cpu"))
    again.load(scale.state())
    assert again.value == 2.0**16
    assert again.fits(torch.tensor(1.0, device="cpu"))
    assert again.value == 2.0**17
    assert not again.fits(torch.tensor(float("nan"), device="cpu"))
    assert again.state() == {"value": 2.0**16, "good": 0}


def test_a_wanted_precision_is_given_everywhere_and_a_cpu_chooses_no_float16():
    cpu = torch.device("cpu")
    assert precision_for("float16", cpu) == "float16"
    assert precision_for("auto", cpu) in ("float32", "bfloat16")
