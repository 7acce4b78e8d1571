"""Runs of ElaLoRA and AdaLoRA, one step at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext.config import AdapterConfig

from helpers.slow_svd import EPS, batch, chain_and_teacher, warmup_decay

STEPS, LR = 300, 3e-3


class Run:
    """A training loop with Adam and a schedule on a chain that learns from a teacher, one step at a time."""

    def __init__(self, config: AdapterConfig, total: int = STEPS, lr: float = LR, clip: float | None = None) -> None:
        self.model, self.teacher = chain_and_teacher()
        self.teacher.requires_grad_(False)
        ard.wrap(self.model, config)
        self.total, self.t, self.lr, self.clip = total, 0, lr, clip
        self.layers = list(ard.adapters(self.model).values())
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=lr, eps=EPS)
        self.controller = ard.attach(self.model, self.optimizer, total_steps=total)

    def step(self) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", self.lr) * warmup_decay(self.t, self.total)
        x = batch(self.t)
        loss = (self.model(x) - self.teacher(x)).square().mean()
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.t += 1
        return loss.item()

    @property
    def ranks(self) -> list[int]:
        return [r for ranks in self.controller.ranks().values() for r in ranks]

    def unmasked(self) -> list[list[bool]]:
        gates = [layer.lora_E.detach()[: layer.ranks[0], 0] for layer in self.layers if layer.lora_E is not None]
        return [(gate != 0).tolist() for gate in gates]


def ela_config(**options: Any) -> ard.ElaConfig:
    return ard.ElaConfig(**{"r": 4, "lora_alpha": 8.0, "b": 3, "deltaT": 10} | options)


def ela_run(total: int = STEPS, lr: float = LR, clip: float | None = None, **options: Any) -> Run:
    return Run(ela_config(**options), total, lr, clip)


def ada_config(**options: Any) -> ard.AdaConfig:
    return ard.AdaConfig(**{"init_r": 6, "target_r": 3, "lora_alpha": 12.0, "tinit": 20, "tfinal": 60} | options)


def ada_run(total: int = STEPS, clip: float | None = None, **options: Any) -> Run:
    return Run(ada_config(**options), total, LR, clip)
