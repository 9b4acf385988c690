"""Schedule, journal, optimizers and batches, each alone."""

import itertools
import json
import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcore.config import ModelConfig, OptimizerConfig
from gptcore.model import GPT
from gptcore.training.budget import decide_compile, pays, steps_in
from gptcore.training.journal import Follower, Journal, cut_back, read_journal
from gptcore.training.muon import Muon, orthogonal
from gptcore.training.optimizers import Optimizers, clip
from gptcore.training.schedule import rate_at


@given(st.integers(1, 500), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["wsd", "cosine", "linear"]))
def test_the_rate_rises_stays_and_falls_within_its_bounds(steps, warmup, decay, schedule):
    config = OptimizerConfig(schedule=schedule, warmup=warmup, decay=decay, final_rate=0.1)
    rates = [rate_at(step, steps, config) for step in range(steps)]
    assert all(0.0 < rate <= 1.0 for rate in rates)
    turns = [b - a for a, b in itertools.pairwise(rates)]
    fallen = [index for index, turn in enumerate(turns) if turn < -1e-9]
    assert all(turn <= 1e-9 for turn in turns[fallen[0] :]) if fallen else True


def test_the_rate_of_a_worked_example():
    config = OptimizerConfig(warmup=0.2, decay=0.5)
    assert [round(rate_at(step, 10, config), 3) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]


def test_cosine_and_linear_go_down_all_the_way():
    cosine, linear = (OptimizerConfig(schedule=name, warmup=0.0, final_rate=0.1) for name in ("cosine", "linear"))
    assert [round(rate_at(step, 4, linear), 4) for step in range(4)] == [1, 0.775, 0.55, 0.325]
    expected = [round(0.1 + 0.9 * (1 + math.cos(math.pi * step / 4)) / 2, 4) for step in range(4)]
    assert [round(rate_at(step, 4, cosine), 4) for step in range(4)] == expected


def test_a_journal_is_followed_while_it_grows_and_cut_back_on_resume(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal, follower = Journal(path), Follower(path)
    journal.metrics(1, {"train/loss": 2.0})
    journal.event(1, "checkpoint", "saved step 1")
    assert [line["step"] for line in follower.lines()] == [1, 1]
    journal.metrics(2, {"train/loss": 1.0})
    journal.metrics(3, {"train/loss": 0.5})
    with path.open("a") as file:
        file.write('{"t": 1, "step": 4, "ki')  # a kill while writing
    assert [line["step"] for line in follower.lines()] == [2, 3]
    assert cut_back(path, 2) == 1
    assert [line["step"] for line in read_journal(path)] == [1, 1, 2]
    assert json.loads((tmp_path / "journal.tail-0.jsonl").read_text())["step"] == 3
    journal.reopen()
    time.sleep(0.005)  # the journal's clock has milliseconds
    journal.event(2, "resumed", "continues")
    journal.metrics(3, {"train/loss": 0.4})
    late = Follower(path, since=time.time() + 60)
    assert [(line["step"], line.get("event")) for line in follower.lines()] == [(2, "resumed"), (3, None)]
    assert list(late.lines()) == []
    assert [line["step"] for line in read_journal(path)] == [1, 1, 2, 2, 3]


def test_matrices_of_blocks_go_to_muon_and_everything_else_to_adamw():
    model = GPT(ModelConfig(layers=1, width=16, heads=2, context=8), 30).initialise(0)
    optimizers = Optimizers(model, OptimizerConfig())
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizers.step(1.0)
    kinds = {}
    for name in optimizers.state():
        kind, weight, _ = name.split("/")
        kinds[weight] = kind
    assert len(kinds) == len(list(model.parameters()))
    for name, weight in model.named_parameters():
        assert kinds[name] == ("muon" if name.startswith("blocks") and weight.dim() == 2 else "adamw")


def test_adamw_adam_and_sgd_are_those_of_torch():
    shape = ModelConfig(layers=1, width=16, heads=2, context=8)
    tokens = torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(0))
    decays = {"weight_decay": 0.3}
    references = {
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-10),
        "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-10),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.95, nesterov=True),
    }
    for algorithm, reference in references.items():
        ours, theirs = GPT(shape, 30).initialise(0), GPT(shape, 30).initialise(0)
        optimizers = Optimizers(
            ours, OptimizerConfig(algorithm=algorithm, rate=0.01, betas=(0.9, 0.95), table_decay=0.1, **decays)
        )
        groups = [
            {"params": [w for n, w in theirs.named_parameters() if n.startswith("blocks") and w.dim() == 2], **decays},
            {"params": [theirs.embedding.weight], "weight_decay": 0.1},
            {"params": [w for w in theirs.parameters() if w.dim() == 1], "weight_decay": 0.0},
        ]
        other = reference(groups)
        for _ in range(3):
            ours(tokens).square().mean().backward()
            optimizers.step(1.0)
            other.zero_grad()
            theirs(tokens).square().mean().backward()
            other.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_muon_is_that_of_torch_in_the_precision_of_the_model():
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (16, 24), (16, 16), (16, 24)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    first = Muon(ours, lr=0.1, weight_decay=0.2, momentum=0.9, dtype=torch.float32)
    second = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, momentum=0.9, adjust_lr_fn="original")
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        first.step()
        second.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=5e-3, rtol=0)  # torch's iteration is bfloat16


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_the_update_is_nearly_orthogonal_and_each_matrix_is_for_itself(count, rows, columns, seed):
    matrices = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = orthogonal(matrices)
    for matrix, update in zip(matrices, found, strict=True):
        torch.testing.assert_close(orthogonal(matrix[None])[0], update)
        values = torch.linalg.svdvals(matrix)
        large = values > 0.05 * values.max()  # the smallest ones need more than five iterations
        turned = torch.linalg.svd(matrix, full_matrices=False)
        diagonal = (turned.U.mT @ update @ turned.Vh.mT).diagonal()
        assert ((diagonal[large] > 0.6) & (diagonal[large] < 1.3)).all()


