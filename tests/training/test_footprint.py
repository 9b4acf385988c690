"""Memory is predicted from shapes: beside what torch counts and what the kernel measures, and turned into a micro-batch."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.config import PRESETS, ModelConfig, OptimizerConfig, TrainingConfig, preset
from gptcore.errors import TrainingError
from gptcore.model import GPT
from gptcore.model.inputs import inputs
from gptcore.model.loss import mean_loss
from gptcore.tokens.objectives import Batch, Symbols, blank, objective
from gptcore.training import budget
from gptcore.training.attempts import Recorder, note_out_of_memory
from gptcore.training.bench import GPT2_BLOCK
from gptcore.training.budget import resolve
from gptcore.training.footprint import Footprint, _Live
from gptcore.training.job import Job, Resolved, Run
from gptcore.training.journal import read_journal
from gptcore.training.loop import train
from gptcore.training.machine import _rooms, free_memory
from gptcore.training.optimizers import Optimizers
from gptcore.training.ranks import Rank

VOCABULARY = 8192
SYMBOLS = Symbols(mask=0, begin=1, end=2, pad=3, control=np.arange(4), vocabulary=VOCABULARY)
SMALL = ModelConfig(layers=3, width=64, heads=4, context=64)
TRAINING = TrainingConfig(steps=1, batch=8)


def footprint_of(shape: ModelConfig, training=TRAINING, device="cpu", dtype=torch.float32) -> Footprint:
    text = objective(shape, training.masking, SYMBOLS, 0)
    return Footprint(shape, VOCABULARY, training, partial(blank, text), device, dtype)


MEASURE = """
import sys
from pathlib import Path
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
memory = footprint.at(training.micro_batch)
model = GPT(config, vocabulary, device="cpu").initialise(0).train()
optimizers = Optimizers(model, training.optimizer)
ids = np.random.default_rng(0).integers(4, vocabulary, (training.batch, text.reads + 1))
batch = text.of_text(Excerpts(ids, 1000 * np.arange(training.batch), np.zeros(training.batch, np.int64)))
for _ in range(3):
    parts = (inputs(batch, cpu, slice(at, at + training.micro_batch)) for at in range(0, training.batch, training.micro_batch))
    update(model, mean_loss, optimizers, parts, float(batch.learned), share=1.0, clip_to=1.0)
facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
measured = int(facts["VmHWM"].split()[0]) << 10  # getrusage would tell that of whoever started this, if it is more
print(measured, memory.total, memory.total - memory.holes)
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
    measured, predicted = measured_and_predicted(shape, 8, "adamw", holes=False)
    assert predicted == pytest.approx(measured, rel=0.1)


BLOCK = ModelConfig(layers=6, width=384, heads=6, context=256)
EXTRAS = {"value_embeddings": True, "smear": True, "embedding_norm": True, "dropout": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "changes", "micro_batch", "algorithm"),
    [
        (GPT2_BLOCK, {}, 8, "adamw"),
        (GPT2_BLOCK, {"width": 768, "heads": 12, "layers": 4}, 8, "muon"),
        (BLOCK, {"context": 1024, "layers": 3}, 8, "adamw"),
        (BLOCK, {"kv_heads": 2, **EXTRAS}, 8, "adamw"),
        (BLOCK, {"objective": "masked", "document_mask": True, "context": 512}, 8, "adamw"),
        (BLOCK, {"objective": "prefix", "document_mask": True, **EXTRAS}, 8, "muon"),
    ],
)
def test_a_training_whose_activations_dominate_takes_what_was_predicted(shape, changes, micro_batch, algorithm):
    for holes, within in ((False, 0.05), (True, 0.25)):  # holes are the allocator's: no two runs have the same
        measured, predicted = measured_and_predicted(shape.model_copy(update=changes), micro_batch, algorithm, holes=holes)
        assert predicted == pytest.approx(measured, rel=within)


LAYOUTS = [
    {},
    {"objective": "masked"},
    {"objective": "masked", "document_mask": True},
    {"objective": "prefix", "kv_heads": 2},
    {"document_mask": True},
    {"kv_heads": 2, **EXTRAS},
    {"norm": "layer", "activation": "gelu_tanh", "positions": "learned", "biases": True, "tied": False},
    {"windows": (None, 8), "residual": "parallel", "rotary_share": 0.5},
    {"objective": "masked", "residual": "post", "norm": "layer", "segments": 2, "embedding_norm": True, "head_transform": True},
]


