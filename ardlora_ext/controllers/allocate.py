"""Parameters, prices and whole ranks of many units: pure functions on arrays.

Units that share a full-width factor pay for it together: its rows are as many as the largest of their ranks.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Costs:
    """What components cost, in parameters.

    Attributes:
        own: [units], of one component of the unit.
        common: [modules], of one row of the factor its units share (0 without one).
        module_of: [units], index into `common`.
    """

    own: Floats
    common: Floats
    module_of: Ints

    def parameters(self, ranks: Floats | Ints) -> float:
        """Return the parameters at these (whole or soft) ranks [units]."""
        largest = np.zeros(len(self.common))
        np.maximum.at(largest, self.module_of, ranks)
        return float(self.own @ ranks + self.common @ largest)

    def marginal(self, ranks: Floats, sharpness: float = 8.0) -> Floats:
        """Return the cost of the next component of each unit [units].

        A shared row is paid by the units that reach it: its cost is split by (r_u / max r)^sharpness.
        """
        largest = np.ones(len(self.common))
        np.maximum.at(largest, self.module_of, ranks)
        weight = (ranks / largest[self.module_of]) ** sharpness
        total = np.bincount(self.module_of, weight, minlength=len(self.common))
        shared: Floats = self.common[self.module_of] * weight / total[self.module_of]
        return self.own + shared


def whole_ranks(soft: Floats, limit: Ints, group: Ints, costs: Costs, budget: float | None) -> Ints:
    """Turn soft ranks into whole ones, at least 1 each.

    Without a budget r_u = max(1, round(rho_u)) (paper, A2). With one, components are taken in the order of their margin
    rho_u - j as long as they fit, so the budget is met to within one component.

    Args:
        soft: [groups] soft ranks rho.
        limit: [units] largest rank of each unit.
        group: [units] index into `soft`; units of a group have one rank.
        costs: what components cost.
        budget: parameters allowed, or None.

    Returns:
        [units] ranks.
    """
    if budget is None:
        rounded = np.maximum(1, np.floor(soft + 0.5)).astype(np.int64)
        return np.minimum(rounded[group], limit)
    ranks = np.minimum(1, limit)
    members = [np.flatnonzero(group == g) for g in range(len(soft))]
    largest = np.zeros(len(costs.common), dtype=np.int64)
    np.maximum.at(largest, costs.module_of, ranks)
    left = budget - costs.parameters(ranks)
    queue = [(1.0 - rho, g, 1) for g, rho in enumerate(soft)]
    heapq.heapify(queue)
    while queue:
        margin, g, j = heapq.heappop(queue)
        units = members[g][limit[members[g]] > j]
        if margin >= 1.0 or not len(units):  # components the gate never opened are not bought
            continue
        modules = costs.module_of[units]
        new_rows = np.unique(modules[largest[modules] <= j])
        price = float(costs.own[units].sum() + costs.common[new_rows].sum())
        if price > left:
            continue  # the group stops here, cheaper ones may still fit
        left -= price
        ranks[units] = j + 1
        largest[new_rows] = j + 1
        heapq.heappush(queue, (j + 1.0 - soft[g], g, j + 1))
    return ranks
