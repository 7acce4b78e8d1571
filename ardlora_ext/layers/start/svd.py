"""First values of the P Lambda Q form: of a whole layer, and of components that join it later.

lambda is 0 (or 1e-13) while the rows of Q (lora_A) and P^T (lora_B) are not, so the function of the model does not
change and every factor gets gradient from the next step on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.layers.rows import HOST
from ardlora_ext.layers.start.fresh import Fresh

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
            rows = torch.randn(unit.stop - unit.start, factor.shape[1], generator=generator, **HOST)
            factor[unit] = (torch.linalg.qr(rows.T).Q.T if orthonormal else START_STD * rows).to(factor.dtype)


def projected_row(row: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return `row` less one projection, v = g - M^T (M g), over ||v|| + 1e-6; exact if `others` are orthonormal."""
    v = row - others.T @ (others @ row)
    unit: torch.Tensor = v / (v.norm() + 1e-6)
    return unit


def _fill(rows: torch.Tensor, kept: int, init: NewRows, generator: torch.Generator) -> list[Fresh]:
    """Give the rows [r, width] of one unit past the `kept` ones values; return what is to be made orthogonal."""
    width = rows.shape[1]
    for i in range(kept, len(rows)):
        row = torch.randn(width, generator=generator, **HOST)
        rows[i] = projected_row(row, rows[:i]) if init == "projected" else row
    if init == "projected":
        return []
    norm = 1.0
    if init == "mean":
        norm = float(rows[:kept].norm(dim=1).mean()) if kept else START_STD * math.sqrt(width)
    return [Fresh(rows, list(range(kept)), rows[kept:], norm)]


@torch.no_grad()
def start_components(
    rows: Mapping[str, torch.Tensor], ranks: Sequence[int], kept: Sequence[int], init: NewRows, seed: int
) -> list[Fresh]:
    """Start the components of each unit past its `kept` ones, in place.

    Args:
        rows: live rows of lora_A, lora_B and lora_E at the new ranks, float32 on the host; units own their rows of
            all three.
        ranks: of the units.
        kept: of the units.
        init: how.
        seed: of the values.

    Returns:
        What the caller has to give to `orthogonal_rows`.
    """
    found: list[Fresh] = []
    generator = torch.Generator().manual_seed(seed)
    for unit, old in zip(_units(ranks), kept, strict=True):
        if old == unit.stop - unit.start:
            continue
        for factor in ("lora_A", "lora_B"):
            found += _fill(rows[factor][unit], old, init, generator)
        if init == "projected":
            values = rows["lora_E"][unit]
            smallest = float(values[:old].abs().min()) if old else _NEW_LAMBDA
            values[old:] = min(smallest, _NEW_LAMBDA)
    return found
