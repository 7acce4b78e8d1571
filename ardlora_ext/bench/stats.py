"""Statistics of paired runs: bootstrap intervals, median and spread, geometric mean, rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; the ends are NaN for a single value."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval tells the mean from zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:+.3g} (one run)"
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


def bootstrap(values: Sequence[float], level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of `values` with its percentile bootstrap interval; the same values give the same interval.

    For a paired comparison pass the differences by seed. With fewer than about ten values such an interval is somewhat
    too narrow.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data) or not np.isfinite(data).all():
        raise ValueError(f"bootstrap: values must be finite numbers, at least one, got {list(values)}")
    mean = float(data.mean())
    if len(data) == 1:
        return Interval(mean, math.nan, math.nan)
    picks = np.random.default_rng(seed).integers(len(data), size=(draws, len(data)))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(data[picks].mean(axis=1), [tail, 1.0 - tail])
    return Interval(mean, float(low), float(high))


def paired(ours: Sequence[float], theirs: Sequence[float], level: float = 0.95) -> Interval:
    """Return the interval of ours - theirs, run by run.

    Raises:
        ValueError: the two do not have one value per common run.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"paired: both sides must have one value per seed, got {len(ours)} and {len(theirs)}")
    return bootstrap([a - b for a, b in zip(ours, theirs, strict=True)], level)


def median_spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the 10 % and 90 % quantiles."""
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), [0.1, 0.5, 0.9])
    return float(middle), float(low), float(high)


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive values, the mean to use for ratios.

    Raises:
        ValueError: no values, or one that is not positive.
    """
    if not values or min(values) <= 0:
        raise ValueError(f"geometric_mean: values must be positive, at least one, got {list(values)}")
    return math.exp(sum(map(math.log, values)) / len(values))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation, ties with their mean rank; NaN when one side is constant."""
    x, y = _mean_ranks(a), _mean_ranks(b)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _mean_ranks(values: Sequence[float]) -> Floats:
    _, inverse, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2.0)[inverse.ravel()]
    return ranks
