"""ARD-LoRA on a bed whose ranks are known: what it finds, keeps and pays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.optim import Adam, AdamW

import ardlora_ext as ard
from ardlora_ext.config import AdapterConfig
from ardlora_ext.ranks.controllers.ard.controller import ArdController

from helpers.ard_runs import EveryStep, fast, run
from helpers.models import Attention, trainable

WIDTH = 24
PLANTED = (0, 1, 1, 2, 2, 4, 5, 6)
BED_STEPS = 250


class Bed(nn.Module):
    """Independent linear units; each has to learn an update of its own planted rank."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in PLANTED)
        generator = torch.Generator().manual_seed(1)
        self.updates = []
        for rank in PLANTED:
            left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q for _ in range(2))
            self.updates.append(left[:, :rank] @ torch.diag(torch.linspace(2, 1, rank)) @ right[:rank])
        self.targets = [u.weight.detach() + d for u, d in zip(self.units, self.updates, strict=True)]

    def loss(self) -> torch.Tensor:
        losses = []
        for unit, target in zip(self.units, self.targets, strict=True):
            x = torch.randn(16, WIDTH)
            noisy = x @ target.T + 0.3 * torch.randn(16, WIDTH)
            losses.append((unit(x) - noisy).square().sum(dim=1).mean())
        return torch.stack(losses).mean()

    def regret(self) -> float:
        """What is left to learn: the expected loss above the noise."""
        left = [
            d - layer.get_delta_weight() for d, layer in zip(self.updates, ard.adapters(self).values(), strict=True)
        ]
        return sum(float(d.square().sum()) for d in left)


def fit(config: AdapterConfig, steps: int = BED_STEPS, watch: EveryStep | None = None) -> tuple[Bed, Any]:
    torch.manual_seed(0)
    bed = ard.wrap(Bed(), config)
    optimizer = Adam(trainable(bed), lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
    controller = ard.attach(bed, optimizer, total_steps=steps)
    for t in range(steps):
        bed.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if watch is not None:
            watch(t + 1, controller, bed)
    return bed, controller


def test_planted_ranks_are_found() -> None:
    config = ard.ArdConfig(mode="paper", granularity="head", r0=3, lora_alpha=3, lr_alpha=0.05)
    bed, controller = fit(config)
    ranks = [units[0] for units in controller.ranks().values()]
    assert spearmanr(ranks, PLANTED).statistic > 0.8
    assert min(ranks) < config.r0 < max(ranks), "some fall, some grow"
    pairs = zip(ranks, PLANTED, strict=True)
    assert any(rank == planted > config.r0 for rank, planted in pairs), "one grows to what is planted"
    report, budget = ard.parameters_report(bed), 3 * 2 * WIDTH * len(PLANTED)
    assert report.live <= budget
    plain, _ = fit(ard.LoraConfig(r=3, lora_alpha=3))
    assert ard.parameters_report(plain).live == budget
    assert bed.regret() < 0.7 * plain.regret()


def test_a_change_of_ranks_brings_the_least_useful_component_last() -> None:
    torch.manual_seed(0)
    model = ard.wrap(
        Attention(), ard.ArdConfig(mode="paper", r0=3, granularity="matrix", warmup_ratio=0.0, update_interval=1)
    )
    optimizer = AdamW(trainable(model), lr=1e-3)
    controller = ard.attach(model, optimizer, total_steps=100)
    layer = ard.adapters(model)["up"]
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor[:4] = torch.randn(4, factor.shape[1])
        layer.lora_B[0] *= 0.01  # the first is the least useful of the open ones
    useful = (layer.lora_A.norm(dim=1) * layer.lora_B.norm(dim=1))[:3].sort(descending=True).values
    assert useful[2] < 0.1 * useful[1]
    x = torch.randn(4, 32)
    model(x).square().mean().backward()
    optimizer.step()
    after = (layer.lora_A.norm(dim=1) * layer.lora_B.norm(dim=1))[:3]
    torch.testing.assert_close(after.detach(), useful.detach(), rtol=0.1, atol=0.05)
    assert controller.step == 1


def test_a_higher_price_buys_fewer_ranks() -> None:
    def mean_rank(l1: float) -> float:
        _, controller = fit(
            ard.ArdConfig(mode="paper", granularity="head", r0=3, lora_alpha=3, lr_alpha=0.05, l1=l1), 80
        )
        return float(np.mean([units[0] for units in controller.ranks().values()]))

    means = [mean_rank(l1) for l1 in (0.0, 0.5, 1.5, 30.0)]
    assert means == sorted(means, reverse=True)
    assert means[0] > means[1] > means[2] > means[3] == 1.0, "the floor is rank 1"


def test_without_a_price_nothing_shrinks() -> None:
    last = np.zeros(1)

    def never_less(_: int, controller: ArdController, __: nn.Module) -> None:
        nonlocal last
        assert (controller.alpha >= last).all()
        last = controller.alpha.copy()

    controller = run(fast(l1=0.0), 60, never_less)
    assert controller.alpha.mean() > 1
