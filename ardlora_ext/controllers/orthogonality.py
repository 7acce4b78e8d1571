"""Soft orthogonality of the factors of P Lambda Q: R(M) = ||M M^T - I||_F^2 over the rows of a unit, and its gradient.

The gradient is 4 (M M^T - I) M: two rank-sized products on M, no graph. AdaLoRA's and ElaLoRA's code take the norm
unsquared and the mean over all factors instead.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from ardlora_ext.start import START_STD

Form = Literal["squared", "norm"]


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
