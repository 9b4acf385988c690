import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from gptcore.downstream import classify
from gptcore.errors import SettingsError
from gptcore.evaluation.intervals import (
    bootstrap,
    bootstrap_values,
    macro_f1_of,
    mean_interval,
    mean_of,
    ratio_interval,
    resample,
)

random = np.random.default_rng(7)


def scipy_interval(data, statistic, seed):
    found = scipy.stats.bootstrap(
        data, statistic, n_resamples=1000, method="percentile", paired=True, rng=np.random.default_rng(seed)
    )
    return found.confidence_interval


def test_the_interval_of_a_mean_is_scipys():
    values = random.gamma(2.0, size=83)
    ours, theirs = mean_interval(values, seed=3), scipy_interval((values,), np.mean, seed=3)
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_the_interval_of_bits_per_byte_is_scipys_for_a_ratio_of_sums():
    sizes = random.integers(50, 4000, 61)
    bits = sizes * random.uniform(0.8, 2.5, 61)
    ours = ratio_interval(bits, sizes, seed=5)
    theirs = scipy_interval((bits, sizes), lambda b, s, axis=-1: b.sum(axis) / s.sum(axis), seed=5)
    assert ours.value == pytest.approx(bits.sum() / sizes.sum())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_the_interval_of_a_share_is_that_of_the_normal_approximation():
    right = np.zeros(2000)
    right[:700] = 1.0
    ours = mean_interval(right, resamples=4000)
    half = 1.96 * np.sqrt(0.35 * 0.65 / 2000)
    assert (ours.low, ours.high) == pytest.approx((0.35 - half, 0.35 + half), abs=0.002)


def test_about_95_of_100_intervals_hold_the_true_mean():
    drawn = np.random.default_rng(0)
    intervals = [mean_interval(drawn.normal(1.0, 2.0, 80), resamples=400, seed=n) for n in range(300)]
    held = np.mean([interval.low <= 1.0 <= interval.high for interval in intervals])
    assert 0.90 <= held <= 0.98


def test_equal_seeds_give_equal_intervals_and_other_seeds_others():
    values = random.normal(size=40)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_large_test_sets_are_drawn_in_blocks_of_bounded_memory():
    blocks = list(resample(1_000_000, resamples=5))
    assert [block.shape for block in blocks] == [(2, 1_000_000), (2, 1_000_000), (1, 1_000_000)]


def test_blocks_do_not_change_the_drawn_rows(monkeypatch):
    whole = np.concatenate(list(resample(90, resamples=50, seed=4)))
    monkeypatch.setattr("gptcore.evaluation.intervals._BLOCK", 300)
    assert np.array_equal(whole, np.concatenate(list(resample(90, resamples=50, seed=4))))


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_macro_f1_of_every_draw_is_scikit_learns(labels):
    true, answered = random.integers(0, labels, 60), random.integers(0, labels, 60)
    values = bootstrap_values(macro_f1_of(true, answered, labels), 60, resamples=25, seed=2)
    draws = np.concatenate(list(resample(60, 25, 2)))
    expected = [f1_score(true[rows], answered[rows], average="macro", zero_division=0.0) for rows in draws]
    assert values == pytest.approx(expected)


def test_macro_f1_is_the_tasks_own_over_the_labels_of_the_test_set():
    true, answered = [0, 0, 1, 1, 1, 4], [0, 1, 1, 2, 3, 3]
    expected = classify.macro_f1(list(map(str, answered)), list(map(str, true)), ["0", "1", "4"])
    assert bootstrap(macro_f1_of(true, answered, 5), 6).value == pytest.approx(expected)


def test_one_row_has_an_interval_without_width():
    assert mean_interval([2.5]).as_dict() == {"value": 2.5, "low": 2.5, "high": 2.5}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0.1, 10.0), st.floats(-100.0, 100.0))
def test_an_interval_moves_and_stretches_with_its_values(values, factor, shift):
    plain = mean_interval(values, resamples=50)
    moved = mean_interval(np.array(values) * factor + shift, resamples=50)
    scale = 1.0 + max(map(abs, values)) * factor + abs(shift)
    assert moved.low == pytest.approx(plain.low * factor + shift, abs=1e-9 * scale)
    assert moved.high == pytest.approx(plain.high * factor + shift, abs=1e-9 * scale)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30))
def test_bounds_lie_in_order_and_within_the_values(values):
    interval = bootstrap(mean_of(values), len(values), resamples=60)
    assert min(values) - 1e-12 <= interval.low <= interval.high <= max(values) + 1e-12


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0], [2.0]]])
def test_scores_that_are_no_numbers_are_refused(values):
    with pytest.raises(SettingsError, match="one finite number per sample"):
        mean_of(values)


def test_a_ratio_wants_one_size_per_sum():
    with pytest.raises(SettingsError, match="2 sums and 1 sizes"):
        ratio_interval([1.0, 2.0], [1.0])
