"""The step of alpha under ARD-LoRA's regulariser: l1 plus a total variation in time or across layers.

    minimise  g.a + price * w.|a| + price * tv * V(a) + |a - alpha|^2 / (2 step),   lo <= a <= hi

| mode | V(a) | paper |
|---|---|---|
| `temporal_sq` | 1/2 sum (a_u - alpha_u)^2, the change of this step | A8, the reading that fits Theorem III.1 |
| `temporal_abs` | sum abs(a_u - alpha_u) | |
| `layer_sq` | 1/2 sum (a_l - a_{l+1})^2 over neighbouring layers | |
| `layer_abs` | sum abs(a_l - a_{l+1}) | |
| `none` | 0 | |

`prox` solves it exactly (alpha >= 0 makes l1 linear; clipping last is exact too, but for `layer_sq`, where it ignores
that neighbours feel an active bound); `explicit` adds the gradient of V at the present alpha, where the temporal forms
look one step back: negative momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ardlora_ext._native import core
from ardlora_ext.controllers.allocate import Floats, Ints

Variation = Literal["temporal_sq", "temporal_abs", "layer_sq", "layer_abs", "none"]


def alpha_step(
    alpha: Floats,
    previous: Floats,
    grad: Floats,
    weight: Floats,
    bounds: tuple[Floats, Floats],
    step: float,
    price: float,
    tv: float,
    mode: Variation,
    explicit: bool,
    chains: Sequence[Ints],
) -> Floats:
    """Return the next alpha.

    Args:
        alpha: [n] present values.
        previous: [n] values before the last step (explicit temporal forms).
        grad: [n] slope of the task loss.
        weight: [n] weights of the l1 term.
        bounds: lowest and highest values, [n] each.
        step: step size.
        price: of the whole regulariser.
        tv: of the variation within it.
        mode: which variation.
        explicit: gradient instead of proximal form.
        chains: index lists of neighbouring layers.
    """
    strength = price * tv
    out: Floats = alpha.copy()
    if explicit or mode in ("temporal_sq", "none"):
        slope = grad + strength * _slope(alpha, previous, mode, chains) if explicit else grad
        damping = tv if mode == "temporal_sq" and not explicit else 0.0
        core.prox_step(out, slope, weight, *bounds, step, price, damping)
        return out
    moved: Floats = np.asarray(alpha - step * (grad + price * weight), dtype=np.float64)
    if mode == "temporal_abs":
        change = np.asarray(moved - alpha, dtype=np.float64)
        out = alpha + np.sign(change) * np.maximum(np.abs(change) - step * strength, 0.0)
    else:
        out = moved
        for chain in chains:
            smooth = smooth_chain if mode == "layer_sq" else flatten_chain
            out[chain] = smooth(moved[chain], step * strength)
    return np.asarray(np.clip(out, *bounds), dtype=np.float64)


def _slope(alpha: Floats, previous: Floats, mode: Variation, chains: Sequence[Ints]) -> Floats:
    """Return a (sub)gradient of V."""
    if mode.startswith("temporal"):
        change = alpha - previous
        return np.asarray(change if mode == "temporal_sq" else np.sign(change), dtype=np.float64)
    out = np.zeros_like(alpha)
    if mode == "none":
        return out
    for chain in chains:
        difference = np.diff(alpha[chain])
        pull = difference if mode == "layer_sq" else np.sign(difference)
        out[chain[:-1]] -= pull
        out[chain[1:]] += pull
    return out


def smooth_chain(z: Floats, strength: float) -> Floats:
    """Return argmin_a |a - z|^2 / 2 + strength / 2 * sum (a_l - a_{l+1})^2, a tridiagonal solve."""
    difference = np.diff(np.eye(len(z)), axis=0)
    return np.asarray(np.linalg.solve(np.eye(len(z)) + strength * difference.T @ difference, z), dtype=np.float64)


def flatten_chain(z: Floats, strength: float) -> Floats:
    """Return argmin_a |a - z|^2 / 2 + strength * sum |a_l - a_{l+1}|, exactly.

    The dual is the shortest path through a tube of radius `strength` around the running sum of z; the path is found
    by following it from each bend to the next one (the taut string).
    """
    n = len(z)
    sums = np.concatenate([[0.0], np.cumsum(z)])
    lower, upper = sums - strength, sums + strength
    lower[[0, n]] = upper[[0, n]] = sums[[0, n]]
    out = np.empty(n)
    start, height = 0, 0.0
    while start < n:
        steps = np.arange(1, n - start + 1)
        low = np.maximum.accumulate((lower[start + 1 :] - height) / steps)
        high = np.minimum.accumulate((upper[start + 1 :] - height) / steps)
        crossed = np.flatnonzero(low > high)
        if not len(crossed):
            end, slope = n, (sums[n] - height) / (n - start)
        else:
            # The bound that could still be kept up to the crossing is where the string bends.
            k = int(crossed[0])
            rising = (lower[start + 1 + k] - height) / (k + 1) > high[k - 1] if k else False
            slope = high[k - 1] if rising else low[k - 1]
            bound = upper if rising else lower
            reached = np.isclose((bound[start + 1 : start + 1 + k] - height) / steps[:k], slope, rtol=1e-12, atol=1e-14)
            end = start + 1 + int(np.flatnonzero(reached)[-1])
        out[start:end] = slope
        height += slope * (end - start)
        start = end
    return out
