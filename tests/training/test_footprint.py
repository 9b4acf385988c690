"""Memory is predicted from shapes: beside what torch counts and what the kernel measures, and turned into a micro-batch."""

import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.config import PRESETS, ModelConfig, OptimizerConfig, TrainingConfig, preset
from gptcore.errors import TrainingError
from gptcore.model import GPT
from gptcore.model.loss import mean_loss
from gptcore.training import budget
from gptcore.training.bench import GPT2_BLOCK
from gptcore.training.budget import resolve
from gptcore.training.machine import _rooms, free_memory
from gptcore.training.memory import Footprint, _Live
from gptcore.training.optimizers import Optimizers

SMALL = ModelConfig(layers=3, width=64, heads=4, kv_heads=2, context=64)
TRAINING = TrainingConfig(steps=1, batch=8)

MEASURE = """
import resource, sys, torch
from gptcore.config import ModelConfig, TrainingConfig
from gptcore.model import GPT
from gptcore.model.loss import mean_loss
from gptcore.training.memory import Footprint
from gptcore.training.optimizers import Optimizers
from gptcore.training.step import update
config, training = ModelConfig.model_validate_json(sys.argv[1]), TrainingConfig.model_validate_json(sys.argv[2])
vocabulary, micro_batch = 8192, training.micro_batch
model = GPT(config, vocabulary, device="cpu").initialise(0).train()
optimizers = Optimizers(model, training.optimizer)
tokens = torch.randint(vocabulary, (training.batch, config.context), device="cpu")
parts = [(part, part) for part in torch.split(tokens, micro_batch)]
for _ in range(3):
    update(model, mean_loss, optimizers, parts, float(tokens.numel()), share=1.0, clip_to=1.0)
measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
footprint = Footprint(config, vocabulary, training, "cpu", torch.float32)
print(measured, footprint.at(micro_batch, repeated=micro_batch < training.batch).total)
"""


def measured_and_predicted(config: ModelConfig, batch: int, micro_batch: int, algorithm: str) -> tuple[int, int]:
    training = TrainingConfig(steps=1, batch=batch, micro_batch=micro_batch, optimizer=OptimizerConfig(algorithm=algorithm))
    command = [sys.executable, "-c", MEASURE, config.model_dump_json(), training.model_dump_json()]
    measured, predicted = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(measured), int(predicted)


def test_a_small_training_takes_what_was_predicted():
    measured, predicted = measured_and_predicted(ModelConfig(layers=4, width=128, heads=4, context=128), 8, 8, "adamw")
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "batch", "micro_batch", "algorithm"),
    [
        (GPT2_BLOCK, 8, 8, "adamw"),
        (GPT2_BLOCK, 8, 4, "adamw"),
        (GPT2_BLOCK.model_copy(update={"width": 768, "heads": 12, "layers": 4}), 8, 8, "muon"),
    ],
)
def test_a_training_whose_activations_dominate_takes_what_was_predicted(config, batch, micro_batch, algorithm):
    measured, predicted = measured_and_predicted(config, batch, micro_batch, algorithm)
    print(f"{config.layers} x {config.width}, {micro_batch} of {batch}: {measured >> 20} MB, predicted {predicted >> 20} MB")
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("width", [64, 96])
def test_the_meta_device_holds_the_bytes_that_a_cpu_holds(width):
    shape = SMALL.model_copy(update={"layers": 5, "width": width})
    footprint = Footprint(shape, 512, TRAINING, "cpu", torch.float32)
    model = GPT(shape, 512, device="cpu").initialise(0).train()
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    tokens = torch.zeros(4, shape.context, dtype=torch.long, device="cpu")
    with _Live() as live:
        mean_loss(model, tokens, tokens, 1.0).backward()
        live.mark()
    assert max(footprint._peaks(5, 4)) == pytest.approx(live.peaks[0] + 2 * tokens.nbytes, rel=0.02)


def test_what_autograd_saves_lies_between_weights_and_the_fullest_moment():
    footprint = Footprint(SMALL, 512, TRAINING, "cpu", torch.float32)
    model, saved = GPT(SMALL, 512, device="cpu").initialise(0), {}
    tokens = torch.zeros(4, SMALL.context, dtype=torch.long, device="cpu")
    keep = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mean_loss(model, tokens, tokens, 1.0)
    activations = sum(storage.nbytes() for place, storage in saved.items() if place not in keep)
    assert activations < footprint.at(4).moment < 1.5 * activations


