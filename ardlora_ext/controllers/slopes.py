"""What the loss says about ranks: row dots of factors with their gradients, and two readings of dL/drho."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ardlora_ext import _device
from ardlora_ext.config import ArdConfig
from ardlora_ext.controllers.allocate import Floats, Ints
from ardlora_ext.controllers.base import Units

EMA = 0.95  # of Fisher information, of the slope's scale, and of the gains shown in records

Gradients = Mapping[int, torch.Tensor]  # by module


def gradients_of(factors: Sequence[torch.nn.Parameter]) -> Gradients:
    """Return the gradients that backward left on one factor of each module."""
    return {m: g for m, p in enumerate(factors) if (g := p.grad) is not None}


def row_dots(units: Units, gated: Gradients, ungated: Gradients) -> tuple[Floats, bool]:
    """Return <dW_i, W_i> of every live row of the gated factors, and whether all gradients are finite.

    Args:
        units: of the model.
        gated: gradients of the gated factors; without one, dots are 0.
        ungated: of the others, only looked at, in the same native call: as the dot with themselves.
    """
    count, rows = len(gated), units.rows()
    module: Ints = np.array([*gated, *ungated], dtype=np.int64)
    factor = np.repeat([0, 1], [count, len(ungated)])
    grads = [g.contiguous() for g in (*gated.values(), *ungated.values())]
    blocks = np.empty((len(grads), 4), dtype=np.int64)  # addresses of weight and gradient, rows, columns
    blocks[:, 1] = [g.data_ptr() for g in grads]
    blocks[:count, 0] = [units.gated[m].data_ptr() for m in gated]
    blocks[count:, 0] = blocks[count:, 1]
    blocks[:, 2], blocks[:, 3] = rows[module, factor], units.widths[module, factor]
    out: Floats = np.zeros(rows[:, 0].sum())
    finite = True
    for dtype, device, chosen in kinds(grads):
        dots = _device.row_dots(blocks[chosen], dtype, device)
        finite = finite and bool(np.isfinite(dots).all())
        here = np.zeros(len(rows), dtype=bool)
        here[module[:count][chosen[:count]]] = True
        out[np.repeat(here, rows[:, 0])] = dots[: rows[here, 0].sum()]
    return out, finite


def kinds(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.dtype, torch.device, NDArray[np.bool_]]]:
    """Return (dtype, device, which tensors) for each kind among them; there is almost always one, found fast."""
    if not tensors:
        return []
    if len({t.dtype for t in tensors}) == 1 and len({t.get_device() for t in tensors}) == 1:
        return [(tensors[0].dtype, tensors[0].device, np.ones(len(tensors), dtype=bool))]
    found = [(t.dtype, t.device) for t in tensors]
    return [(*kind, np.array([k == kind for k in found])) for kind in dict.fromkeys(found)]


class SlopeEstimator:
    """dL/drho of every unit, from the row dots of its components.

    Attributes:
        fisher: [units] running mean of <dL/ddW, dW>^2.
        spectrum: [units, rank] squared singular values of each update, refreshed every `update_interval` steps.
    """

    def __init__(self, units: Units, config: ArdConfig) -> None:
        self.units, self.config = units, config
        self.fisher: Floats = np.zeros(len(units))
        self.spectrum: Floats | None = None

    def __call__(self, dots: Floats, rho: Floats, step: int) -> Floats:
        """Return the slope [units] at soft ranks rho [units]."""
        first = self.units.first_rows()
        boundary: Ints = np.minimum(np.floor(rho).astype(np.int64), self.units.live() - 1)
        if self.config.slope == "secant":
            return self._secant(np.add.reduceat(dots, first), boundary, step)
        return self._tangent(dots, rho, first, boundary)

    def _tangent(self, dots: Floats, rho: Floats, first: Ints, boundary: Ints) -> Floats:
        """The derivative through the gates: dL/dm_j = dots_j / m_j, times dm_j/drho."""
        rows = self.units.module_rows()
        gates = np.concatenate([g.cpu().numpy()[:n] for g, n in zip(self.units.gates(), rows, strict=True)])
        if self.config.gate == "sigmoid":
            inner = dots * (1.0 - gates) / self.config.gate_width
            inner[first] = 0.0  # component 0 is always open
            return np.asarray(np.add.reduceat(inner, first), dtype=np.float64)
        if self.config.gate == "scale":
            last = first + np.maximum(np.floor(rho + 0.5).astype(np.int64), 1)
            sums = np.concatenate([[0.0], np.cumsum(dots)])
            return np.asarray((sums[np.minimum(last, len(dots))] - sums[first]) / rho, dtype=np.float64)
        rows = first + boundary
        return np.asarray(dots[rows] / gates[rows], dtype=np.float64)

    def _secant(self, dots: Floats, boundary: Ints, step: int) -> Floats:
        """Minus the square root of what each unit's boundary component is worth.

        The loss that a unit's update is worth is its Fisher information along itself, E[<dL/ddW, dW>^2]; component j
        holds the share sigma_j^2 / sum sigma^2 of it.
        """
        self.fisher = np.asarray(EMA * self.fisher + (1.0 - EMA) * dots**2, dtype=np.float64)
        if self.spectrum is None or step % self.config.update_interval == 0:
            widest = int(self.units.live().max())
            values = [layer.singular_values().numpy() ** 2 for layer in self.units.layers]
            padded = [np.pad(v, ((0, 0), (0, widest - v.shape[1]))) for v in values]
            self.spectrum = np.asarray(np.concatenate(padded), dtype=np.float64)
        share = self.spectrum[np.arange(len(dots)), np.minimum(boundary, self.spectrum.shape[1] - 1)]
        worth = self.fisher * share / np.maximum(self.spectrum.sum(axis=1), 1e-300)
        return np.asarray(-np.sqrt(worth), dtype=np.float64)
