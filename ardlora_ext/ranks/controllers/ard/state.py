"""What a saved state of ARD-LoRA must be before any of it is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def check_state(state: Mapping[str, Any], groups: int, units: int) -> None:
    """Check the lengths and the numbers of a state.

    Args:
        state: from `ArdController.state_dict`.
        groups: factors alpha of the controller.
        units: of the model.

    Raises:
        ValueError: it is of another model, or holds NaN or Inf.
    """
    lengths = dict.fromkeys(("alpha", "previous", "gain", "unit_price", "harden_from"), groups)
    lengths |= dict.fromkeys(("target", "reported", "fisher"), units)
    for key, length in lengths.items():
        if state[key] is not None and len(state[key]) != length:
            raise ValueError(f"state: {key} must have {length} entries, got {len(state[key])}")
    for key in (*lengths, "grad_square", "price", "dual", "lipschitz", "harden_at", "spectrum"):
        if state[key] is not None and not np.isfinite(np.asarray(state[key], dtype=np.float64)).all():
            raise ValueError(f"state: {key} must be finite, got NaN or Inf")
