"""Runs of ARD-LoRA that are watched step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

import ardlora_ext as ard
from ardlora_ext.ranks.controllers.ard.controller import ArdController

from helpers.models import Attention, trainable

EveryStep = Callable[[int, ArdController, nn.Module], None]


def run(config: ard.ArdConfig, steps: int, watch: EveryStep | None = None, lr: float = 0.01) -> ArdController:
    """Fit random targets for `steps` steps; `watch` looks after each."""
    torch.manual_seed(0)
    model = ard.wrap(nn.Sequential(Attention(), Attention()), config)
    data = torch.randn(steps, 2, 16, 32)
    optimizer = AdamW(trainable(model), lr=lr)
    controller = ard.attach(model, optimizer, total_steps=steps)
    assert isinstance(controller, ArdController)
    for t in range(steps):
        (model(data[t, 0]) - data[t, 1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            watch(t + 1, controller, model)
    return controller


def heads(**options: Any) -> ard.ArdConfig:
    """The paper's mode, a rank per head."""
    return ard.ArdConfig(mode="paper", granularity="head", **options)


def fast(**options: Any) -> ard.ArdConfig:
    """Ranks that move within a few steps."""
    return ard.ArdConfig(
        **{
            "mode": "paper",
            "granularity": "head",
            "r0": 3,
            "r_max": 6,
            "head_dim": 8,
            "update_interval": 2,
            "lr_alpha": 0.1,
            **options,
        }
    )
