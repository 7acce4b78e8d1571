"""Rank controllers: one per method, all driven the same way."""

from __future__ import annotations

from typing import Any

from torch import nn

from ardlora_ext.config import AdapterConfig, ArdConfig, LoraConfig
from ardlora_ext.controllers.ard import ArdController
from ardlora_ext.controllers.base import Controller, FixedController

__all__ = ["ArdController", "Controller", "FixedController", "make_controller"]


def make_controller(model: nn.Module, config: AdapterConfig, total_steps: int | None) -> Controller[Any]:
    """Return the controller that belongs to a config."""
    if isinstance(config, ArdConfig):
        return ArdController(model, config, total_steps)
    if isinstance(config, LoraConfig):
        return FixedController(model, config, total_steps)
    raise TypeError(f"attach: config must be LoraConfig or ArdConfig, got {type(config).__name__}")
