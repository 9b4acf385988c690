"""Which of two models is better, and how sure that is: the paired bootstrap (Koehn 2004) on the same samples."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from gptcore.errors import SettingsError
from gptcore.evaluation.intervals import Interval, Statistic, bootstrap_values, mean_of, percentiles, ratio_of

Verdict = Literal["better", "worse", "no clear difference"]


@dataclass(frozen=True)
class Comparison:
    """Model `a` against model `b` on the same samples."""

    a: float
    """The number of model a."""
    b: float
    """The number of model b."""
    difference: float
    """a - b, in the metric's own unit and direction."""
    low: float
    """Lower bound of the difference's 95 % interval."""
    high: float
    """Upper bound of the difference's 95 % interval."""
    probability: float
    """Share of the resamples in which a is better; a tie counts half."""
    better: bool
    """Whether the number of a is better than that of b, be it by chance or not."""
    verdict: Verdict
    """What the interval allows to say about a: `better` or `worse` only when it does not hold zero."""
    samples: int
    """How many samples both models answered."""


def compare(
    a: ArrayLike,
    b: ArrayLike,
    *,
    sizes: ArrayLike | None = None,
    higher_is_better: bool = True,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compare two models by their scores on the same samples, one number per sample and in the same order.

    The number of a model is the mean of its scores; with `sizes`, as in bits per byte, it is sum(scores) / sum(sizes).
    Raises `SettingsError` unless both models have a score for every sample.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise SettingsError(
            f"compare needs both models' scores on the same samples: {first.size} and {second.size} scores were given"
        )
    of_a, of_b = (mean_of(scores) if sizes is None else ratio_of(scores, sizes) for scores in (first, second))
    return compare_statistics(of_a, of_b, len(first), higher_is_better=higher_is_better, resamples=resamples, seed=seed)


def compare_statistics(
    a: Statistic, b: Statistic, rows: int, *, higher_is_better: bool = True, resamples: int = 1000, seed: int = 0
) -> Comparison:
    """Compare two models by any statistic over the same rows, for example macro-F1."""
    everything = np.arange(rows, dtype=np.int64)[None]
    value_a, value_b = float(a(everything)[0]), float(b(everything)[0])
    drawn = bootstrap_values(lambda lines: a(lines) - b(lines), rows, resamples=resamples, seed=seed)
    interval = percentiles(value_a - value_b, drawn)
    gains = drawn if higher_is_better else -drawn
    return Comparison(
        a=value_a,
        b=value_b,
        difference=interval.value,
        low=interval.low,
        high=interval.high,
        probability=float((gains > 0).mean() + (gains == 0).mean() / 2),
        better=value_a > value_b if higher_is_better else value_a < value_b,
        verdict=verdict(interval, higher_is_better=higher_is_better),
        samples=rows,
    )


def verdict(difference: Interval, *, higher_is_better: bool) -> Verdict:
    """What the interval of a difference (ours minus theirs) allows to say about ours."""
    if difference.low <= 0.0 <= difference.high:
        return "no clear difference"
    return "better" if (difference.low > 0.0) == higher_is_better else "worse"
