"""Soft orthogonality of the factors of P Lambda Q: R(M) = ||M M^T - I||_F^2 over the rows of a unit, and its gradient.

The gradient is 4 (M M^T - I) M: two rank-sized products on M, no graph. AdaLoRA's and ElaLoRA's code take the norm
unsquared and the mean over all factors instead. On the CPU one native call does all units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch

from ardlora_ext.layers.start.svd import START_STD
from ardlora_ext.native.compiled import DTYPE_CODES, core, threads

Form = Literal["squared", "norm"]


class Rows(NamedTuple):
    """The rows [begin, end) of one unit in a factor, the factor's gradient, and how strong the penalty is there."""

    factor: torch.Tensor
    grad: torch.Tensor
    begin: int
    end: int
    strength: float


def penalty(rows: torch.Tensor, form: Form) -> torch.Tensor:
    """Return ||M M^T - I||_F^2, or the norm itself, of rows M [r, width]."""
    distance = (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).square().sum()
    return distance if form == "squared" else distance.sqrt()


def penalty_gradient(rows: torch.Tensor, form: Form) -> torch.Tensor:
    """Return the gradient of `penalty` by the rows [..., r, width]; 0 where the norm is 0."""
    error = rows @ rows.mT
    error.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    gradient = error @ rows
    if form == "squared":
        return 4.0 * gradient
    norm = error.flatten(-2).norm(dim=-1)[..., None, None]
    return torch.where(norm > 0.0, 2.0 / norm * gradient, 0.0)


@torch.no_grad()
def add_penalty_gradients(units: Iterable[Rows], form: Form) -> None:
    """Add strength times the gradient of `penalty` to the gradient of every unit's rows."""
    blocks, strengths = [], []
    alike: dict[tuple[int, int, torch.dtype, torch.device, float], list[Rows]] = {}
    for unit in units:
        factor, grad, begin, end, strength = unit
        width = factor.shape[1]
        if factor.device.type == "cpu" and grad.is_contiguous() and grad.dtype == factor.dtype:
            at = begin * width * factor.element_size()
            addresses = factor.data_ptr() + at, grad.data_ptr() + at
            blocks.append((*addresses, end - begin, width, DTYPE_CODES[factor.dtype]))
            strengths.append(strength)
        else:
            alike.setdefault((end - begin, width, factor.dtype, factor.device, strength), []).append(unit)
    if blocks:
        core.soft_orthogonality(np.array(blocks, dtype=np.int64), np.array(strengths), form == "norm", threads())
    for (rank, *_, strength), same in alike.items():  # all of one shape in one product
        if rank:
            rows = torch.stack([u.factor[u.begin : u.end] for u in same])
            gradient = penalty_gradient(rows.float(), form)
            torch._foreach_add_([u.grad[u.begin : u.end] for u in same], gradient.unbind(), alpha=strength)


@lru_cache
def share(rank: int, width: int, units: int, form: Form) -> float:
    """Return the weight of one factor [rank, width] among the two factors of each of `units`.

    `norm`: 1 / (2 units), a mean. `squared`: so that the gradient at the Gaussian start is as large as with `norm`,
    1 / (4 units ||M M^T - I||) with the expected distance of that start; one weight then means the same in both forms.
    """
    if form == "norm":
        return 0.5 / units
    square = START_STD**2 * width  # of a row's norm
    distance = math.sqrt(rank * ((1.0 - square) ** 2 + square**2 * (rank + 1) / width))
    return 0.25 / (units * distance)
