"""Which components come first: those at the end are the ones that a falling rank takes away."""

from __future__ import annotations

import numpy as np

from ardlora_ext.ranks.controllers.ard.slopes import row_dots
from ardlora_ext.ranks.controllers.costs import Floats
from ardlora_ext.ranks.controllers.units import Units


def component_orders(units: Units, rho: Floats) -> dict[int, list[int]]:
    """Return the new order of components, by module, where it is not the present one.

    Fully open components go by falling sum_u ||gated_uj|| ||other_j||, the others stay in place. Units with factors of
    their own are only reordered when the matrix is one unit.

    Args:
        units: of the model.
        rho: [units] soft ranks.
    """
    live, first, modules = units.live(), units.first_rows(), len(units.layers)
    movable = [layer.layout.units == 1 or layer.layout.shared for layer in units.layers]
    open_in_all = np.minimum.reduceat(np.minimum(np.floor(rho).astype(np.int64), live), units.first[:-1])
    still = np.where(movable, open_in_all, 0)
    column = np.arange(int(still.max()))
    if not len(column):
        return {}
    with_themselves = row_dots(units, [p.detach() for p in units.gated], [p.detach() for p in units.ungated])()
    own, common = (np.sqrt(dots.astype(np.float64)) for dots in with_themselves)
    module = np.repeat(units.module_of, live)
    rows = units.rows()
    for dots, count in ((own, rows[:, 0]), (common, rows[:, 1])):
        broken = ~np.isfinite(dots)
        if broken.any():
            name = units.names[np.repeat(np.arange(modules), count)[broken.argmax()]]
            raise ValueError(
                f"rank change: adapters must be finite, got NaN or Inf in '{name}'; a loss or gradient was not finite "
                "at an earlier step"
            )
    component = np.arange(len(own)) - np.repeat(first, live)
    moving = component < still[module]
    place = module[moving] * len(column) + component[moving]
    useful = np.bincount(place, own[moving], minlength=modules * len(column)).reshape(modules, -1)
    others = rows[:, 1]
    useful = useful * common[np.minimum((np.cumsum(others) - others)[:, None] + column, len(common) - 1)]
    useful[column >= still[:, None]] = -np.inf
    order = np.argsort(-useful, axis=1, kind="stable")
    most = np.maximum.reduceat(live, units.first[:-1])
    moved = np.flatnonzero((order != column).any(axis=1))
    return {int(m): [*order[m, : still[m]].tolist(), *range(still[m], most[m])] for m in moved}
