import numpy as np
import pytest
import scipy.stats

from gptcore.errors import SettingsError
from gptcore.evaluation import compare

random = np.random.default_rng(11)


def test_the_interval_of_the_difference_is_scipys_paired_bootstrap():
    a, b = random.normal(0.6, 0.2, 70), random.normal(0.5, 0.2, 70)
    ours = compare(a, b, seed=9)
    theirs = scipy.stats.bootstrap(
        (a, b), lambda x, y, axis=-1: x.mean(axis) - y.mean(axis), n_resamples=1000, method="percentile", paired=True,
        rng=np.random.default_rng(9),
    )  # fmt: skip
    assert ours.difference == pytest.approx(a.mean() - b.mean())
    interval = theirs.confidence_interval
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert ours.probability == pytest.approx((theirs.bootstrap_distribution > 0).mean())


def test_pairing_finds_a_small_gain_that_two_intervals_would_hide():
    hard = random.normal(0.0, 1.0, 200)
    found = compare(hard + 0.05 + random.normal(0.0, 0.02, 200), hard)
    assert found.verdict == "better"
    assert found.high - found.low < 0.02
    assert found.probability == 1.0


def test_a_model_is_no_better_than_itself():
    scores = random.uniform(size=50)
    found = compare(scores, scores)
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)
    assert (found.probability, found.better, found.verdict) == (0.5, False, "no clear difference")


def test_fewer_bits_per_byte_are_better():
    sizes = random.integers(100, 1000, 120)
    worse = sizes * random.uniform(1.4, 1.6, 120)
    found = compare(worse * 0.9, worse, sizes=sizes, higher_is_better=False)
    assert found.a == pytest.approx(0.9 * worse.sum() / sizes.sum())
    assert found.difference == pytest.approx(-0.1 * worse.sum() / sizes.sum())
    assert (found.better, found.verdict, found.probability) == (True, "better", 1.0)


def test_exchanging_the_models_exchanges_the_verdict():
    a, b = random.normal(0.7, 0.1, 90), random.normal(0.5, 0.1, 90)
    one, other = compare(a, b), compare(b, a)
    assert (one.verdict, other.verdict) == ("better", "worse")
    assert one.probability + other.probability == pytest.approx(1.0)
    assert one.low == pytest.approx(-other.high)


def test_chance_alone_gives_no_verdict_in_about_95_of_100_comparisons():
    drawn = np.random.default_rng(1)
    pairs = drawn.normal(size=(200, 2, 60))
    verdicts = [compare(a, b, resamples=300).verdict for a, b in pairs]
    assert verdicts.count("no clear difference") >= 0.89 * 200


def test_models_must_have_answered_the_same_samples():
    with pytest.raises(SettingsError, match="same samples: 3 and 2 scores"):
        compare([1, 0, 1], [1, 0])
