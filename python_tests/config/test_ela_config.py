"""What ElaConfig refuses."""

from __future__ import annotations

from typing import Any

import pytest

import ardlora_ext as ard


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 30, "tinit": 15, "tfinal": 10}, r"total_steps must be >= tinit \+ tfinal \+ 11 = 36, got 30"),
        ({"r": 0}, "r must be >= 1"),
        ({"b": 0}, "b must be >= 1"),
        ({"deltaT": 0}, "deltaT must be >= 1"),
        ({"beta1": 1.0}, r"beta1 must be in \(0, 1\)"),
        ({"tinit": -1}, "tinit must be >= 0"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight must be >= 0"),
        ({"mode": "fast"}, "mode must be one of 'paper', 'code'"),
        ({"r_max": 2}, "r_max must be >= r"),
        ({"target_r": 0}, "target_r must be >= 1, got 0"),
        ({"capacity": "fixed"}, "r_max must be given with capacity='fixed'"),
        ({"granularity": "head"}, "head' with factoring='independent'"),
        ({"granularity": "layer"}, "granularity must be"),
    ],
)
def test_bad_configs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ard.ElaConfig(**options)
