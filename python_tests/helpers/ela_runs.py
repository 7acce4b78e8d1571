"""Runs of ElaLoRA, one step at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import ardlora_ext as ard

from helpers.slow_svd import EPS, batch, chain_and_teacher, warmup_decay

STEPS, LR = 300, 3e-3


def prepared(**options: Any) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the wrapped chain and its teacher."""
    model, teacher = chain_and_teacher()
    ard.wrap(model, ard.ElaConfig(**{"r": 4, "lora_alpha": 8.0, "b": 3, "deltaT": 10} | options))
    teacher.requires_grad_(False)
    return model, teacher


class Run:
    """A training loop with Adam and a schedule, one step at a time."""

    def __init__(self, total: int = STEPS, lr: float = LR, clip: float | None = None, **options: Any) -> None:
        self.model, self.teacher = prepared(**options)
        self.total, self.t, self.clip = total, 0, clip
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=lr, eps=EPS)
        self.controller = ard.attach(self.model, self.optimizer, total_steps=total)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: warmup_decay(t, total))

    def step(self) -> float:
        x = batch(self.t)
        loss = (self.model(x) - self.teacher(x)).square().mean()
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.t += 1
        return loss.item()

    @property
    def ranks(self) -> list[int]:
        return [r for ranks in self.controller.ranks().values() for r in ranks]
