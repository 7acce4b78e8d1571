"""Train big, then compress: one threshold over the singular values of all updates (PARA, arXiv:2604.27796).

A component of unit u is worth the squared singular value sigma^2 that its loss takes from the update, and costs the
parameters of its rows. At a price p the best ranks maximise  sum sigma_kept^2 - p * parameters,  layer by layer and
exactly; for units with factors of their own that is the threshold sigma^2 / cost >= p. The price is one for the model,
the smallest that meets the budget. Units that share a factor also share the cost of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from ardlora_ext.controllers.allocate import Floats, Ints
from ardlora_ext.inject import adapters
from ardlora_ext.layers import LoraLinear
from ardlora_ext.transport import check_settled, cores, groups, svd_prune, top_directions

_NOISE = 1e-14  # of the largest sigma^2 of a unit: rounding of float32 factors


@dataclass(frozen=True)
class Compression:
    """What `compress` did.

    Attributes:
        ranks: by module, the rank of each unit.
        threshold: the price: sigma^2 per parameter that a component must have to stay (0: all but zeros stay). What the
            threshold leaves of the budget goes to the best components below it that fit.
        before: live adapter parameters before.
        after: live adapter parameters now.
        change: ||dW' - dW|| / ||dW|| over all updates (Frobenius).
    """

    ranks: dict[str, list[int]]
    threshold: float
    before: int
    after: int
    change: float


@dataclass(frozen=True)
class _Curve:
    """Worth of the first components of the units that use one common factor.

    Attributes:
        name: of the module.
        units: their indices in the module.
        worth: [units, R + 1], of the first r components of each.
        limit: [units] present ranks.
        own: parameters of one component of one unit.
        common: parameters of one common row (0 without units that share).
    """

    name: str
    units: list[int]
    worth: Floats
    limit: Ints
    own: int
    common: int

    def best(self, price: float, least: int) -> Ints:
        """Return the ranks [units] that maximise worth - price * parameters, each at least `least`."""
        levels = np.arange(self.worth.shape[1])
        net = self.worth - price * self.own * levels
        net[levels < np.minimum(least, self.limit)[:, None]] = -np.inf
        upto = np.maximum.accumulate(net, axis=1).sum(axis=0) - price * self.common * levels
        top = int(np.argmax(upto))
        ranks: Ints = np.argmax(net[:, : top + 1], axis=1)
        return ranks

    def parameters(self, ranks: Ints) -> int:
        """Return the parameters at these ranks [units]."""
        return int(self.own * ranks.sum() + self.common * ranks.max())

    def steps(self, ranks: Ints) -> list[tuple[float, int, int]]:
        """Return (worth per parameter, cost, unit) of one more component for each unit that it would help."""
        found = []
        for u, r in enumerate(ranks.tolist()):
            gain = float(self.worth[u, r + 1] - self.worth[u, r]) if r < self.limit[u] else 0.0
            cost = self.own + (self.common if r == ranks.max() else 0)
            if gain > 0.0:
                found.append((gain / cost, cost, u))
        return found


def _curves(name: str, layer: LoraLinear) -> list[_Curve]:
    """Return the worth of each unit's components, in the basis that serves all units of a shared factor best."""
    lay = layer.layout
    widths = (lay.a_width, lay.b_width) if lay.gate_on_a else (lay.b_width, lay.a_width)
    own, common = (widths[0], widths[1]) if lay.shared else (sum(widths), 0)
    found = []
    for group in groups(layer):
        stack, width = cores(group), len(group.common)
        basis = top_directions(stack, width)
        worth = np.zeros((len(stack), width + 1))
        for u, core in enumerate(stack):
            gain = layer.scaling**2 * (core @ basis).square().sum(0)
            gain[gain < _NOISE * gain.sum()] = 0.0
            worth[u, 1:] = torch.cumsum(gain, 0).numpy()
        limit = np.array([len(rows) for rows in group.own], dtype=np.int64)
        past = np.arange(width + 1) > limit[:, None]
        worth[past] = -np.inf
        found.append(_Curve(name, group.units, worth, limit, own, common))
    return found


