"""Whole ranks within a budget: a multiple-choice knapsack.

A `Menu` lists what the units that pay together may cost and what that is worth; one entry of each menu is taken, found
around a common price per parameter. `choose` takes what is worth most. `spend` takes the largest total within the
budget, a fact and no estimate, and of the allocations that spend it the one of most worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ardlora_ext.ranks.controllers.costs import Costs, Floats, Ints

_LEAST_WINDOW = 64  # multiples of the common divisor of all costs


@dataclass(frozen=True)
class Menu:
    """Entries of a menu, by rising cost.

    Attributes:
        cost: [entries] in parameters, each once.
        worth: [entries].
    """

    cost: Ints
    worth: Floats


@dataclass(frozen=True)
class SharedMenu(Menu):
    """The menu of units that share a factor: `common` parameters for each row up to the largest of their ranks.

    Attributes:
        units: [units, R + 1], worth of the first r components of each; -inf where r is not allowed.
        largest: [entries], largest rank of the units.
        count: [entries], sum of their ranks.
    """

    units: Floats
    largest: Ints
    count: Ints

    @classmethod
    def of(cls, units: Floats, own: int, common: int) -> SharedMenu:
        """List the best ranks of every cost `own * sum(ranks) + common * max(ranks)`.

        Args:
            units: see the attribute.
            own: parameters of a component of one unit.
            common: parameters of a shared row.
        """
        entries = [np.empty((0, 4))]
        for largest in range(units.shape[1]):
            worth = _by_count(units, largest)[0][1]
            count = np.flatnonzero(np.isfinite(worth))
            cost = own * count + common * largest
            entries.append(np.stack([cost, -worth[count], np.full(len(count), largest), count], axis=1))
        table = np.concatenate(entries)
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        table = table[np.unique(table[:, 0], return_index=True)[1]]
        cost, largest_of, counts = (table[:, i].astype(np.int64) for i in (0, 2, 3))
        return cls(cost, -table[:, 1], units, largest_of, counts)

    def ranks(self, entry: int) -> Ints:
        """Return the ranks [units] of an entry."""
        largest, left = int(self.largest[entry]), int(self.count[entry])
        taken = _by_count(self.units, largest)[1]
        reaching, ranks = 1, np.zeros(len(self.units), dtype=np.int64)
        for u in reversed(range(len(self.units))):
            ranks[u], reaching = divmod(int(taken[u][reaching, left]), 2)
            left -= int(ranks[u])
        return ranks


def _by_count(units: Floats, largest: int) -> tuple[Floats, list[Ints]]:
    """Return the best worth [2, components + 1] of units of rank <= largest, and what leads there.

    Row 1: one of them reaches `largest`; row 0: none does. What leads there: of each unit [2, components + 1], twice
    its rank, plus the row of those before it.
    """
    size = len(units) * largest + 1
    best = np.full((2, size), -np.inf)
    best[0, 0] = 0.0
    taken = []
    for worth in units:
        new, how = np.full((2, size), -np.inf), np.zeros((2, size), dtype=np.int64)
        for rank in np.flatnonzero(np.isfinite(worth[: largest + 1])).tolist():
            for row in (0, 1):
                to = 1 if rank == largest else row
                found = best[row, : size - rank] + worth[rank]
                better = found > new[to, rank:]
                new[to, rank:][better] = found[better]
                how[to, rank:][better] = 2 * rank + row
        best = new
        taken.append(how)
    return best, taken


def choose(menus: Sequence[Menu], budget: int) -> tuple[list[int], float]:
    """Choose the entries that are worth most within the budget; arguments and results as in `spend`."""
    return _found(menus, budget, wholly=False)


def spend(menus: Sequence[Menu], budget: int) -> tuple[list[int], float]:
    """Choose an entry of each menu, so that the budget is spent to the last parameter it can be spent on.

    Args:
        menus: at least one, with at least one entry each.
        budget: parameters allowed.

    Returns:
        The entries, and the price per parameter they are chosen around.

    Raises:
        ValueError: the cheapest entries cost more than the budget.
    """
    return _found(menus, budget, wholly=True)


def _found(menus: Sequence[Menu], budget: int, wholly: bool) -> tuple[list[int], float]:
    least = sum(int(menu.cost[0]) for menu in menus)
    if least > budget:
        raise ValueError(f"spend: budget must be at least {least:,} parameters, got {budget:,}")
    unit = math.gcd(*(int(d) for menu in menus for d in np.diff(menu.cost))) or 1
    steps = [(menu.cost - menu.cost[0]) // unit for menu in menus]
    worths = [menu.worth for menu in menus]
    room = (budget - least) // unit
    if sum(int(s[-1]) for s in steps) <= room:
        return [len(s) - 1 for s in steps], 0.0
    price, start = _at_one_price(steps, worths, room)
    left = room - sum(int(s[i]) for s, i in zip(steps, start, strict=True))
    if not left:
        return start, price / unit
    wanted: int | None = None
    window = max(_LEAST_WINDOW, left, 4 * max(int(np.diff(s).max(initial=0)) for s in steps))
    while True:
        found, chosen = _around(steps, worths, start, left, window, wholly)
        if found < left and wanted is None and wholly:
            wanted = left - room + _largest_sum(steps, room)
        if wanted is None or found == wanted:
            return chosen, price / unit
        window *= 2


def _at_one_price(steps: Sequence[Ints], worths: Sequence[Floats], room: int) -> tuple[float, list[int]]:
    """Return the lowest price at which the entries of most worth - price * cost fit, and those entries."""

    entries_of = np.array([len(step) for step in steps])
    there = np.arange(entries_of.max()) < entries_of[:, None]  # all menus in one table [menus, most entries]
    cost, worth = np.zeros(there.shape, dtype=np.int64), np.full(there.shape, -np.inf)
    cost[there], worth[there] = np.concatenate(steps), np.concatenate(worths)
    menu = np.arange(len(steps))

    def at(price: float) -> Ints:
        return np.asarray(np.argmax(worth - price * cost, axis=1), dtype=np.int64)

    high = 1.0 + max(float(np.ptp(values)) for values in worths)  # nothing but the cheapest entries
    low, entries = -high, at(high)
    for _ in range(100):
        middle = 0.5 * (low + high)
        found = at(middle)
        if int(cost[menu, found].sum()) <= room:
            high, entries = middle, found
        else:
            low = middle
        if high - low <= 1e-12 * abs(high):
            break
    return high, entries.tolist()


def _around(
    steps: Sequence[Ints], worths: Sequence[Floats], start: list[int], left: int, window: int, wholly: bool
) -> tuple[int, list[int]]:
    """Return the largest change of the total up to `left`, else that of most worth, and the best entries that make it.

    Looked at are the changes whose running total, menu after menu, stays within +-window.
    """
    size = 2 * window + 1
    best = np.full(size, -np.inf)
    best[window] = 0.0
    taken = []
    for step, worth, first in zip(steps, worths, start, strict=True):
        change = step - step[first]
        new, how = np.full(size, -np.inf), np.zeros(size, dtype=np.int64)
        for entry in np.flatnonzero(np.abs(change) < size).tolist():
            by = int(change[entry])
            into, out = slice(max(by, 0), size + min(by, 0)), slice(max(-by, 0), size - max(by, 0))
            found = best[out] + worth[entry]
            better = found > new[into]
            new[into][better] = found[better]
            how[into][better] = entry
        best = new
        taken.append(how)
    fits = best[: window + left + 1]
    at = int(np.flatnonzero(np.isfinite(fits) if wholly else fits == fits.max())[-1])
    found_change, entries = at - window, []
    for step, how, first in zip(reversed(steps), reversed(taken), reversed(start), strict=True):
        entries.append(int(how[at]))
        at -= int(step[entries[-1]] - step[first])
    return found_change, entries[::-1]


def _largest_sum(steps: Sequence[Ints], room: int) -> int:
    """Return the largest total up to `room`, exactly: bit t of `reached` tells whether t is one."""
    reached, mask = 1, (1 << (room + 1)) - 1
    for step in steps:
        total = 0
        for s in step.tolist():
            total |= reached << s
        reached = total & mask
    return reached.bit_length() - 1


# --- soft ranks -------------------------------------------------------------------------------------------------------


def whole_ranks(soft: Floats, limit: Ints, group: Ints, costs: Costs, budget: float | None) -> Ints:
    """Turn soft ranks into whole ones, at least 1 each.

    Without a budget r_u = max(1, round(rho_u)) (paper, A2). With one, the ranks nearest to rho (least squares over
    groups) of those that spend the most the budget and the costs of components allow: to the last parameter where they
    divide it.

    Args:
        soft: [groups] soft ranks rho.
        limit: [units] largest rank of each unit.
        group: [units] index into `soft`; units of a group have one rank, and share no factor unless each is alone.
        costs: what components cost; one price for the units of a module.
        budget: parameters allowed, or None.

    Returns:
        [units] ranks.

    Raises:
        ValueError: rank 1 everywhere costs more than the budget.
    """
    if budget is None:
        rounded = np.maximum(1, np.floor(soft + 0.5)).astype(np.int64)
        return np.minimum(rounded[group], limit)
    members = _paying_together(group, costs)
    menus = [_menu(soft, limit, group, costs, units) for units in members]
    ranks = np.empty(len(group), dtype=np.int64)
    for units, menu, entry in zip(members, menus, spend(menus, int(budget))[0], strict=True):
        ranks[units] = menu.ranks(entry) if isinstance(menu, SharedMenu) else np.minimum(entry + 1, limit[units])
    return ranks


def _paying_together(group: Ints, costs: Costs) -> list[Ints]:
    """Return the units [.] of each module whose units share a factor, and of each group of the others."""
    key = np.where(costs.common[costs.module_of] > 0, costs.module_of, len(costs.common) + group)
    return [np.flatnonzero(key == k) for k in np.unique(key)]


def _menu(soft: Floats, limit: Ints, group: Ints, costs: Costs, units: Ints) -> Menu:
    """Return what ranks from 1 cost and how near they are to the soft ones."""
    levels = np.arange(int(limit[units].max()) + 1)
    near = -0.5 * (levels - soft[group[units], None]) ** 2  # [units, R + 1]
    common = costs.common[costs.module_of[units[0]]]
    if common > 0:
        near[(levels < 1) | (levels > limit[units, None])] = -np.inf
        return SharedMenu.of(near, int(costs.own[units[0]]), int(common))
    cost = costs.own[units] @ np.minimum(levels, limit[units, None])
    return Menu(cost[1:].astype(np.int64), near[0, 1:])
