"""Memory is predicted from shapes: beside what torch counts and what the kernel measures, and turned into a micro-batch."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.config import PRESETS, ModelConfig, OptimizerConfig, TrainingConfig, preset
from gptcore.errors import TrainingError
from gptcore.model import GPT
from gptcore.model.loss import mean_loss
from gptcore.tokens.objectives import Symbols, blank, objective
from gptcore.training import budget
from gptcore.training.bench import GPT2_BLOCK
from gptcore.training.budget import resolve
from gptcore.training.footprint import Footprint, _Live
from gptcore.training.job import Job
from gptcore.training.machine import _rooms, free_memory
from gptcore.training.optimizers import Optimizers

SMALL = ModelConfig(layers=3, width=64, heads=4, kv_heads=2, context=64)
TRAINING = TrainingConfig(steps=1, batch=8)


def footprint_of(
    shape: ModelConfig, vocabulary: int = 512, training: TrainingConfig = TRAINING, device: str = "cpu", dtype=torch.float32
) -> Footprint:
    text = objective(shape, training.masking, Symbols(0, 1, 2, 3, np.arange(4), vocabulary), 0)
    return Footprint(shape, vocabulary, training, lambda rows: blank(text, rows), device, dtype)


MEASURE = """
import resource, sys
import numpy as np, torch
from gptcore.config import ModelConfig, TrainingConfig
from gptcore.model import GPT
from gptcore.model.inputs import inputs
from gptcore.model.loss import mean_loss
from gptcore.tokens.objectives import Excerpts, Symbols, blank, objective
from gptcore.training.footprint import Footprint
from gptcore.training.optimizers import Optimizers
from gptcore.training.step import update
config, training = ModelConfig.model_validate_json(sys.argv[1]), TrainingConfig.model_validate_json(sys.argv[2])
vocabulary, cpu = 8192, torch.device("cpu")
text = objective(config, training.masking, Symbols(0, 1, 2, 3, np.arange(4), vocabulary), 0)
footprint = Footprint(config, vocabulary, training, lambda rows: blank(text, rows), "cpu", torch.float32)
footprint.at(training.micro_batch)
model = GPT(config, vocabulary, device="cpu").initialise(0).train()
optimizers = Optimizers(model, training.optimizer)
ids = np.random.default_rng(0).integers(4, vocabulary, (training.batch, text.reads + 1))
batch = text.of_text(Excerpts(ids, 1000 * np.arange(training.batch), np.zeros(training.batch, np.int64)))
for _ in range(3):
    parts = (inputs(batch, cpu, slice(at, at + training.micro_batch)) for at in range(0, training.batch, training.micro_batch))
    update(model, mean_loss, optimizers, parts, float(batch.learned), share=1.0, clip_to=1.0)
