"""What a training would take follows from the shape, the budget and the card; worked examples by hand."""

import json
import time

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from flows.cli import app
from gptcore.cards import CARDS, card
from gptcore.config import CorpusConfig, CostConfig, FilesSource, PipelineConfig, TokenizerConfig, TrainingConfig, preset
from gptcore.errors import SettingsError
from gptcore.training.forecast import Forecast, budget, forecasts, places, update_flops
from gptcore.training.machine import matrix_speed
from gptcore.training.muon import orthogonal, orthogonal_flops

GPT2 = preset("gpt2")


def told(on: str = "h100", shape=GPT2, *, per_hour: float | None = None, mfu: float | None = None, **changes) -> Forecast:
    budget = {} if {"minutes", "tokens"} & changes.keys() else {"steps": 100}
    training = TrainingConfig(**{"batch": 64, "optimizer": {"algorithm": "adamw"}, **budget, **changes})
    config = PipelineConfig(
        corpus=CorpusConfig(sources=(FilesSource(paths=("texts",)),)), training=training, model=shape,
        tokenizer=TokenizerConfig(vocabulary=50_257), cost=CostConfig(per_hour=per_hour, per_kwh=0.5),
    )  # fmt: skip
    return next(forecasts(config, {"shape": shape}, places([on], training, mfu), {}))


def test_every_card_has_dense_numbers():
    for known in CARDS.values():
        assert not known.bfloat16 or known.half == pytest.approx(2 * known.float32, rel=0.02), "TF32 is half of it"
        assert 2 <= known.memory <= 200
        assert 50 <= known.watts <= 1000


def test_an_unknown_card_is_told_the_names():
    with pytest.raises(SettingsError, match=r"unknown card 'h1000', did you mean h100\? there are: here .*, t4, "):
        card("h1000")
    with pytest.raises(SettingsError, match="unknown card"):
        places(["here", "abacus"], TrainingConfig(steps=1))


def test_time_energy_and_money_of_gpt2_on_an_h100():
    found = told(per_hour=2.0, tokens=10**9, evaluations=1, evaluation_tokens=1)
    assert found.parameters == 124_439_808, "as counted by OpenAI's own weights"
    assert found.flops_per_token == 6 * 124_439_808 + 12 * 12 * 768 * 1024
    seconds = 1e9 * found.flops_per_token / (989.5e12 * 0.35)
    assert found.seconds == pytest.approx(seconds)
    assert found.joules == pytest.approx(700 * seconds)
    assert found.money == pytest.approx(2.0 * seconds / 3600 + 0.5 * 700 * seconds / 3.6e6, abs=1e-6)
    assert told(mfu=0.7, tokens=10**9, evaluations=1, evaluation_tokens=1).seconds == pytest.approx(seconds / 2)


def test_a_card_without_bfloat16_computes_in_float16_and_muon_in_float32():
    t4 = told("t4").place
    assert (t4.precision, t4.flops, t4.muon_flops) == ("float16", 65e12, 8.1e12)
    wide = told("h100", precision="float32").place
    assert (wide.precision, wide.flops, wide.muon_flops) == ("float32", 494.5e12, 494.5e12)


def test_a_budget_in_minutes_buys_tokens_and_one_in_steps_time():
    minutes = TrainingConfig(minutes=10, evaluations=2, evaluation_tokens=3000)
    assert budget(minutes, 2048, 100.0, 300.0) == (pytest.approx(100 * (600 - 20)), 600)
    dear = TrainingConfig(minutes=10, evaluations=100, evaluation_tokens=3000)
    assert budget(dear, 2048, 100.0, 300.0) == (pytest.approx(100 * 540), 600), "at most a tenth goes to evaluations"
    steps = TrainingConfig(steps=5, batch=2, evaluations=1, evaluation_tokens=600)
    assert budget(steps, 2048, 100.0, 300.0) == (10_240, pytest.approx(102.4 + 2))


def test_the_operations_of_muon_are_those_that_torch_counts():
    matrices = torch.randn(3, 24, 16, device="cpu")
    with FlopCounterMode(display=False) as counter:
        orthogonal(matrices)
    assert 3 * orthogonal_flops(24, 16) == counter.get_total_flops()
    training = TrainingConfig(steps=1)
    shape = preset("modern-5m")
    attention, ffn = orthogonal_flops(256, 256), orthogonal_flops(256, 704)
    assert update_flops(shape, 512, training) == 4 * (4 * attention + 3 * ffn)
    adamw, muon = (told(shape=shape, optimizer={"algorithm": name}, batch=2) for name in ("adamw", "muon"))
    more = update_flops(shape, 50_257, training) / (989.5e12 * 0.35)
    assert 2 * 256 / muon.speed == pytest.approx(2 * 256 / adamw.speed + more)


