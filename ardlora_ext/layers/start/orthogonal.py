"""Orthogonal rows of lora_A at the start, and where the directions of a block of the weight go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.layers.rows import HOST
from ardlora_ext.native import reference
from ardlora_ext.native.units import UnitLayout

ROW_NORM = 1.0 / math.sqrt(3.0)  # of a Kaiming row of lora_A, whatever its width


@dataclass(frozen=True)
class Block:
    """A part of the weight whose directions are found on their own, [n, k] = weight[out, cols]."""

    out: slice
    cols: slice
    rank: int
    units: list[int]


def blocks(layout: UnitLayout, ranks: Sequence[int]) -> list[Block]:
    """The whole weight where units share a factor (or there is one), else each unit's slice."""
    if layout.shared or layout.units == 1:
        return [Block(slice(None), slice(None), max(ranks), list(range(layout.units)))]
    slices = reference.unit_slices(layout, ranks)
    return [Block(out, cols, ranks[u], [u]) for u, (_, _, cols, out) in enumerate(slices)]


def spread(layout: UnitLayout, ranks: Sequence[int], block: Block, rows: torch.Tensor, into: torch.Tensor) -> None:
    """Write directions [rank, k] of a block's input columns into the rows of lora_A that hold them."""
    for u in block.units:
        a_rows, _, cols, _ = reference.unit_slices(layout, ranks)[u]
        part = rows[: ranks[u]]
        into[a_rows] = part[:, cols] if layout.gate_on_a else part


@torch.no_grad()
def start_orthogonal(layer: LoraLinear, generator: torch.Generator | None = None) -> None:
    """Make the rows of lora_A of each unit orthogonal, with the norm 1/sqrt(3) that Kaiming rows have; B stays 0."""
    own = layer.layout.gate_on_a or not layer.layout.shared
    counts = layer.ranks if own else [max(layer.ranks)]
    begin = 0
    for count in counts:
        basis = torch.linalg.qr(torch.randn(layer.layout.a_width, count, generator=generator, **HOST)).Q
        layer.lora_A[begin : begin + count] = (ROW_NORM * basis.T).to(layer.lora_A.dtype)
        begin += count