def test_l1_and_l2_are_terms_of_the_loss():
    shape = ModelConfig(layers=1, width=16, heads=2, context=8)
    config = OptimizerConfig(algorithm="sgd", rate=0.1, momentum=0.0, weight_decay=0.0, l1=0.03, l2=0.2)
    ours, theirs = GPT(shape, 30).initialise(0), GPT(shape, 30).initialise(0)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    ours(tokens).square().mean().backward()
    Optimizers(ours, config).step(1.0)
    tables = [weight for weight in theirs.parameters() if weight.dim() == 2]
    penalty = sum(0.03 * weight.abs().sum() + 0.2 * weight.square().sum() / 2 for weight in tables)
    (theirs(tokens).square().mean() + penalty).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b - 0.1 * b.grad)


@pytest.mark.parametrize("algorithm", ["muon", "adamw", "adam", "sgd"])
def test_optimizer_state_survives_a_round_trip(algorithm):
    chosen = OptimizerConfig(algorithm=algorithm)
    config = ModelConfig(layers=1, width=16, heads=2, context=8)

    def step(model, optimizers, seed):
        torch.manual_seed(seed)
        model(torch.randint(30, (2, 8))).square().mean().backward()
        clip(model, 1.0)
        optimizers.step(1.0)

    straight = GPT(config, 30).initialise(0)
    first = Optimizers(straight, chosen)
    step(straight, first, 1)
    resumed = GPT(config, 30)
    resumed.load_state_dict(straight.state_dict())
    second = Optimizers(resumed, chosen)
    second.load({name: value.clone() for name, value in first.state().items()})
    step(straight, first, 2)
    step(resumed, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_compiling_is_tried_in_a_long_run_and_kept_only_where_it_is_faster():
    assert decide_compile("auto", "cpu", 60.0)[0] is False
    assert decide_compile("auto", "cpu", 3600.0)[0] is True
    assert decide_compile(False, "cpu", 3600.0) == (False, "not asked for")
    assert pays(eager=0.100, compiled=0.080) == (True, "compiled, 1.25 times as fast as eager")
    assert pays(eager=0.100, compiled=0.099)[0] is False


@given(st.floats(1, 1e5), st.floats(1e-3, 10), st.floats(1e-3, 100), st.integers(1, 50))
def test_a_budget_in_minutes_is_kept_by_steps_and_evaluations_together(seconds, step, evaluation, evaluations):
    steps, affordable = steps_in(seconds, step, evaluation, evaluations)
    assert steps >= 1
    assert 1 <= affordable <= evaluations
    if steps > 1:
        assert steps * step + affordable * evaluation <= seconds * 1.000001
