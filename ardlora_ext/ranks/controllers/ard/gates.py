"""The gates of ARD-LoRA's components at given soft ranks: as numbers, and written into the layers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ardlora_ext.config import ArdConfig
from ardlora_ext.native.dispatch import set_gates
from ardlora_ext.native.transfers import sent
from ardlora_ext.ranks.controllers.costs import Floats, Ints
from ardlora_ext.ranks.controllers.units import Chosen, Units, kinds

_BYTES = 4  # of a gate, float32


class Gates:
    """The gates of all units. Blocks of them are kept until a rank changes or a buffer moves."""

    def __init__(self, units: Units, config: ArdConfig) -> None:
        self.units = units
        kind = ("ramp", "ste", "sigmoid", "scale").index(config.gate)
        width = config.gate_width if config.gate == "sigmoid" else float(config.r0)
        self._formula = kind, config.gate_floor, width  # as in csrc/include/ardlora/regularizer.h
        self._blocks: list[tuple[torch.device, Chosen, Ints]] = []  # device, units there, their gates and ranks
        self._of: tuple[Ints | None, list[int]] = None, []  # live ranks and addresses that the blocks belong to

    def values(self, rho: Floats) -> NDArray[np.float32]:
        """Return the gate of every live component, unit after unit, at soft ranks rho [units]."""
        live = self.units.live()
        values = np.empty(int(live.sum()), dtype=np.float32)
        blocks = np.stack([values.ctypes.data + _BYTES * self.units.first_rows(), live], axis=1)
        set_gates(blocks, rho, *self._formula, torch.device("cpu"))
        return values

    def write(self, rho: Floats) -> None:
        """Write them into the layers, wherever these are."""
        live, address = self.units.live(), [g.data_ptr() for g in self.units.gates()]  # a storage may move in place
        if self._of[0] is not live or self._of[1] != address:
            self._find(address)
            self._of = live, address
        for device, here, blocks in self._blocks:
            set_gates(blocks, rho[here], *self._formula, device)

    @torch.no_grad()
    def slide(self, opened: Ints, progress: float) -> None:
        """Move the gates of the first `opened` [units] components of each unit towards 1, the others towards 0."""
        units, live = self.units, self.units.live()
        component = np.arange(live.sum()) - np.repeat(units.first_rows(), live)
        goals = (component < np.repeat(opened, live)).astype(np.float32)
        there = {device: sent(goals, device) for device in {gate.device for gate in units.gates()}}
        end = 0
        for gate, rows in zip(units.gates(), units.module_rows().tolist(), strict=True):
            begin, end = end, end + rows
            gate[:rows].lerp_(there[gate.device][begin:end], progress)

    def _find(self, address: list[int]) -> None:
        units = self.units
        first = np.repeat(np.array(address, dtype=np.int64), units.counts) + _BYTES * units.offsets()
        blocks = np.stack([first, units.live()], axis=1)
        found = [(device, units.of_modules(modules)) for _, device, modules in kinds(units.gates())]
        self._blocks = [(device, here, np.ascontiguousarray(blocks[here])) for device, here in found]
