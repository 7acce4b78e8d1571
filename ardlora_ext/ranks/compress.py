"""Train big, then compress: one threshold over the singular values of all updates (PARA, arXiv:2604.27796).

A component of unit u is worth the squared singular value sigma^2 that its loss takes from the update, and costs the
parameters of its rows. At a price p the best ranks maximise  sum sigma_kept^2 - p * parameters,  layer by layer; for
units with factors of their own that is the threshold sigma^2 / cost >= p. The price is one for the model, the smallest
that meets the budget; around it ranks are chosen that spend the budget to the last parameter that costs allow
(`controllers/knapsack.py`). Units that share a factor also share the cost of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.record import adapters
from ardlora_ext.ranks.controllers.knapsack import SharedMenu, spend
from ardlora_ext.ranks.recompress import cores, groups, top_directions
from ardlora_ext.ranks.svd_prune import check_settled, svd_prune

_NOISE = 1e-14  # of the largest sigma^2 of a unit: rounding of float32 factors


@dataclass(frozen=True)
class Compression:
    """What `compress` did.

    Attributes:
        ranks: by module, the rank of each unit.
        threshold: the price: sigma^2 per parameter that a component must have to stay (0: all but zeros stay), but for
            what it takes to spend the budget.
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
class _Units:
    """Units that use one common factor, what their ranks cost and what they are worth.

    Attributes:
        name: of the module.
        indices: in the module.
        menu: squared singular values kept, by cost.
    """

    name: str
    indices: list[int]
    menu: SharedMenu


def _units(name: str, layer: LoraLinear, least: int) -> list[_Units]:
    """Return the menus of a layer's units, in the basis that serves all units of a shared factor best.

    Ranks go from `least`, or the present one, to the last component that is more than rounding.
    """
    lay = layer.layout
    widths = (lay.a_width, lay.b_width) if lay.gate_on_a else (lay.b_width, lay.a_width)
    own, common = (widths[0], widths[1]) if lay.shared else (sum(widths), 0)
    own += layer.lora_E is not None  # a trained gate
    found = []
    for group in groups(layer):
        stack, width = cores(group), len(group.common)
        basis = top_directions(stack, width, group.common)
        worth = np.full((len(stack), width + 1), -np.inf)
        for u, core in enumerate(stack):
            gain = (layer.scaling**2 * (core @ basis).square().sum(0)).cpu().numpy()
            present = len(group.own[u])
            floor = min(least, present)
            useful = np.flatnonzero(gain[:present] > _NOISE * gain.sum())
            last = max(floor, int(useful[-1]) + 1 if len(useful) else 0)
            worth[u, floor : last + 1] = np.concatenate([[0.0], np.cumsum(gain)])[floor : last + 1]
        found.append(_Units(name, group.units, SharedMenu.of(worth, own, common)))
    return found


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
    """Lower ranks until the live adapter parameters fit `budget`, with little change of the updates.

    One price for all units decides what stays (see the module's docstring) and the most is spent that `budget` and the
    costs of components allow: all of it where they divide it. Then each update is recompressed by QR and a rank-sized
    SVD (`svd_prune`), so what is left is its best approximation. Gates are folded in. Frozen parts of
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
    units = [found for name, layer in layers.items() for found in _units(name, layer, min_rank)]
    total = sum(float(found.menu.units.max(axis=1).sum()) for found in units)
    if total == 0.0:
        raise ValueError("compress: adapters must have been trained, got updates that are all zero")
    fixed = sum(layer.parameters_at([0] * layer.layout.units) for layer in layers.values())
    floor = fixed + sum(int(found.menu.cost[0]) for found in units)
    if allowed < floor:
        raise ValueError(
            f"compress: budget must be at least {floor:,} parameters (rank {min_rank} everywhere), got {allowed:,}"
        )
    entries, price = spend([found.menu for found in units], allowed - fixed)
    wanted = {name: [0] * layer.layout.units for name, layer in layers.items()}
    for found, entry in zip(units, entries, strict=True):
        for u, rank in zip(found.indices, found.menu.ranks(entry).tolist(), strict=True):
            wanted[found.name][u] = rank
    change = svd_prune(model, wanted, optimizer)
    after = sum(layer.live_parameters for layer in layers.values())
    return Compression(wanted, price, before, after, change / total**0.5)
