"""What the loss says about ranks: row dots of factors with their gradients, and two readings of dL/drho."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ardlora_ext import processes
from ardlora_ext.config import ArdConfig
from ardlora_ext.layers.experts import ExpertStack
from ardlora_ext.layers.spectra import singular_values
from ardlora_ext.native import dispatch
from ardlora_ext.native.compiled import core
from ardlora_ext.native.transfers import Fetched
from ardlora_ext.processes import Group
from ardlora_ext.ranks.controllers.ard.gates import Gates
from ardlora_ext.ranks.controllers.costs import Floats
from ardlora_ext.ranks.controllers.units import Units, kinds, present

EMA = 0.95  # of Fisher information, of the slope's scale, and of the gains shown in records

Gradients = Sequence[torch.Tensor | None]  # of one factor of each module
Dots = NDArray[np.float32]


def row_dots(units: Units, gated: Gradients, ungated: Gradients = ()) -> Callable[[], tuple[Dots, Dots]]:
    """Return what gives <dW_i, W_i> of every live row of the gated factors, and <dW_i, dW_i> of the others, as they are
    now: the native call is queued, the result waits for it.

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
    found = [
        (index[chosen], dispatch.row_dots(blocks[chosen], dtype, device)) for dtype, device, chosen in kinds(grads)
    ]
    fetched = Fetched([dots for _, dots in found])

    def result() -> tuple[Dots, Dots]:
        out: Dots = np.zeros(sizes.sum(), dtype=np.float32)
        for (here, _), dots in zip(found, fetched.values(), strict=True):
            if len(here) == len(sizes):  # as good as always
                out = dots.numpy()
            else:
                out[np.repeat(np.isin(np.arange(len(sizes)), here), sizes)] = dots.numpy()
        return out[: rows[:, 0].sum()], out[rows[:, 0].sum() :]

    return result


def held_out_gradients(units: Units, loss: Callable[[], torch.Tensor], group: Group = None) -> Gradients:
    """Return the gradients of a held-out batch (first-order bilevel); those of training stay where they are."""
    with torch.enable_grad():
        found = torch.autograd.grad(loss(), units.gated, allow_unused=True, materialize_grads=True)
    processes.average(found, group)
    return found


def token_weights(units: Units, group: Group = None) -> Callable[[], Floats]:
    """Return what gives what each unit's squared dot counts, [units], and begins to count tokens anew; 1 but for
    experts. Tokens are counted now.

    n / mean n of an expert that saw n of its module's tokens, at most 1. The square of a sum over n tokens is their
    noise, which grows with n, and what they agree in, which grows with n^2: weighed by n, the noise of an expert that
    sees few tokens is worth no more than what such an expert can learn.
    """
    stacks = [(m, layer) for m, layer in enumerate(units.layers) if isinstance(layer, ExpertStack)]
    seen = [layer.tokens.to(layer.lora_A.device, copy=True) for _, layer in stacks]
    processes.average(seen, group)
    fetched = Fetched(seen)

    def result() -> Floats:
        weights: Floats = np.ones(len(units))
        for (m, layer), count in zip(stacks, fetched.values(), strict=True):
            tokens = count.numpy()
            if tokens.any():
                weights[units.first[m] : units.first[m + 1]] = np.minimum(tokens / tokens.mean(), 1.0)
            layer.tokens = layer.tokens.to(layer.lora_A.device).zero_()  # in place: captured graphs count there
        return weights

    return result


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

    def asked(self, group: Group = None) -> Callable[[Dots, Floats, int], Floats]:
        """Return what gives the slope [units] of these gradients from their row dots, soft ranks rho [units] and the
        step; `group` are the processes that decide the same.
        """
        if self.config.slope == "tangent":
            return lambda dots, rho, _step: self._tangent(dots, rho)
        weights = token_weights(self.units, group)

        def slope(dots: Dots, rho: Floats, step: int) -> Floats:
            seen = np.sqrt(weights())
            return self._secant(dots if seen.min() == 1.0 else dots * self._rows(seen), rho, step)

        return slope

    def looks(self, step: int) -> bool:
        """Tell whether the slope of this step needs the weights, too, as they are before it."""
        return self.config.slope == "secant" and (self.spectrum is None or step % self.config.update_interval == 0)

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
        if self.spectrum is None or self.looks(step):
            self.spectrum = singular_values(self.units.layers).square().numpy()
        fisher = self.fisher.copy()
        slopes = core.secant_slopes(dots, self.units.live(), rho, self.spectrum, fisher, EMA)
        self.fisher = fisher
        return slopes
