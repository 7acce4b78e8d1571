"""The statistics of the benches."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ardlora_ext.bench import stats


def test_bootstrap_interval_holds_the_mean_and_is_repeatable() -> None:
    values = [1.0, 2.0, 4.0, 3.0]
    found = stats.bootstrap(values)
    assert found.low < found.mean == 2.5 < found.high
    assert found == stats.bootstrap(values)
    assert found.excludes_zero
    assert not stats.bootstrap([-1.0, 1.0, 0.5]).excludes_zero
    same = stats.bootstrap([2.0] * 5)
    assert (same.low, same.high) == (2.0, 2.0)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    found = [stats.bootstrap(generator.normal(size=20).tolist(), draws=500) for _ in range(300)]
    assert 0.87 < np.mean([i.low <= 0.0 <= i.high for i in found]) < 0.98


def test_one_value_has_no_interval() -> None:
    found = stats.bootstrap([1.5])
    assert math.isnan(found.low)
    assert not found.excludes_zero
    assert "one run" in str(found)


def test_statistics_refuse_what_they_cannot_judge() -> None:
    with pytest.raises(ValueError, match="finite"):
        stats.bootstrap([1.0, math.nan])
    with pytest.raises(ValueError, match="at least one"):
        stats.bootstrap([])
    with pytest.raises(ValueError, match="one value per seed, got 2 and 1"):
        stats.paired([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="positive"):
        stats.geometric_mean([1.0, 0.0])


def test_small_statistics() -> None:
    assert stats.paired([3.0, 5.0], [1.0, 3.0]).mean == 2.0
    assert stats.geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4.0)
    assert stats.median_spread(list(range(11))) == pytest.approx((5.0, 1.0, 9.0))
    assert stats.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert math.isnan(stats.spearman([1, 1], [1, 2]))
