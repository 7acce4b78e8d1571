"""What the components of units are worth, and the ranks that are worth most at a cost.

A component is worth the squared singular value that its loss takes from its unit's update: the change of the update in
the plain metric, what the loss loses to second order in its own (`ranks/loss_metric.py`). It costs the parameters of
its rows; units that share a factor share the cost of its rows, and units that move together are one choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.ranks.controllers.costs import Floats, Ints
from ardlora_ext.ranks.controllers.knapsack import Menu, SharedMenu, choose
from ardlora_ext.ranks.recompress import Metric, check_finite, cores, groups, top_directions

_NOISE = 1e-14  # of the largest sigma^2 of a unit: rounding of float32 factors


@dataclass(frozen=True)
class Offer:
    """Units that use one common factor, and what each of their ranks is worth.

    Attributes:
        name: of the module.
        indices: of the units in it.
        worth: [units, R + 1], of the first r components of each; -inf where r is not allowed.
        own: parameters of a component of one unit.
        common: parameters of a row that they share, 0 for a unit alone.
    """

    name: str
    indices: list[int]
    worth: Floats
    own: int
    common: int


def offers(name: str, layer: LoraLinear, least: int, metric: Sequence[Metric | None] | None = None) -> list[Offer]:
    """Return what a layer's units offer, in the basis that serves all units of a shared factor best.

    Ranks go from `least`, or the present one, to the last component that is more than rounding.

    Raises:
        ValueError: factors hold NaN or Inf.
    """
    check_finite(name, layer)
    lay = layer.layout
    widths = (lay.a_width, lay.b_width) if lay.gate_on_a else (lay.b_width, lay.a_width)
    own, common = (widths[0], widths[1]) if lay.shared else (sum(widths), 0)
    own += layer.lora_E is not None  # a trained gate
    found = []
    for g, group in enumerate(groups(layer)):
        stack, width = cores(group, None if metric is None else metric[g]), len(group.common)
        basis = top_directions(stack, width, group.common)
        worth = np.full((len(stack), width + 1), -np.inf)
        for u, core in enumerate(stack):
            gain = (layer.scaling**2 * (core @ basis).square().sum(0)).cpu().numpy()
            present = len(group.own[u])
            floor = min(least, present)
            useful = np.flatnonzero(gain[:present] > _NOISE * gain.sum())
            last = max(floor, int(useful[-1]) + 1 if len(useful) else 0)
            worth[u, floor : last + 1] = np.concatenate([[0.0], np.cumsum(gain)])[floor : last + 1]
        found.append(Offer(name, group.units, worth, own, common))
    return found


@dataclass(frozen=True)
class Choice:
    """Offers that are one choice: one, or those of units that move together.

    Attributes:
        members: the offers.
        menu: what can be taken, by cost.
        levels: [entries] the rank of a unit alone, or the common one of units that move together; else None.
    """

    members: list[Offer]
    menu: Menu
    levels: Ints | None = None

    @classmethod
    def of(cls, members: list[Offer]) -> Choice:
        """Make one choice of these offers; several have one unit each."""
        if len(members) == 1:
            only = members[0]
            if len(only.indices) == 1:  # most are: a rank is an entry
                levels = np.flatnonzero(np.isfinite(only.worth[0]))
                return cls(members, Menu(levels * (only.own + only.common), only.worth[0][levels]), levels)
            return cls(members, SharedMenu.of(only.worth, only.own, only.common))
        width = max(m.worth.shape[1] for m in members)
        cost, worth = np.zeros(width, dtype=np.int64), np.zeros(width)
        for m in members:  # a unit with less room stays at its last rank
            allowed = np.flatnonzero(np.isfinite(m.worth[0]))
            at = np.clip(np.arange(width), allowed[0], allowed[-1])
            cost += m.own * at
            worth += m.worth[0][at]
        cost, first = np.unique(cost, return_index=True)
        return cls(members, Menu(cost, worth[first]), first)

    def ranks(self, entry: int) -> list[list[int]]:
        """Return the ranks [units] of each member for an entry of the menu."""
        if isinstance(self.menu, SharedMenu):
            return [self.menu.ranks(entry).tolist()]
        assert self.levels is not None
        level = int(self.levels[entry])
        rooms = [np.flatnonzero(np.isfinite(m.worth[0])) for m in self.members]
        return [[int(np.clip(level, room[0], room[-1]))] for room in rooms]


@dataclass(frozen=True)
class Allocation:
    """Ranks that fit a budget.

    Attributes:
        ranks: by module, of each unit.
        price: worth per parameter around which they were chosen.
        kept: what they are worth.
        total: what all components are worth.
    """

    ranks: dict[str, list[int]]
    price: float
    kept: float
    total: float


def least_cost(choices: Sequence[Choice]) -> int:
    """Return the parameters of the cheapest entries."""
    return sum(int(choice.menu.cost[0]) for choice in choices)


def allocate(choices: Sequence[Choice], budget: int) -> Allocation:
    """Return the ranks of most worth within `budget`.

    Raises:
        ValueError: the cheapest entries cost more than the budget.
    """
    entries, price = choose([choice.menu for choice in choices], budget)
    units: dict[str, dict[int, int]] = {}
    kept = 0.0
    for choice, entry in zip(choices, entries, strict=True):
        kept += float(choice.menu.worth[entry])
        for member, ranks in zip(choice.members, choice.ranks(entry), strict=True):
            units.setdefault(member.name, {}).update(zip(member.indices, ranks, strict=True))
    total = sum(float(member.worth.max(axis=1).sum()) for choice in choices for member in choice.members)
    return Allocation({name: [found[u] for u in sorted(found)] for name, found in units.items()}, price, kept, total)


def allocate_padded(offered: Sequence[Offer], budget: int, served: Sequence[int]) -> Allocation:
    """Return the ranks of most worth where every unit that is left costs as much as one of the largest rank.

    For each rank that can be served, units are kept at up to that rank or not at all; the best of all ranks is taken.

    Args:
        offered: one unit each.
        budget: parameters allowed in the padded file.
        served: ranks that padding leads to, rising.

    Raises:
        ValueError: units that must stay cost more than the budget at any rank.
    """
    best: Allocation | None = None
    least = max(int(np.argmax(np.isfinite(offer.worth[0]))) for offer in offered)
    largest = max(offer.worth.shape[1] - 1 for offer in offered)
    total = sum(float(offer.worth.max()) for offer in offered)
    for rank in [r for r in served if least <= r < largest] + [next((r for r in served if r >= largest), largest)]:
        menus, tops = [], []
        for offer in offered:
            top = int(np.flatnonzero(np.isfinite(offer.worth[0, : rank + 1]))[-1])
            price = offer.own * rank
            stays = not np.isfinite(offer.worth[0, 0])
            cost = np.array([price] if stays else [0, price] if top else [0], dtype=np.int64)
            menus.append(Menu(cost, offer.worth[0, [top] if stays else [0, top] if top else [0]]))
            tops.append(top)
        if sum(int(menu.cost[0]) for menu in menus) > budget:
            continue
        entries, price_of = choose(menus, budget)
        kept = sum(float(menu.worth[e]) for menu, e in zip(menus, entries, strict=True))
        ranks = {
            offer.name: [top if menu.cost[e] else 0]
            for offer, menu, top, e in zip(offered, menus, tops, entries, strict=True)
        }
        if best is None or kept > best.kept:
            best = Allocation(ranks, price_of, kept, total)
    if best is None:
        raise ValueError(f"rank change: budget must allow the units that stay, got {budget:,} exported parameters")
    return best
