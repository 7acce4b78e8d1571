"""The step of alpha under ARD-LoRA's regulariser: l1 plus a total variation in time or across layers.

    minimise  g.a + price * w.|a| + price * tv * V(a) + |a - alpha|^2 / (2 step),   lo <= a <= hi

| mode | V(a) | paper |
|---|---|---|
| `temporal_sq` | 1/2 sum (a_u - alpha_u)^2, the change of this step | A8, the reading that fits Theorem III.1 |
| `temporal_abs` | sum abs(a_u - alpha_u) | |
| `layer_sq` | 1/2 sum (a_l - a_{l+1})^2 over neighbouring layers | |
| `layer_abs` | sum abs(a_l - a_{l+1}) | |
| `none` | 0 | |

`prox` solves it exactly (alpha >= 0 makes l1 linear; without neighbours clipping last is exact, with them see
`solve_chain`); `explicit` adds the gradient of V at the present alpha, where the temporal forms look one step back:
negative momentum.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ardlora_ext.native.compiled import core
from ardlora_ext.ranks.controllers.costs import Floats, Ints
from ardlora_ext.ranks.controllers.units import Units

Variation = Literal["temporal_sq", "temporal_abs", "layer_sq", "layer_abs", "none"]


def layer_key(name: str) -> str:
    """Return what names the transformer layer of a module: the path up to its first number."""
    found = re.match(r"(.*?\.)?\d+(?=\.|$)", name)
    return found.group(0) if found else name.rpartition(".")[0]


def layer_chains(units: Units, group: Ints, whole_layers: bool) -> list[Ints]:
    """Return the groups that follow each other through the layers: same kind of matrix, same head.

    Args:
        units: of the model.
        group: [units] the group of each.
        whole_layers: a group is a layer, and all of them are one chain.
    """
    found: dict[tuple[str, int], list[int]] = {}
    for u, m in enumerate(units.module_of):
        kind = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\.)\d+$", "*", units.names[m])
        key = ("layer", 0) if whole_layers else (kind, int(u - units.first[m]))
        chain = found.setdefault(key, [])
        if group[u] not in chain:
            chain.append(int(group[u]))
    return [np.array(chain, dtype=np.int64) for chain in found.values() if len(chain) > 1]


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
            low, high = bounds[0][chain], bounds[1][chain]
            out[chain] = solve_chain(moved[chain], low, high, step * strength, mode == "layer_sq")
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


def solve_chain(z: Floats, low: Floats, high: Floats, strength: float, square: bool) -> Floats:
    """Return argmin_a |a - z|^2 / 2 + strength * sum v(a_l - a_{l+1}), low <= a <= high, exactly.

    v(d) = d^2 / 2 or |d|. Dynamic programming (Johnson 2013, for |d|): f_l(x) is the least cost of the first l entries
    with a_l = x. Its derivative is a rising polyline, which every step maps to another: with the penalty, slopes are
    bounded by the strength (square) or values are (abs); a bound cuts it off; the distance to z adds a line.

    Args:
        z: [n], at least one.
        low: [n] lowest values.
        high: [n] highest values, at least the lowest.
        strength: >= 0.
        square: which v.
    """
    if strength == 0.0:
        return np.asarray(np.clip(z, low, high), dtype=np.float64)
    lines: list[tuple[Floats, Floats]] = []
    for entry, (a, b) in enumerate(zip(low, high, strict=True)):
        x, y = np.array([a, b]), np.zeros(2)
        if entry > 0:
            x, y = _between(*_penalised(*lines[-1], strength, square), strength if square else 0.0, a, b)
        lines.append((x, y + x - z[entry]))
    out = np.empty(len(z))
    out[-1] = _crossing(*lines[-1], 0.0)
    for entry in range(len(z) - 2, -1, -1):
        x, y = lines[entry]
        after = out[entry + 1]
        if square:
            out[entry] = _crossing(x, y + strength * (x - after), 0.0)
        else:
            out[entry] = np.clip(after, _crossing(x, y, -strength), _crossing(x, y, strength))
    return np.asarray(np.clip(out, low, high), dtype=np.float64)  # the last rounding


def _penalised(x: Floats, y: Floats, strength: float, square: bool) -> tuple[Floats, Floats]:
    """Return the derivative of min_b f(b) + strength * v(. - b), for f' given with vertical ends.

    Its own ends go on with slope `strength` (square) or flat.
    """
    if square:  # the inverses of derivatives add
        return x + y / strength, y
    inside = np.abs(y) < strength
    first, last = _crossing(x, y, -strength), _crossing(x, y, strength)
    return np.r_[first, x[inside], last], np.r_[-strength, y[inside], strength]


def _between(x: Floats, y: Floats, slope: float, low: float, high: float) -> tuple[Floats, Floats]:
    """Return the polyline (ends of this slope) between two x; where it climbs vertically at one, what lies within."""
    before, after = max(x[0] - low, 0.0) + 1.0, max(high - x[-1], 0.0) + 1.0
    x = np.r_[x[0] - before, x, x[-1] + after]
    y = np.r_[y[0] - slope * before, y, y[-1] + slope * after]
    i, j = int(np.searchsorted(x, low, "right")), int(np.searchsorted(x, high, "left"))
    ends = [y[k - 1] + (y[k] - y[k - 1]) * (c - x[k - 1]) / (x[k] - x[k - 1]) for c, k in ((low, i), (high, j))]
    return np.r_[low, x[i:j], high], np.r_[ends[0], y[i:j], max(ends)]


def _crossing(x: Floats, y: Floats, level: float) -> float:
    """Return where a rising polyline with vertical ends has the value `level`."""
    return float(np.interp(level, y, x))