memory = footprint.at(training.micro_batch)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, memory.total, memory.total - memory.holes)
"""


def measured_and_predicted(config: ModelConfig, micro_batch: int, algorithm: str, *, holes: bool) -> tuple[int, int]:
    """Peak bytes of a training; without `holes` every tensor of some size has pages of its own, which go when it does."""
    training = TrainingConfig(steps=1, batch=8, micro_batch=micro_batch, optimizer=OptimizerConfig(algorithm=algorithm))
    command = [sys.executable, "-c", MEASURE, config.model_dump_json(), training.model_dump_json()]
    environment = os.environ | ({} if holes else {"MALLOC_MMAP_THRESHOLD_": "65536"})
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    measured, total, tensors = map(int, told.split())
    predicted = total if holes else tensors
    print(f"{config.layers} x {config.width} x {config.context}, {micro_batch} of 8: {measured >> 20} MB, {predicted >> 20}")
    return measured, predicted


def test_a_small_training_takes_what_was_predicted():
    shape = ModelConfig(layers=4, width=128, heads=4, context=128)
    measured, predicted = measured_and_predicted(shape, 8, "adamw", holes=True)
    assert predicted == pytest.approx(measured, rel=0.15)


BLOCK = ModelConfig(layers=6, width=384, heads=6, context=256)
EXTRAS = {"value_embeddings": True, "smear": True, "embedding_norm": True, "dropout": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "changes", "micro_batch", "algorithm"),
    [
        (GPT2_BLOCK, {}, 8, "adamw"),
        (GPT2_BLOCK, {}, 4, "adamw"),
        (GPT2_BLOCK, {"width": 768, "heads": 12, "layers": 4}, 8, "muon"),
        (BLOCK, {}, 8, "muon"),
        (BLOCK, {"context": 1024, "layers": 3}, 8, "adamw"),
        (BLOCK, {"kv_heads": 2, **EXTRAS}, 8, "adamw"),
        (BLOCK, {"document_mask": True}, 8, "adamw"),
        (BLOCK, {"objective": "masked"}, 8, "adamw"),
        (BLOCK, {"objective": "masked", "document_mask": True, "context": 512}, 8, "adamw"),
        (BLOCK, {"objective": "prefix"}, 8, "adamw"),
        (BLOCK, {"objective": "prefix", "document_mask": True, **EXTRAS}, 8, "muon"),
    ],
)
def test_a_training_whose_activations_dominate_takes_what_was_predicted(shape, changes, micro_batch, algorithm):
    for holes, within in ((False, 0.08), (True, 0.25)):  # the holes are the allocator's, and no two runs have the same
        measured, predicted = measured_and_predicted(shape.model_copy(update=changes), micro_batch, algorithm, holes=holes)
        assert predicted == pytest.approx(measured, rel=within)


@pytest.mark.parametrize("width", [64, 96])
def test_the_meta_device_holds_the_bytes_that_a_cpu_holds(width):
    shape = SMALL.model_copy(update={"layers": 5, "width": width})
    footprint = footprint_of(shape)
    model = GPT(shape, 512, device="cpu").initialise(0).train()
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    tokens = torch.zeros(4, shape.context, dtype=torch.long, device="cpu")
    with _Live(model.parameters()) as live:
        mean_loss(model, tokens, tokens, 1.0).backward()
        live.mark()
    assert max(footprint._peaks(5, 4)) == pytest.approx(live.peaks[0] + 2 * tokens.nbytes, rel=0.02)


def test_what_autograd_saves_lies_between_weights_and_the_fullest_moment():
    footprint = footprint_of(SMALL)
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
    assert footprint_of(SMALL, 512, training).at(1).kept == 2 * weights + state


@settings(max_examples=10)
@given(st.integers(1, 12), st.integers(0, 400))
def test_the_largest_micro_batch_fits_and_one_more_does_not(rows, megabytes):
    footprint, there = footprint_of(SMALL, 4096, TRAINING.model_copy(update={"batch": 16})), megabytes << 20
    found = footprint.largest(rows, there)
    assert 0 <= found <= rows
    assert found == 0 or footprint.at(found).training <= there
    assert found == rows or footprint.at(found + 1).training > there


def test_a_deep_and_wide_shape_is_counted_in_about_a_second():
    footprint_of(SMALL).at(1)  # torch imports what it needs for shapes
    for name in PRESETS:
        started = time.process_time()
        memory = footprint_of(preset(name), 50_257, TRAINING, "cuda", torch.bfloat16).at(64)
        assert time.process_time() - started < 3, name
        assert memory.kept < memory.total < 1 << 40


@pytest.mark.parametrize("vocabulary", [512, 50_257])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_few_sequences_and_blocks_tell_of_many(vocabulary, device):
    shape = ModelConfig(layers=6, width=128, heads=4, context=128)
    few = footprint_of(shape, vocabulary, TRAINING, device, torch.bfloat16)
    peaks = footprint_of(shape, vocabulary, TRAINING, device, torch.bfloat16)._counted(6, 128)
    assert max(few._peaks(6, 128)) == pytest.approx(max(peaks), rel=0.02)


def test_the_fused_kernel_keeps_no_matrix_of_scores():
    shape = SMALL.model_copy(update={"context": 512})
    plain, fused = (footprint_of(shape, device=device).at(2).moment for device in ("cpu", "cuda"))
    scores = 2 * 2 * shape.heads * 512 * 512 * 4  # rows, at least softmax and what it is taken of, heads, places, bytes
    assert plain - fused > scores


class Rows:
    """Batches of which only the size is asked."""

    tokens_per_step = 512.0

    @staticmethod
    def longest(rows: int):
        text = objective(SMALL.model_copy(update={"context": 256}), TRAINING.masking, Symbols(0, 1, 2, 3, np.arange(4), 512), 0)
        return blank(text, rows)


def test_the_micro_batch_is_what_fits(monkeypatch):
    def micro_batch(free: int, **changes) -> int:
        monkeypatch.setattr(budget, "free_memory", lambda device, processes: free)
        training = TrainingConfig(**{"steps": 1, "batch": 64, "device": "cpu", **changes})
        shape = SMALL.model_copy(update={"context": 256})
        job = Job(model=shape, training=training, shards="", shards_digest="", tokenizer="")
        return resolve(job, 512, Rows()).micro_batch

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
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(membership)
    group = tmp_path / "sys/fs/cgroup" / folder
    group.mkdir(parents=True)
    (group / names[0]).write_text("1000\n")
    (group / names[1]).write_text("700\n")
    (group / "memory.stat").write_text(f"{prefix}inactive_file 200\nanon 400\n{prefix}active_file 50\n")
    assert list(_rooms(tmp_path)) == [550]


def test_a_group_without_a_limit_says_nothing(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("700\n")
    assert list(_rooms(tmp_path)) == []
    assert list(_rooms(tmp_path / "nowhere")) == []


def test_processes_share_the_machine():
    alone, shared = (free_memory(torch.device("cpu"), processes) for processes in (1, 4))
    assert shared == pytest.approx(alone / 4, rel=0.2)
