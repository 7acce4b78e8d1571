"""What the loss says about ranks: row dots of factors with their gradients, and two readings of dL/drho."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ardlora_ext import _device
from ardlora_ext.config import ArdConfig
from ardlora_ext.controllers.allocate import Floats, Ints
from ardlora_ext.controllers.base import Units

EMA = 0.95  # of Fisher information, of the slope's scale, and of the gains shown in records

Gradients = Mapping[int, torch.Tensor]  # by module


def training_gradients(units: Units) -> Gradients:
    """Return the gradients that backward left on the gated factors."""
    return {m: layer.gated.grad for m, layer in enumerate(units.layers) if layer.gated.grad is not None}


def row_dots(units: Units, gradients: Gradients) -> Floats:
    """Return <dW_i, W_i> of every live row of the gated factors, module after module; 0 without a gradient."""
    rows = [sum(layer.ranks) for layer in units.layers]
    offset = np.cumsum([0, *rows])
    out: Floats = np.zeros(offset[-1])
    kinds = {m: (units.layers[m].gated.dtype, units.layers[m].gated.device) for m in gradients}
    for kind in dict.fromkeys(kinds.values()):
        members = [m for m in gradients if kinds[m] == kind]
        pairs = [(units.layers[m].gated, gradients[m], rows[m]) for m in members]
        blocks = np.array([(w.data_ptr(), g.data_ptr(), r, w.shape[1]) for w, g, r in pairs], dtype=np.int64)
        index = np.concatenate([np.arange(offset[m], offset[m + 1]) for m in members])
        out[index] = _device.row_dots(blocks, *kind)
    return out


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
        offset = np.cumsum([0, *(sum(layer.ranks) for layer in self.units.layers)])
        first: Ints = offset[self.units.module_of] + self.units.rows()
        boundary: Ints = np.minimum(np.floor(rho).astype(np.int64), self.units.live() - 1)
        if self.config.slope == "secant":
            return self._secant(np.add.reduceat(dots, first), boundary, step)
        return self._tangent(dots, rho, first, boundary)

    def _tangent(self, dots: Floats, rho: Floats, first: Ints, boundary: Ints) -> Floats:
        """The derivative through the gates: dL/dm_j = dots_j / m_j, times dm_j/drho."""
        layers = self.units.layers
        gates = np.concatenate([g.lora_gate.cpu().numpy()[: sum(g.ranks)] for g in layers if g.lora_gate is not None])
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