@pytest.mark.parametrize("algorithm", ["muon", "adamw", "adam", "sgd"])
def test_what_stays_is_what_the_optimizer_has(algorithm):
    training = TRAINING.model_copy(update={"optimizer": OptimizerConfig(algorithm=algorithm), "ema": 0.9})
    model = GPT(SMALL, 512, device="cpu").initialise(0)
    optimizers = Optimizers(model, training.optimizer)
    tokens = torch.zeros(1, 8, dtype=torch.long, device="cpu")
    model(tokens).sum().backward()
    optimizers.step(1.0)
    weights = sum(weight.nbytes for weight in model.parameters())
    state = sum(entry.nbytes for entry in optimizers.state().values() if entry.dim())
    assert Footprint(SMALL, 512, training, "cpu", torch.float32).at(1).kept == 2 * weights + state


@settings(max_examples=10)
@given(st.integers(1, 12), st.integers(0, 400))
def test_the_largest_micro_batch_fits_and_one_more_does_not(rows, megabytes):
    footprint, there = Footprint(SMALL, 4096, TRAINING, "cpu", torch.float32), megabytes << 20
    found = footprint.largest(rows, 16, there)
    assert 0 <= found <= rows
    assert found == 0 or footprint.at(found, repeated=True).training <= there
    assert found == rows or footprint.at(found + 1, repeated=True).training > there


def test_a_deep_and_wide_shape_is_counted_in_about_a_second():
    Footprint(SMALL, 512, TRAINING, "cpu", torch.float32).at(1)  # torch imports what it needs for shapes
    for name in PRESETS:
        started = time.process_time()
        memory = Footprint(preset(name), 50_257, TRAINING, "cuda", torch.bfloat16).at(64, repeated=True)
        assert time.process_time() - started < 3, name
        assert memory.kept < memory.total < 1 << 40


@pytest.mark.parametrize("vocabulary", [512, 50_257])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_few_sequences_and_blocks_tell_of_many(vocabulary, device):
    shape = ModelConfig(layers=6, width=128, heads=4, context=128)
    few = Footprint(shape, vocabulary, TRAINING, device, torch.bfloat16)
    peaks = Footprint(shape, vocabulary, TRAINING, device, torch.bfloat16)._counted(6, 128)
    assert max(few._peaks(6, 128)) == pytest.approx(max(peaks), rel=0.02)


def test_the_fused_kernel_keeps_no_matrix_of_scores():
    shape = SMALL.model_copy(update={"context": 512})
    plain, fused = (Footprint(shape, 512, TRAINING, device, torch.float32).at(2).moment for device in ("cpu", "cuda"))
    scores = 2 * 2 * shape.heads * 512 * 512 * 4  # rows, at least softmax and what it is taken of, heads, places, bytes
    assert plain - fused > scores


class Rows:
    """Batches of which only the size is asked."""

    tokens_per_step = 512.0


def test_the_micro_batch_is_what_fits(monkeypatch):
    def micro_batch(free: int, **changes) -> int:
        monkeypatch.setattr(budget, "free_memory", lambda device, processes: free)
        training = TrainingConfig(**{"steps": 1, "batch": 64, "device": "cpu", **changes})
        return resolve(training, SMALL.model_copy(update={"context": 256}), 512, Rows()).micro_batch

    assert micro_batch(64 << 30) == 32, "8,192 tokens"
    assert micro_batch(64 << 30, batch=4) == 4
    assert 1 <= micro_batch(100 << 20) < 32
    assert micro_batch(1 << 20, micro_batch=7) == 7, "whoever asks for one gets it"
    with pytest.raises(TrainingError, match=r"takes [\d.]+ MB of memory .* lower model.context"):
        micro_batch(1 << 20)


@pytest.mark.parametrize(
    ("membership", "folder", "names", "prefix"),
    [
        ("0::/a/b\n", "a/b", ("memory.max", "memory.current"), ""),
        ("0::/a/b\n", "a", ("memory.max", "memory.current"), ""),
        ("9:cpu:/x\n4:memory:/a\n0::/\n", "memory/a", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"),
        ("4:memory:/of/the/host\n", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"),
    ],
)
def test_the_limit_of_a_container_is_kept_and_page_cache_is_free(tmp_path, membership, folder, names, prefix):
    (tmp_path / "self").write_text(membership)
    group = tmp_path / folder
    group.mkdir(parents=True)
    (group / names[0]).write_text("1000\n")
    (group / names[1]).write_text("700\n")
    (group / "memory.stat").write_text(f"{prefix}inactive_file 200\nanon 400\n{prefix}active_file 50\n")
    assert list(_rooms(tmp_path, tmp_path / "self")) == [550]


def test_a_group_without_a_limit_says_nothing(tmp_path):
    (tmp_path / "self").write_text("0::/\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert list(_rooms(tmp_path, tmp_path / "self")) == []
    assert list(_rooms(tmp_path, tmp_path / "nowhere")) == []


def test_processes_share_the_machine():
    alone, shared = (free_memory(torch.device("cpu"), processes) for processes in (1, 4))
    assert shared == pytest.approx(alone / 4, rel=0.2)
