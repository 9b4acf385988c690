"""How sure a number is: 95 % percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13).

The rows of a test set (documents, or rows of a task) are drawn with replacement many times; the statistic of every
draw is computed; the middle 95 % of these values is the interval. Equal seeds draw equal rows, so that two numbers
about the same rows are paired.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptcore.errors import SettingsError

LEVEL = 0.95
_BLOCK = 2**21
"""Rows drawn at once; bounds the memory to a few tens of megabytes."""

Rows = NDArray[np.int64]
Values = NDArray[np.float64]
Statistic = Callable[[Rows], Values]
"""Row numbers (B, N) -> B values, one per line."""


@dataclass(frozen=True)
class Interval:
    """A measured value and the bounds between which 95 % of its bootstrap resamples lie."""

    value: float
    low: float
    high: float

    def transformed(self, function: Callable[[float], float]) -> "Interval":
        """The interval of an increasing function of the value, for example of perplexity from bits per token."""
        return Interval(function(self.value), function(self.low), function(self.high))

    def as_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


def resample(rows: int, resamples: int = 1000, seed: int = 0) -> Iterator[Rows]:
    """Draw `resamples` lines of `rows` row numbers with replacement, in blocks (B, rows)."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // rows)
    for start in range(0, resamples, block):
        yield generator.integers(0, rows, (min(block, resamples - start), rows))


def bootstrap(statistic: Statistic, rows: int, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """The value of `statistic` over all rows and its 95 % percentile interval."""
    assert rows > 0, "a statistic needs at least one row"
    value = float(statistic(np.arange(rows, dtype=np.int64)[None])[0])
    return percentiles(value, bootstrap_values(statistic, rows, resamples=resamples, seed=seed))


def bootstrap_values(statistic: Statistic, rows: int, *, resamples: int = 1000, seed: int = 0) -> Values:
    """The statistic of every resample (resamples,)."""
    return np.concatenate([statistic(block) for block in resample(rows, resamples, seed)])


def percentiles(value: float, drawn: Values) -> Interval:
    """A value and the middle 95 % of its bootstrap values."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def mean_interval(values: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """The mean of one value per row."""
    return bootstrap(mean_of(values), len(np.asarray(values)), resamples=resamples, seed=seed)


def ratio_interval(sums: ArrayLike, sizes: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """The ratio of two sums over rows, as in bits per byte over documents: sum(bits) / sum(bytes)."""
    return bootstrap(ratio_of(sums, sizes), len(np.asarray(sums)), resamples=resamples, seed=seed)


def mean_of(values: ArrayLike) -> Statistic:
    """The statistic behind `mean_interval`."""
    array = _column(values)
    return lambda rows: array[rows].mean(axis=1)


def ratio_of(sums: ArrayLike, sizes: ArrayLike) -> Statistic:
    """The statistic behind `ratio_interval`. `sizes` are positive."""
    above, below = _column(sums), _column(sizes)
    if above.shape != below.shape:
        raise SettingsError(f"a ratio needs one size per sum: {len(above)} sums and {len(below)} sizes were given")
    return lambda rows: above[rows].sum(axis=1) / below[rows].sum(axis=1)


def macro_f1_of(targets: ArrayLike, outputs: ArrayLike, labels: int) -> Statistic:
    """Macro-F1 of integer labels 0 … labels-1: the mean F1 of those that are a target of any row.

    F1 of a label is 2·TP / (2·TP + FP + FN) = 2·TP / (times it is the target + times it is the output). A draw in which a
    rare label is neither is the mean of the others.
    """
    target, output = np.asarray(targets, dtype=np.int64), np.asarray(outputs, dtype=np.int64)
    counted = np.bincount(target, minlength=labels) > 0

    def statistic(rows: Rows) -> Values:
        lines = np.arange(len(rows), dtype=np.int64)[:, None] * labels

        def count(places: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.bincount(places.ravel(), minlength=len(rows) * labels).reshape(len(rows), labels)[:, counted]

        hit = (lines + target[rows])[target[rows] == output[rows]]
        both, either = count(hit), count(lines + target[rows]) + count(lines + output[rows])
        scores: Values = (2 * both / np.maximum(either, 1)).sum(axis=1) / (either > 0).sum(axis=1)
        return scores

    return statistic


def _column(values: ArrayLike) -> Values:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise SettingsError("an interval needs one finite number per sample and at least one sample")
    return array
