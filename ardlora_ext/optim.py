"""Optimizer state that follows a parameter whose rows change.

A moment is any state tensor with the parameter's shape; scalars such as `step` stay as they are. That covers torch's
Adam, AdamW, NAdam, RAdam, Adamax, Adagrad, RMSprop and SGD with momentum, single, foreach and fused alike.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch.optim import Optimizer

State = MutableMapping[str, Any]

# Their state is not one row per component: factored (Adafactor), flat over all parameters (LBFGS), sparse.
_REFUSED = ("Adafactor", "LBFGS", "SparseAdam")


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside wrappers such as Accelerate's.

    Raises:
        TypeError: there is none.
    """
    seen = optimizer
    while not isinstance(seen, Optimizer) or type(seen).__name__ == "AcceleratedOptimizer":
        seen = getattr(seen, "optimizer", None)
        if seen is None:
            raise TypeError(f"attach: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return seen


def moments(optimizer: Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Return the state tensors of `parameter` that have its rows.

    Raises:
        ValueError: some state is neither a scalar nor shaped like the parameter, so it cannot follow a rank change.
    """
    found = {}
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, torch.Tensor) or (value.numel() <= 1 and value.shape != parameter.shape):
            if value is None or isinstance(value, (int, float, bool, torch.Tensor)):
                continue
            raise ValueError(f"rank change: optimizer state '{key}' must be a tensor or a number, got {type(value)}")
        if value.shape != parameter.shape or not value.is_contiguous():
            raise ValueError(
                f"rank change: optimizer state '{key}' of {type(optimizer).__name__} must have the parameter's shape "
                f"{list(parameter.shape)}, got {list(value.shape)}; use an optimizer with one moment per weight"
            )
        found[key] = value
    return found


def check_optimizer(optimizer: Optimizer, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Check that `optimizer` trains every adapter parameter and that its state can follow rank changes.

    Raises:
        ValueError: it holds none or only some of them, or keeps state that cannot be remapped.
    """
    name = type(optimizer).__name__
    if name in _REFUSED:
        raise ValueError(f"attach: optimizer state must be one moment per weight, got {name}; use Adam, AdamW or SGD")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = list(parameters)
    missing = [n for n, p in named if id(p) not in held]
    if missing:
        count = "none" if len(missing) == len(named) else f"{len(named) - len(missing)} of {len(named)}"
        example = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"attach: optimizer must hold the adapter parameters, got {count} of them (missing: {example}); "
            "build it after ardlora_ext.wrap(model, ...)"
        )
    for _, parameter in named:
        moments(optimizer, parameter)
