"""Optimizer steps, and what of their state followed a change of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import ardlora_ext as ard
from ardlora_ext import UnitUpdate
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.native import reference

Rows = dict[tuple[str, int, int], dict[str, torch.Tensor]]


def step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    """One optimizer step on random gradients, which stay."""
    generator = torch.Generator().manual_seed(seed)
    for layer in ard.adapters(model).values():
        for factor, rows in zip((layer.lora_A, layer.lora_B), layer.layout.rows(layer.ranks), strict=True):
            factor.grad = torch.zeros_like(factor)
            factor.grad[:rows] = torch.randn(rows, factor.shape[1], generator=generator)
    optimizer.step()


def components(layer: LoraLinear, optimizer: Optimizer | None) -> Rows:
    """Copies of every row of every component: (factor, unit, component) -> parameter, gradient and moments."""
    found: Rows = {}
    gated = 0 if layer.layout.gate_on_a else 1
    for factor, parameter in layer.factors.items():
        tensors = {"parameter": parameter.detach(), "grad": parameter.grad}
        tensors |= optimizer.state[parameter] if optimizer is not None and parameter in optimizer.state else {}
        side = {"lora_A": 0, "lora_B": 1, "lora_E": gated}[factor]
        for u, slices in enumerate(reference.unit_slices(layer.layout, layer.ranks)):
            for j, row in enumerate(range(slices[side].start, slices[side].stop)):
                found[factor, u, j] = {
                    key: value[row].clone()
                    for key, value in tensors.items()
                    if value is not None and value.shape == parameter.shape
                }
    return found


def assert_followed(
    before: Rows, layer: LoraLinear, optimizer: Optimizer | None, units: tuple[UnitUpdate, ...]
) -> None:
    """Kept components are bitwise what they were; new rows of lora_B, and the history of new rows, are zero."""
    shared = ("lora_B" if layer.layout.gate_on_a else "lora_A") if layer.layout.shared else None
    for (factor, u, j), rows in components(layer, optimizer).items():
        assert rows.keys() == next(iter(before.values()), rows).keys()
        for key, row in rows.items():
            if j < len(units[u].keep):
                assert torch.equal(row, before[factor, u, units[u].keep[j]][key]), (factor, u, j, key)
            elif factor != shared and (key != "parameter" or factor == "lora_B"):
                assert not row.any(), (factor, u, j, key)
    for parameter, live in zip((layer.lora_A, layer.lora_B), layer.layout.rows(layer.ranks), strict=True):
        state = optimizer.state[parameter] if optimizer is not None else {}
        for value in (parameter, parameter.grad, *state.values()):
            if isinstance(value, torch.Tensor) and value.dim() == 2:
                assert not value[live:].any(), "rows past the live ones are zero"


class RowProducts(Optimizer):
    """Products of rows with rows, as preconditioners keep."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["gram"] = p.grad @ p.grad.T