@pytest.mark.parametrize("changes", LAYOUTS, ids=str)
def test_shapes_hold_the_bytes_that_numbers_hold_on_a_cpu(changes):
    shape = SMALL.model_copy(update=changes)
    footprint = footprint_of(shape)
    model = GPT(shape, VOCABULARY, device="cpu").initialise(0).train()
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    batch = footprint.batch_of(4)
    learned = Batch(batch.tokens, batch.tokens, batch.places, batch.spans, batch.parts, batch.exposed)
    with _Live(model.parameters()) as live:
        tokens, labels, layout = inputs(learned, torch.device("cpu"))
        mean_loss(model, tokens, labels, 1.0, layout).backward()
        live.mark()
    assert max(footprint._counted(3, 4)) == pytest.approx(live.peaks[0], rel=0.001)


def test_where_backward_begins_there_is_what_autograd_saves():
    model, saved = GPT(SMALL, VOCABULARY, device="cpu").initialise(0), {}
    tokens = torch.zeros(4, SMALL.context, dtype=torch.long, device="cpu")
    keep = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mean_loss(model, tokens, tokens, 1.0)
    activations = sum(storage.nbytes() for place, storage in saved.items() if place not in keep)
    assert footprint_of(SMALL)._counted(3, 4)[2] == pytest.approx(activations, rel=0.001)


@pytest.mark.parametrize("algorithm", ["muon", "adamw", "adam", "sgd"])
def test_what_stays_is_what_the_optimizer_has(algorithm):
    training = TRAINING.model_copy(update={"optimizer": OptimizerConfig(algorithm=algorithm), "ema": 0.9})
    model = GPT(SMALL, VOCABULARY, device="cpu").initialise(0)
    optimizers = Optimizers(model, training.optimizer)
    tokens = torch.zeros(1, 8, dtype=torch.long, device="cpu")
    model(tokens).sum().backward()
    optimizers.step(1.0)
    weights = sum(weight.nbytes for weight in model.parameters())
    state = sum(entry.nbytes for entry in optimizers.state().values() if entry.dim())
    assert footprint_of(SMALL, training).at(1).kept == 2 * weights + state


@settings(max_examples=10)
@given(st.integers(1, 12), st.integers(0, 400))
def test_the_largest_micro_batch_fits_and_one_more_does_not(rows, megabytes):
    footprint, there = footprint_of(SMALL, TRAINING.model_copy(update={"batch": 16})), megabytes << 20
    found = footprint.largest(rows, there)
    assert 0 <= found <= rows
    assert found == 0 or footprint.at(found).training <= there
    assert found == rows or footprint.at(found + 1).training > there


def test_every_shape_is_counted_in_about_a_second():
    footprint_of(SMALL)  # torch imports what it needs for shapes
    for name in PRESETS:
        started = time.process_time()
        memory = footprint_of(preset(name), device="cuda", dtype=torch.bfloat16).at(4)
        assert time.process_time() - started < 3, name
        assert memory.kept < memory.total < 4 << 40  # the largest is GPT-3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("changes", [{}, {"objective": "prefix", "smear": True}], ids=str)
def test_few_sequences_and_blocks_tell_of_many(changes, device):
    shape = ModelConfig(layers=6, width=128, heads=4, context=128, **changes)
    few = footprint_of(shape, device=device, dtype=torch.bfloat16)
    many = few._counted(6, 3 * few._even)
    assert max(few._peaks(6, 3 * few._even)) == pytest.approx(max(many), rel=0.02)


def test_where_attention_is_fused_no_matrix_of_scores_is_kept():
    def saved(device: str, **changes) -> int:
        shape = SMALL.model_copy(update={"context": 512, **changes})
        return footprint_of(shape, device=device, dtype=torch.bfloat16)._counted(3, 2)[2]

    scores = 0.9 * 2 * SMALL.layers * SMALL.heads * 512 * 512 * 2  # rows, layers, heads, places, bytes; a kernel keeps a little
    assert saved("cpu") - saved("cuda") > scores, "few tokens on a CPU go without"
    assert saved("cuda", kv_heads=2, document_mask=True) - saved("cuda", document_mask=True) > scores, (
        "as do groups with a mask"
    )
    assert saved("cuda", kv_heads=2) < saved("cuda")


def test_several_processes_need_room_for_the_gradients_that_they_exchange():
    shape = ModelConfig(layers=8, width=512, heads=2, context=8)  # many weights, and next to no activations
    training = TRAINING.model_copy(update={"processes": 2, "optimizer": OptimizerConfig(algorithm="sgd")})
    gradients = [torch.empty_like(weight) for weight in GPT(shape, 300, device="meta").parameters()]
    in_all = sum(gradient.nbytes for gradient in gradients)
    bucket = replace(footprint_of(shape, training), vocabulary=300).at(1).moment - in_all
    assert max(gradient.nbytes for gradient in gradients) <= bucket <= 32 << 20 < in_all


