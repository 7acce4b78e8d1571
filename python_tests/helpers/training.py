"""A training run of a few steps in which ranks move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import ardlora_ext as ard

from helpers.models import Attention

STEPS = 60


def fast_config(**options: Any) -> ard.ArdConfig:
    """Ranks that move within a few steps."""
    fast = {"r0": 2, "head_dim": 8, "update_interval": 2, "lr_alpha": 0.1, "warmup_ratio": 0.05, "freeze_ratio": 0.2}
    return ard.ArdConfig(**{"mode": "paper", "granularity": "head", **fast, **options})


def bed(seed: int = 0) -> tuple[nn.Module, Callable[[int], torch.Tensor]]:
    """A model, and its mean squared error on the examples of one step."""
    torch.manual_seed(seed)
    model = Attention()
    data = torch.randn(2, 8 * STEPS, 32)

    def loss(t: int, of: slice = slice(0, 8)) -> torch.Tensor:
        x, y = data[:, 8 * t : 8 * t + 8][:, of]
        return (model(x) - y).square().sum() / 256

    return model, loss


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    """Same weights, ranks and decisions, bit for bit."""
    a, b = bits(ours), bits(theirs)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert ours._ardlora.controller.state_dict() == theirs._ardlora.controller.state_dict()
