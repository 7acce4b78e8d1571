"""Rows of factors: how many are allocated, how they start and are fitted."""

from __future__ import annotations

import math
from typing import Any

import torch

HOST: Any = {"dtype": torch.float32, "device": "cpu"}  # of what starts there, whatever torch's defaults are
_CLASS = 8  # rows of a capacity class
_SMALL_CLASS = 4  # below one class


def capacity_of(rows: int) -> int:
    """Return the rows to allocate for `rows` live ones: whole classes, whatever the ranks were before."""
    step = _SMALL_CLASS if rows <= _SMALL_CLASS else _CLASS
    return max(step, math.ceil(rows / step) * step)


def fit_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Return `tensor` cut to `rows` rows, or with rows of zeros up to there."""
    if len(tensor) >= rows:
        return tensor[:rows]
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def initial_rows(rows: int, width: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return `rows` new rows of lora_A: uniform with bound 1/sqrt(width), the Kaiming start of LoRA."""
    drawn = torch.rand(rows, width, generator=generator, **HOST)
    return drawn.mul_(2.0).sub_(1.0).div_(math.sqrt(width))
