"""Parameters and prices of many units: pure functions on arrays.

Units that share a full-width factor pay for it together: its rows are as many as the largest of their ranks.
"""

from __future__ import annotations

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
