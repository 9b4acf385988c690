"""How much room a training needs is counted from the settings, and said before it begins."""

import pytest
import torch

from gptcore.config import ModelConfig, TrainingConfig, preset
from gptcore.errors import DiskFullError
from gptcore.model import GPT
from gptcore.room import amount, check_room, freed_by, size_of
from gptcore.training import checkpoint
from gptcore.training.average import Average
from gptcore.training.optimizers import Optimizers
from gptcore.training.room import count_weights, training_bytes

SHAPES = {
    "gpt2": preset("gpt2"),
    "modern, grouped heads": preset("modern-33m"),
    "prefix": ModelConfig(layers=2, width=32, heads=4, objective="prefix"),
    "untied": ModelConfig(layers=2, width=32, heads=4, tied=False),
    "sinusoidal, relu, biases": ModelConfig(
        layers=3, width=24, heads=3, positions="sinusoidal", activation="relu", biases=True, qk_norm=False
    ),
    "SwiGLU with biases, layer norms": ModelConfig(layers=2, width=32, heads=4, kv_heads=2, biases=True, norm="layer"),
    "more embeddings": ModelConfig(
        layers=2, width=32, heads=4, kv_heads=2, embedding_norm=True, smear=True, value_embeddings=True
    ),
    "heads of another size": ModelConfig(layers=1, width=32, heads=4, head_size=10, ffn_width=48),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_counts_what_the_model_has(shape):
    config = SHAPES[shape]
    model = GPT(config, 777, device="meta")
    weights = count_weights(config, 777)
    assert weights.total == sum(weight.numel() for weight in model.parameters())
    assert weights.matrices == sum(w.numel() for name, w in model.named_parameters() if "blocks" in name and w.dim() == 2)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("algorithm", ["muon", "adamw", "adam", "sgd"])
def test_a_checkpoint_and_a_model_take_what_was_counted(tmp_path, algorithm, ema):
    config = ModelConfig(layers=2, width=64, heads=4, kv_heads=2, context=32)
    model = GPT(config, 400).initialise(0)
    training = TrainingConfig(steps=5, optimizer={"algorithm": algorithm}, ema=ema)
    optimizers = Optimizers(model, training.optimizer)
    model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    optimizers.step(1.0)
    checkpoint.save(tmp_path, 1, checkpoint.State(model, optimizers, Average(model, ema) if ema else None), {})
    weights = count_weights(config, 400)
    assert weights.checkpoint_bytes(training) == pytest.approx(size_of(tmp_path / "step-000001"), rel=0.03)
    assert weights.model_bytes == pytest.approx((tmp_path / "step-000001" / "model.safetensors").stat().st_size, rel=0.03)


def test_the_need_is_the_fullest_moment_and_keeping_fewer_checkpoints_lowers_it():
    config = ModelConfig(layers=2, width=64, heads=4)
    weights = count_weights(config, 400)
    checkpoint = weights.checkpoint_bytes(TrainingConfig(steps=1))

    def need(**changes):
        return training_bytes(config, TrainingConfig(**{"steps": 100, **changes}), 400, 2)

    assert need() == 2 * checkpoint + 3 * weights.model_bytes
    assert need(keep=1) < need() < need(keep=5)
    assert need(keep=5, evaluations=1) == need(keep=5, steps=1) == checkpoint + 3 * weights.model_bytes


def test_what_clearly_does_not_fit_is_told_with_what_to_do(tmp_path):
    check_room(tmp_path / "not" / "yet" / "there", 1000, "a trifle")
    check_room(tmp_path, 1000, "a training", free=1000)
    with pytest.raises(DiskFullError, match=r"a training needs at least 1.0 kB and only 999 bytes are free in .*gptcore clean"):
        check_room(tmp_path, 1001, "a training", free=999)
    with pytest.raises(DiskFullError, match="GPTCORE_HOME to a larger disk, or keep fewer"):
        check_room(tmp_path, 10**18, "a training", "keep fewer")
    assert [amount(count) for count in (0, 999, 1500, 123_456_789, 2.5e12)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "123 MB",
        "2.5 TB",
    ]


def test_a_file_with_a_second_link_elsewhere_frees_nothing(tmp_path):
    for name in ("a", "b", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own").write_bytes(b"1234")
    (tmp_path / "a" / "shared").write_bytes(b"123456")
    (tmp_path / "b" / "shared").hardlink_to(tmp_path / "a" / "shared")
    (tmp_path / "elsewhere" / "linked").hardlink_to(tmp_path / "a" / "own")
    assert freed_by([tmp_path / "a"]) == 0
    assert freed_by([tmp_path / "a", tmp_path / "b"]) == 4 + 6
    assert size_of(tmp_path / "a") == 10