@pytest.mark.parametrize("places", [{"processes": 2}, {"nodes": 2}])
def test_every_process_has_a_card(places):
    one, two = told(), told(**places)
    assert two.speed == pytest.approx(2 * one.speed)
    assert two.micro_batch == one.micro_batch / 2
    assert two.joules == pytest.approx(one.joules)


def test_a_prefix_model_computes_more_tokens_than_it_reads():
    causal, prefix = (told(shape=GPT2.model_copy(update={"objective": name})) for name in ("causal", "prefix"))
    assert prefix.tokens == causal.tokens * 930 / 1024, "the context divided by 1 + 2 x 0.15 / 3"
    step = 64 * 1024 * prefix.flops_per_token / (989.5e12 * 0.35)
    assert 64 * 930 / prefix.speed == pytest.approx(step)


def test_what_does_not_fit_says_how_much_is_missing():
    found = told("t4", preset("gpt2-xl"))
    assert found.micro_batch == 0
    assert found.missing == found.memory.total - int(0.9 * 16 * 2**30) > 10 * 2**30
    assert found.as_row()["fits"] is False
    assert told("h200", preset("gpt2-xl")).micro_batch > 8
    assert told("t4", micro_batch=64).micro_batch == 0
    assert told("t4", micro_batch=2).micro_batch == 2


def test_this_machine_is_measured_in_about_a_second():
    started = time.perf_counter()
    speed = matrix_speed(torch.device("cpu"), torch.float32, seconds=0.5)
    assert 1e8 < speed.flops < 1e15
    assert time.perf_counter() - started < 30, "a busy machine finishes a product late"
    assert speed.watts is None or speed.watts > 0


@pytest.fixture
def plan(tmp_path, capfd):
    """A function that runs `gptcore plan` with small settings and returns what it printed."""
    settings = tmp_path / "small.yaml"
    corpus = {"sources": [{"type": "files", "paths": ["texts"]}]}
    settings.write_text(yaml.safe_dump({"name": "tiny-gpt", "corpus": corpus, "training": {"tokens": 10_000_000, "batch": 64}}))

    def run(*arguments: str) -> str:
        app(["plan", str(settings), *arguments], standalone_mode=False)
        return capfd.readouterr().out

    return run


def test_plan_tells_of_shapes_on_cards(plan):
    rows = json.loads(plan("--on", "h100", "--on", "t4", "--preset", "gpt2-xl", "--per-hour", "h100=3", "--json"))
    assert [(row["shape"], row["on"], row["fits"]) for row in rows] == [("gpt2-xl", "h100", True), ("gpt2-xl", "t4", False)]
    assert [row["money"] for row in rows] == [pytest.approx(3 * rows[0]["seconds"] / 3600, rel=1e-3), None]
    table = plan("--on", "l4", "--on", "t4", "--preset", "modern-5m", "--preset", "gpt2-xl")
    for part in ("does not fit, 1", "kWh", "Assumed speed (--mfu): l4: 0.35 of 121 TFLOP/s in bfloat16 (data sheet)"):
        assert part in table
    assert "EUR" not in table
    assert "EUR" in plan("--on", "l4", "--set", "cost.per_hour=1")


def test_plan_measures_this_machine_for_the_settings_own_shape(plan):
    (row,) = json.loads(plan("--on", "here", "--set", "training.device=cpu", "--mfu", "0.5", "--json"))
    assert (row["shape"], row["on"], row["mfu"], row["fits"]) == ("tiny-gpt", "here", 0.5, True)
    assert row["tokens_per_second"] > 0


def test_plan_refuses_what_it_does_not_know(plan):
    for arguments, sentence in (
        (("--on", "abacus"), "unknown card 'abacus'"),
        (("--on", "t4", "--per-hour", "h100=3"), "--per-hour h100=3: expected a price such as 2.50, or CARD=2.50"),
        (("--on", "t4", "--per-hour", "much"), "expected a price"),
        (("--preset", "gpt9"), "unknown preset 'gpt9'"),
    ):
        with pytest.raises(SettingsError, match=sentence):
            plan(*arguments)
