"""The benchmark measures both sides in turns and prints what is promised. How fast they are is no matter here."""

import json

import pytest

from flows.cli import app
from gptcore.config import preset
from gptcore.errors import SettingsError
from gptcore.inference.bench import BenchConfig
from gptcore.turns import bench_config

TINY = (
    "model.layers=1", "model.width=32", "model.heads=2", "model.context=32", "vocabulary=300", "prompt=4", "new_tokens=5",
    "rounds=2", "batches=[1,3]",
)  # fmt: skip


def test_what_is_measured_is_a_preset_or_single_settings():
    assert bench_config(BenchConfig) == BenchConfig()
    assert bench_config(BenchConfig, "modern-5m").model == preset("modern-5m")
    with pytest.raises(SettingsError, match="unknown setting"):
        bench_config(BenchConfig, None, ["bathces=3"])
    with pytest.raises(SettingsError, match="more than the context of 32"):
        bench_config(BenchConfig, None, ["model.context=32"])


@pytest.mark.slow
def test_all_contenders_take_turns_and_the_promised_keys_are_there(capfd):
    overrides = [part for setting in TINY for part in ("--set", setting)]
    app(["bench", "generate", "--json", *overrides], standalone_mode=False)
    told = json.loads(capfd.readouterr().out)
    assert set(told["cases"]) == {"batch 1", "batch 1, int8", "batch 3", "batch 3, int8"}
    assert told["ratio"] == told["cases"]["batch 1"]["ratio"]
    for case in told["cases"].values():
        assert case["ratio"] == pytest.approx(case["tokens_per_second"] / case["peer"]["tokens_per_second"], rel=0.1)
        assert case["first_token_seconds"] > 0
        assert case["memory_mb"] > 50
        assert case["peer"]["name"].startswith("transformers")
    assert told["bandwidth_share"] > 0
    assert "int8 weights" in told["cases"]["batch 1, int8"]["setting"]
