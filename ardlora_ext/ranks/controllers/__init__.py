"""Rank controllers: one per method, all driven the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ardlora_ext.config import AdaConfig, AdapterConfig, ArdConfig, ElaConfig, LoraConfig
from ardlora_ext.ranks.controllers.ard.anneal import AnnealController
from ardlora_ext.ranks.controllers.ard.controller import ArdController
from ardlora_ext.ranks.controllers.base import Controller, FixedController
from ardlora_ext.ranks.controllers.svd.ada import AdaController
from ardlora_ext.ranks.controllers.svd.ela import ElaController

__all__ = [
    "AdaController",
    "AnnealController",
    "ArdController",
    "Controller",
    "ElaController",
    "FixedController",
    "make_controller",
]


def make_controller(
    model: nn.Module,
    config: AdapterConfig,
    total_steps: int | None,
    holdout: Callable[[], torch.Tensor] | None = None,
) -> Controller[Any]:
    """Return the controller that belongs to a config."""
    if isinstance(config, ArdConfig) and config.mode == "anneal":
        if holdout is not None and config.budget != "auto":
            raise ValueError(
                "attach: holdout must come with ArdConfig(budget='auto') or ArdConfig(mode='paper'), got "
                f"mode='anneal' and budget={config.budget}"
            )
        return AnnealController(model, config, total_steps, holdout)
    if isinstance(config, ArdConfig):
        return ArdController(model, config, total_steps, holdout)
    if holdout is not None:
        raise ValueError(f"attach: holdout must come with ArdConfig, got {type(config).__name__}")
    if isinstance(config, ElaConfig):
        return ElaController(model, config, total_steps)
    if isinstance(config, AdaConfig):
        return AdaController(model, config, total_steps)
    if isinstance(config, LoraConfig):
        return FixedController(model, config, total_steps)
    raise TypeError(f"attach: config must be one of this package, got {type(config).__name__}")
