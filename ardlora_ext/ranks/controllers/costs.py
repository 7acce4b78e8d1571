"""Parameters and prices of many units: pure functions on arrays.

Units that share a full-width factor pay for it together: its rows are as many as the largest of their ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ardlora_ext.native.compiled import core

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

    def at(self, ranks: Floats | Ints) -> tuple[float, Floats]:
        """Return the parameters at these (whole or soft) ranks [units], and the cost of each unit's next component.

        A shared row is paid by the units that reach it: its cost is split by (r_u / max r)^8.
        """
        return core.unit_costs(self.own, self.common, self.module_of, np.asarray(ranks, dtype=np.float64))

    def parameters(self, ranks: Floats | Ints) -> float:
        """Return the parameters at these (whole or soft) ranks [units]."""
        return self.at(ranks)[0]
