"""The benchmark measures both sides in turns and prints what is promised. How fast they are is no matter here."""

import json

import pytest

from flows.cli import app
from gptcore.config import preset
from gptcore.errors import SettingsError
from gptcore.training.bench import GPT2_BLOCK, BenchConfig, flops_per_token
from gptcore.turns import bench_config

TINY = ("model.layers=1", "model.width=32", "model.heads=2", "model.context=16", "vocabulary=300", "training.batch=2")


def test_the_operations_of_a_token_follow_from_the_shape():
    weights = 8192 * 384 + 256 * 384 + 6 * (12 * 384**2 + 13 * 384) + 2 * 384  # GPT-2, counted by hand; the head is tied
    assert flops_per_token(GPT2_BLOCK, 8192) == 6 * weights + 12 * 6 * 256 * 384
    looked_up = GPT2_BLOCK.model_copy(update={"tied": False, "value_embeddings": True})
    assert flops_per_token(looked_up, 8192) == flops_per_token(GPT2_BLOCK, 8192)


def test_what_is_measured_is_a_preset_or_single_settings():
    assert bench_config(BenchConfig) == BenchConfig()
    assert bench_config(BenchConfig, "modern-5m").model == preset("modern-5m")
    assert bench_config(BenchConfig, None, ["vocabulary=50257", "training.precision=float32"]).vocabulary == 50_257
    with pytest.raises(SettingsError, match="unknown setting; did you mean vocabulary"):
        bench_config(BenchConfig, None, ["vocabluary=3"])


@pytest.mark.slow
def test_all_contenders_take_turns_and_the_promised_keys_are_there(capfd):
    overrides = [part for setting in (*TINY, "rounds=2", "steps=1") for part in ("--set", setting)]
    app(["bench", "train", "--json", *overrides], standalone_mode=False)
    told = json.loads(capfd.readouterr().out)
    assert told["tokens_per_second"] > 0
    assert told["ratio"] == pytest.approx(told["peer"]["step_seconds"] / told["step_seconds"], rel=0.1)
    gflops = told["tokens_per_second"] * told["flops_per_token"] / 1e9
    assert told["mfu"] == pytest.approx(gflops / told["peak_gflops"], rel=0.05, abs=1e-4)
    assert ", muon, " in told["muon"]["setting"]
    assert told["peer"]["name"].startswith("transformers")
    assert told["memory_mb"] > 50