def _price(curves: list[_Curve], budget: int, least: int) -> tuple[float, list[Ints]]:
    """Return the smallest price (to one in a million) whose best ranks fit the budget, and those ranks."""

    def at(price: float) -> tuple[int, list[Ints]]:
        ranks = [curve.best(price, least) for curve in curves]
        return sum(c.parameters(r) for c, r in zip(curves, ranks, strict=True)), ranks

    largest = max(float(curve.worth[np.isfinite(curve.worth)].max()) for curve in curves)
    low, high = 1e-20 * largest, 2.0 * largest
    spent, ranks = at(low)
    if spent <= budget:
        return 0.0, ranks
    ranks = at(high)[1]
    for _ in range(100):
        middle = float(np.sqrt(low * high))
        spent, found = at(middle)
        if spent <= budget:
            high, ranks = middle, found
        else:
            low = middle
        if high <= low * (1.0 + 1e-6):
            break
    return high, ranks


def _fill(curves: list[_Curve], ranks: list[Ints], left: int) -> None:
    """Spend what the threshold left over on the best components that still fit, in place."""
    while True:
        fitting = [
            (-worth, c, u, cost)
            for c, curve in enumerate(curves)
            for worth, cost, u in curve.steps(ranks[c])
            if cost <= left
        ]
        if not fitting:
            return
        _, c, u, cost = min(fitting)
        ranks[c][u] += 1
        left -= cost


def _allowed(budget: int | float, present: int) -> int:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"compress: budget must be a number, got {type(budget).__name__}")
    if isinstance(budget, int) and budget >= 1:
        return budget
    if isinstance(budget, float) and 0.0 < budget < 1.0:
        return int(budget * present)
    raise ValueError(f"compress: budget must be parameters (int >= 1) or a share in (0, 1), got {budget}")


@torch.no_grad()
def compress(
    model: nn.Module, budget: int | float, *, optimizer: Optimizer | None = None, min_rank: int = 0
) -> Compression:
    """Lower ranks until the live adapter parameters fit `budget`, with the least change of the updates.

    One price for all units decides what stays (see the module's docstring), then each update is recompressed by QR and
    a rank-sized SVD (`svd_prune`), so what is left is its best approximation. Gates are folded in. Frozen parts of
    the count (DoRA's magnitudes) are paid from the budget first; for DoRA the update is that of the direction.

    Args:
        model: a wrapped, trained model.
        budget: adapter parameters allowed (int), or a share of the present ones (float below 1).
        optimizer: to go on training: its state is carried over.
        min_rank: smallest rank of a unit (or its present one, if less). 0: whole units may go.

    Returns:
        The new ranks, the threshold and the change. Nothing is done if the budget is met already.

    Raises:
        ValueError: the model is not wrapped or was never trained, its controller still moves ranks, the budget is below
            `min_rank` everywhere. Nothing changes then.
        TypeError: budget is not a number.
    """
    check_settled(model, "compress")
    layers = adapters(model)
    before = sum(layer.live_parameters for layer in layers.values())
    allowed = _allowed(budget, before)
    if min_rank < 0:
        raise ValueError(f"compress: min_rank must be >= 0, got {min_rank}")
    if before <= allowed:
        return Compression({name: list(layer.ranks) for name, layer in layers.items()}, 0.0, before, before, 0.0)
    curves = [curve for name, layer in layers.items() for curve in _curves(name, layer)]
    total = sum(float(curve.worth[u, limit]) for curve in curves for u, limit in enumerate(curve.limit))
    if total == 0.0:
        raise ValueError("compress: adapters must have been trained, got updates that are all zero")
    fixed = before - sum(layer.layout.parameters(layer.ranks) for layer in layers.values())
    floor = fixed + sum(c.parameters(np.minimum(min_rank, c.limit)) for c in curves)
    if allowed < floor:
        raise ValueError(
            f"compress: budget must be at least {floor:,} parameters (rank {min_rank} everywhere), got {allowed:,}"
        )
    price, ranks = _price(curves, allowed - fixed, min_rank)
    spent = sum(c.parameters(r) for c, r in zip(curves, ranks, strict=True))
    _fill(curves, ranks, allowed - fixed - spent)
    wanted = {name: [0] * layer.layout.units for name, layer in layers.items()}
    for curve, found in zip(curves, ranks, strict=True):
        for u, r in zip(curve.units, found.tolist(), strict=True):
            wanted[curve.name][u] = r
    change = svd_prune(model, wanted, optimizer)
    after = sum(layer.live_parameters for layer in layers.values())
    return Compression(wanted, price, before, after, change / total**0.5)
