"""What the loss says about ranks: row dots of factors with their gradients, and two readings of dL/drho."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ardlora_ext import processes
from ardlora_ext.config import ArdConfig
from ardlora_ext.layers.experts import ExpertStack
from ardlora_ext.layers.spectra import singular_values
from ardlora_ext.native import dispatch
from ardlora_ext.native.compiled import core
from ardlora_ext.processes import Group
from ardlora_ext.ranks.controllers.ard.gates import Gates
from ardlora_ext.ranks.controllers.base import Units, kinds, present
from ardlora_ext.ranks.controllers.costs import Floats

EMA = 0.95  # of Fisher information, of the slope's scale, and of the gains shown in records

Gradients = Sequence[torch.Tensor | None]  # of one factor of each module
Dots = NDArray[np.float32]


def row_dots(units: Units, gated: Gradients, ungated: Gradients = ()) -> tuple[Dots, Dots]:
    """Return <dW_i, W_i> of every live row of the gated factors, and <dW_i, dW_i> of the others, in one native call.

    Args:
        units: of the model.
        gated: gradients of the gated factors; without one, dots are 0.
        ungated: of the others, or none: what is finite here has finite gradients.
    """
    rows = units.rows()
    weights = [*units.gated, *units.ungated][: len(gated) + len(ungated)]
    grads, index = present([*gated, *ungated], weights)
    factor, module = np.divmod(index, len(rows))
    count = int(np.searchsorted(factor, 1))  # of gated ones
    blocks = np.empty((len(grads), 4), dtype=np.int64)  # addresses of weight and gradient, rows, columns
    blocks[:, 1] = [g.data_ptr() for g in grads]
    blocks[:count, 0] = [units.gated[m].data_ptr() for m in module[:count].tolist()]
    blocks[count:, 0] = blocks[count:, 1]
    blocks[:, 2], blocks[:, 3] = rows[module, factor], units.widths[module, factor]
    sizes = rows.T.ravel()[: len(gated) + len(ungated)]
    out: Dots = np.zeros(sizes.sum(), dtype=np.float32)
    for dtype, device, chosen in kinds(grads):
        dots, here = dispatch.row_dots(blocks[chosen], dtype, device), index[chosen]
        if len(here) == len(sizes):  # as good as always
            out = dots
        else:
            out[np.repeat(np.isin(np.arange(len(sizes)), here), sizes)] = dots
    return out[: rows[:, 0].sum()], out[rows[:, 0].sum() :]


def token_weights(units: Units, group: Group = None) -> Floats:
    """Return what each unit's squared dot counts, [units], and begin to count tokens anew; 1 but for experts.

    n / mean n of an expert that saw n of its module's tokens, at most 1. The square of a sum over n tokens is their
    noise, which grows with n, and what they agree in, which grows with n^2: weighed by n, the noise of an expert that
    sees few tokens is worth no more than what such an expert can learn.
    """
    weights: Floats = np.ones(len(units))
    stacks = [(m, layer) for m, layer in enumerate(units.layers) if isinstance(layer, ExpertStack)]
    seen = [layer.tokens.to(layer.lora_A.device) for _, layer in stacks]
    processes.average(seen, group)
    for (m, layer), count in zip(stacks, seen, strict=True):
        tokens = count.cpu().numpy()
        if tokens.any():
            weights[units.first[m] : units.first[m + 1]] = np.minimum(tokens / tokens.mean(), 1.0)
        layer.tokens = count.zero_()
    return weights


class SlopeEstimator:
    """dL/drho of every unit, from the row dots of its components.

    Attributes:
        fisher: [units] running mean of <dL/ddW, dW>^2.
        spectrum: [units, rank] squared singular values of each update, refreshed every `update_interval` steps.
    """

    def __init__(self, units: Units, gates: Gates, config: ArdConfig) -> None:
        self.units, self.gates, self.config = units, gates, config
        self.fisher: Floats = np.zeros(len(units))
        self.spectrum: Floats | None = None

    def __call__(self, dots: Dots, rho: Floats, step: int, group: Group = None) -> Floats:
        """Return the slope [units] at soft ranks rho [units]; `group` are the processes that decide the same."""
        if self.config.slope == "tangent":
            return self._tangent(dots, rho)
        seen = np.sqrt(token_weights(self.units, group))
        return self._secant(dots if seen.min() == 1.0 else dots * self._rows(seen), rho, step)

    def _rows(self, values: Floats) -> Dots:
        return np.repeat(values, self.units.live()).astype(np.float32)

    def _tangent(self, dots: Dots, rho: Floats) -> Floats:
        """The derivative through the gates: dL/dm_j = dots_j / m_j, times dm_j/drho."""
        first = self.units.first_rows()
        if self.config.gate == "sigmoid":
            inner = dots * (1.0 - self.gates.values(rho)) / self.config.gate_width
            inner[first] = 0.0  # component 0 is always open
            return np.add.reduceat(inner, first, dtype=np.float64)
        if self.config.gate == "scale":
            last = first + np.maximum(np.floor(rho + 0.5).astype(np.int64), 1)
            sums = np.concatenate([[0.0], np.cumsum(dots, dtype=np.float64)])
            return np.asarray((sums[np.minimum(last, len(dots))] - sums[first]) / rho, dtype=np.float64)
        boundary = first + np.minimum(np.floor(rho).astype(np.int64), self.units.live() - 1)
        gates = self.gates.values(rho)
        return np.asarray(dots[boundary] / gates[boundary], dtype=np.float64)

    def _secant(self, dots: Dots, rho: Floats, step: int) -> Floats:
        """Minus the square root of what each unit's boundary component is worth.

        The loss that a unit's update is worth is its Fisher information along itself, E[<dL/ddW, dW>^2]; component j
        holds the share sigma_j^2 / sum sigma^2 of it.
        """
        if self.spectrum is None or step % self.config.update_interval == 0:
            self.spectrum = singular_values(self.units.layers).square().numpy()
        fisher = self.fisher.copy()
        slopes = core.secant_slopes(dots, self.units.live(), rho, self.spectrum, fisher, EMA)
        self.fisher = fisher
        return slopes