class Rows:
    """Batches of which only the shapes are asked."""

    tokens_per_step = 512.0

    def __init__(self, length: int) -> None:
        self.length = length

    def longest(self, rows: int) -> Batch:
        tokens = np.zeros((rows, self.length), np.int64)
        return Batch(tokens, tokens)


def answers(monkeypatch, free: int, length: int = 256, **changes) -> Resolved:
    """What is resolved where so many bytes are free."""
    monkeypatch.setattr(budget, "free_memory", lambda device, processes: free)
    training = TrainingConfig(**{"steps": 1, "batch": 64, "device": "cpu", **changes})
    job = Job(model=SMALL.model_copy(update={"context": 256}), training=training, shards="", shards_digest="", tokenizer="")
    return resolve(job, VOCABULARY, Rows(length))


def test_the_micro_batch_is_what_fits(monkeypatch):
    plenty, little = 64 << 30, 100 << 20
    assert answers(monkeypatch, plenty).micro_batch == 32, "8,192 tokens"
    assert answers(monkeypatch, plenty, length=128).micro_batch == 64, "rows of a task may be shorter than the context"
    assert answers(monkeypatch, plenty, batch=4).micro_batch == 4
    found = answers(monkeypatch, little)
    assert 1 <= found.micro_batch < 32
    assert found.memory_mb is not None
    assert found.memory_mb < 340 + 100, "the process itself is there already"
    assert answers(monkeypatch, 1 << 20, micro_batch=7).micro_batch == 7, "whoever asks for one gets it"
    with pytest.raises(TrainingError, match=r"takes [\d.]+ MB of memory .* lower model.context"):
        answers(monkeypatch, 1 << 20)


def test_halving_begins_at_what_was_predicted_and_both_are_told(tiny, tmp_path):
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    settings = tiny.training(steps=4, evaluations=1)
    shards, tokenizer = str(tiny.shards), str(tiny.tokenizer / "tokenizer")
    run.write(Job(model=tiny.model(), training=settings, shards=shards, shards_digest="shards", tokenizer=tokenizer))
    with Recorder(run.attempts) as recorder:
        assert not train(run, Rank(), lambda: True, recorder)
    before = run.resolved()
    note_out_of_memory(run.attempts)
    with Recorder(run.attempts) as recorder:
        assert train(run, Rank(), lambda: False, recorder)
    after, told = run.resolved(), {line.get("event"): line.get("text") for line in read_journal(run.journal)}
    assert after.micro_batch == before.micro_batch // 2
    assert after.memory_mb < before.memory_mb
    assert f"about {before.memory_mb} MB with {before.micro_batch} sequences at a time" in told["resolved"]
    assert f"memory ran out with {before.micro_batch} sequences at a time" in told["memory"]


@pytest.mark.parametrize(
    ("groups", "folder", "names", "prefix"),
    [
        ("0::/a/b\n", "a/b", ("memory.max", "memory.current"), ""),
        ("0::/a/b\n", "a", ("memory.max", "memory.current"), ""),
        ("9:cpu:/x\n4:memory:/a\n0::/\n", "memory/a", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"),
        ("4:memory:/of/the/host\n", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"),
    ],
)
def test_the_limit_of_a_container_is_kept_and_page_cache_is_free(tmp_path, groups, folder, names, prefix):
    stat = f"{prefix}inactive_file 200\nanon 400\n{prefix}active_file 50\n"
    files = {names[0]: "1000\n", names[1]: "700\n", "memory.stat": stat}
    write(tmp_path, {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{folder}/{name}": text for name, text in files.items()}})
    assert list(_rooms(tmp_path)) == [550]


def test_a_group_without_a_limit_says_nothing(tmp_path):
    group = "sys/fs/cgroup"
    write(tmp_path, {"proc/self/cgroup": "0::/\n", f"{group}/memory.max": "max\n", f"{group}/memory.current": "700\n"})
    assert list(_rooms(tmp_path)) == []
    assert list(_rooms(tmp_path / "nowhere")) == []


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_processes_share_the_machine():
    alone, shared = (free_memory(torch.device("cpu"), processes) for processes in (1, 4))
    assert shared == pytest.approx(alone / 4, rel=0.2)
