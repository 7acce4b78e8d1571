"""First values of the P Lambda Q form: of a whole layer, and of components that join it later.

lambda is 0 (or 1e-13) while the rows of Q (lora_A) and P^T (lora_B) are not, so the function of the model does not
change and every factor gets gradient from the next step on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from ardlora_ext.layers import LoraLinear

# How new components start. `zero`: a row of lora_A, lora_B zero. The others fill both rows: Gram-Schmidt against the
# live rows and norm 1 (`unit`) or their mean norm (`mean`), or one projection as in ElaLoRA's code (`projected`).
NewRows = Literal["zero", "unit", "mean", "projected"]

START_STD = 0.02  # of the entries of P and Q, as in AdaLoRA's code and PEFT
_NEW_LAMBDA = 1e-13  # of ElaLoRA's code


def _units(ranks: Sequence[int]) -> list[slice]:
    """Rows of each unit in factors that have one row per unit and component."""
    ends = [sum(ranks[: u + 1]) for u in range(len(ranks))]
    return [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]


@torch.no_grad()
def start_svd(layer: LoraLinear, orthonormal: bool, generator: torch.Generator) -> None:
    """Start a layer with trained gates: P and Q Gaussian (std 0.02) or with orthonormal rows, lambda 0."""
    for factor in (layer.lora_A, layer.lora_B):
        for unit in _units(layer.ranks):
            rows = torch.randn(unit.stop - unit.start, factor.shape[1], generator=generator)
            factor[unit] = (torch.linalg.qr(rows.T).Q.T if orthonormal else START_STD * rows).to(factor.dtype)


def orthogonal_row(row: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the unit vector of `row` [width] orthogonal to `others` [n, width], n < width, in float64 accuracy."""
    basis = torch.linalg.qr(others.double().T).Q
    v = row.double()
    for _ in range(2):  # twice is enough for full accuracy
        v = v - basis @ (basis.T @ v)
    unit: torch.Tensor = v / v.norm()
    return unit.to(row.dtype)


def projected_row(row: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return `row` less one projection, v = g - M^T (M g), over ||v|| + 1e-6; exact if `others` are orthonormal."""
    v = row - others.T @ (others @ row)
    unit: torch.Tensor = v / (v.norm() + 1e-6)
    return unit


def _fill(rows: torch.Tensor, kept: int, init: NewRows, generator: torch.Generator) -> None:
    """Give the rows [r, width] of one unit past the `kept` ones a direction of their own, in place."""
    width = rows.shape[1]
    norm = 1.0
    if init == "mean":
        norm = float(rows[:kept].float().norm(dim=1).mean()) if kept else START_STD * math.sqrt(width)
    for i in range(kept, len(rows)):
        gaussian = torch.randn(width, generator=generator)
        others = rows[:i].float()
        row = projected_row(gaussian, others) if init == "projected" else orthogonal_row(gaussian, others)
        rows[i] = (norm * row).to(rows.dtype)


@torch.no_grad()
def start_components(layer: LoraLinear, kept: Sequence[int], init: NewRows, generator: torch.Generator) -> None:
    """Start the components of each unit past its `kept` ones: rows of lora_A and lora_B, and lambda.

    The layer has its new ranks and buffers already; its units own their rows of both factors.
    """
    for unit, old in zip(_units(layer.ranks), kept, strict=True):
        if old == unit.stop - unit.start:
            continue
        for factor in (layer.lora_A.data, layer.lora_B.data):
            _fill(factor[unit], old, init, generator)
        if layer.lora_E is not None and init == "projected":
            values = layer.lora_E.data[unit]
            smallest = float(values[:old].abs().min()) if old else _NEW_LAMBDA
            values[old:] = min(smallest, _NEW_LAMBDA)
