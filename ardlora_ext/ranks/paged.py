"""Optimizer state in managed memory: bitsandbytes' paged optimizers keep large moments where GPU and host both reach.

Such a tensor is one of the CPU with two attributes more, `is_paged` and `page_deviceid`; without them the next step
refuses it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["empty", "placed"]


def empty(old: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a new tensor of this shape in the memory and dtype of `old`."""
    if not getattr(old, "is_paged", False):
        return old.new_empty(tuple(shape))
    functional: Any = importlib.import_module("bitsandbytes.functional")
    device = torch.device("cuda", old.page_deviceid)  # type: ignore[attr-defined]
    made: torch.Tensor = functional.get_paged(*shape, dtype=old.dtype, device=device)
    return made


def placed(old: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return these values in the memory of `old`."""
    return empty(old, values.shape).copy_(values) if getattr(old, "is_paged", False) else values
