"""What controllers see of a model: all its units as flat arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.ranks.controllers.costs import Costs, Ints

Chosen = Ints | slice  # indices, or a slice when it is all of them


def kinds(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.dtype, torch.device, Chosen]]:
    """Return (dtype, device, which tensors) for each kind among them; there is almost always one, found fast."""
    if not tensors:
        return []
    if len({t.dtype for t in tensors}) == 1 and len({t.get_device() for t in tensors}) == 1:
        return [(tensors[0].dtype, tensors[0].device, slice(None))]
    found = [(t.dtype, t.device) for t in tensors]
    return [(*kind, np.flatnonzero([k == kind for k in found])) for kind in dict.fromkeys(found)]


def present(
    gradients: Sequence[torch.Tensor | None], weights: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], Ints]:
    """Return the gradients that there are, contiguous and of the dtype of their weights, and which ones they are."""
    if not all(map(torch.Tensor.is_contiguous, weights)):
        raise ValueError("rank change: adapter parameters must be contiguous, got strides that are not")
    found = [g.to(w.dtype).contiguous() for g, w in zip(gradients, weights, strict=True) if g is not None]
    everything = len(found) == len(gradients)
    return found, np.arange(len(found)) if everything else np.flatnonzero([g is not None for g in gradients])


class Units:
    """All units of a model as flat arrays, in the model's order.

    What follows from ranks and gate buffers is kept until one changes: a step without a decision walks no layer.
    """

    def __init__(self, layers: dict[str, LoraLinear]) -> None:
        self.names = list(layers)
        self.layers = list(layers.values())
        layouts = [layer.layout for layer in self.layers]
        counts = [lay.units for lay in layouts]
        self.counts: Ints = np.array(counts, dtype=np.int64)  # units of each module
        self.first = np.cumsum([0, *counts])
        self.module_of: Ints = np.repeat(np.arange(len(layouts)), counts)
        widths = [(lay.a_width, lay.b_width) for lay in layouts]
        own = [
            a + b if not lay.shared else (a if lay.gate_on_a else b)
            for lay, (a, b) in zip(layouts, widths, strict=True)
        ]
        common = [
            0 if not lay.shared else (b if lay.gate_on_a else a) for lay, (a, b) in zip(layouts, widths, strict=True)
        ]
        self.costs = Costs(np.repeat(own, counts).astype(float), np.array(common, dtype=float), self.module_of)
        self.limit: Ints = np.repeat([layer.max_rank for layer in self.layers], counts).astype(np.int64)
        # Rank changes keep the parameter objects.
        self.gated = [layer.gated for layer in self.layers]  # of each module, the factor that gates act on
        self.ungated = [layer.ungated for layer in self.layers]  # the other one
        gated_first = [w if lay.gate_on_a else w[::-1] for lay, w in zip(layouts, widths, strict=True)]
        self.widths: Ints = np.array(
            gated_first, dtype=np.int64
        )  # [modules, 2]: of a row of the gated, the other factor
        self._seen = -1  # changes of ranks and gates
        self._live = self._first = self._offsets = self.limit
        self._rows = self.widths
        self._gates: list[torch.Tensor] = []

    def __len__(self) -> int:
        return int(self.first[-1])

    def _refresh(self) -> None:
        if self._seen == LoraLinear.changes:
            return
        self._live = np.array([r for layer in self.layers for r in layer.ranks], dtype=np.int64)
        self._first = np.cumsum(self._live) - self._live
        self._offsets = self._first - np.repeat(self._first[self.first[:-1]], self.counts)
        rows = [(layer.layout.gate_on_a, layer.layout.rows(layer.ranks)) for layer in self.layers]
        self._rows = np.array([r if on_a else r[::-1] for on_a, r in rows], dtype=np.int64)
        self._gates = [gate for layer in self.layers if (gate := layer.lora_gate) is not None]
        for array in (self._live, self._first, self._offsets, self._rows):
            array.flags.writeable = False
        self._seen = LoraLinear.changes

    def live(self) -> Ints:
        """Return the live rank of each unit: the same array until a rank changes."""
        self._refresh()
        return self._live

    def first_rows(self) -> Ints:
        """Return the number of each unit's first component, counted through all gated factors."""
        self._refresh()
        return self._first

    def offsets(self) -> Ints:
        """Return the number of each unit's first component within its module's gated factor."""
        self._refresh()
        return self._offsets

    def rows(self) -> Ints:
        """Return the live rows [modules, 2] of each module's gated factor, and of its other one."""
        self._refresh()
        return self._rows

    def module_rows(self) -> Ints:
        """Return the live rows of each module's gated factor."""
        return np.asarray(self.rows()[:, 0], dtype=np.int64)

    def gates(self) -> list[torch.Tensor]:
        """Return the gates of each module; only where a controller sets them."""
        self._refresh()
        return self._gates

    def of_modules(self, modules: Chosen) -> Chosen:
        """Return which units belong to these modules."""
        return modules if isinstance(modules, slice) else np.flatnonzero(np.isin(self.module_of, modules))

    def by_module(self, values: Ints) -> dict[str, list[int]]:
        """Split [units] values into lists by module name."""
        return {
            name: [int(v) for v in values[a:b]]
            for name, a, b in zip(self.names, self.first[:-1], self.first[1:], strict=True)
        }
