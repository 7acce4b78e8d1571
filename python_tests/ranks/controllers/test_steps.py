"""While ARD-LoRA is fat, lora_B takes part of each step: what LoRA's division by the rank does to Adam."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import ardlora_ext as ard

from helpers.models import Attention, trainable

FAT, SHARE = 8, 2  # rank at the start, and r0


def wrapped(config: Any) -> nn.Module:
    torch.manual_seed(0)
    return ard.wrap(nn.Sequential(Attention(), Attention()), config)


def trained(
    model: nn.Module, make: Callable[[list[nn.Parameter]], Optimizer], steps: int = 6, **attached: Any
) -> Optimizer:
    optimizer = make(trainable(model))
    ard.attach(model, optimizer, **attached)
    torch.manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(2, 16, 32)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def fat(power: float, **options: Any) -> ard.ArdConfig:
    return ard.ArdConfig(r0=SHARE, lora_alpha=SHARE, head_dim=8, step_power=power, warmup_ratio=0.4, **options)


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_a_fat_start_learns_as_lora_at_that_rank_with_its_own_scaling(power: float) -> None:
    """Under Adam, LoRA of rank 8 scaled by alpha / r (rsLoRA: by alpha / sqrt(r)) is the same function in each step."""

    def adam(parameters: list[nn.Parameter]) -> Optimizer:
        return Adam(parameters, lr=0.01, eps=1e-30)

    ours = wrapped(fat(power))
    trained(ours, adam, total_steps=100)  # six steps of warm-up: no rank has moved
    theirs = wrapped(ard.LoraConfig(r=FAT, lora_alpha=FAT * (SHARE / FAT) ** power, head_dim=8))
    trained(theirs, adam)
    layers = ard.adapters(theirs)
    assert len(layers) == 8
    for name, layer in ard.adapters(ours).items():
        assert layer.ranks == [FAT]
        expected = layers[name].get_delta_weight()
        torch.testing.assert_close(layer.get_delta_weight(), expected, rtol=2e-3, atol=2e-5 * float(expected.norm()))


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, lr=0.01, foreach=True)])
def test_the_share_is_that_of_the_optimizers_own_step(make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    """One step from the same state, with and without: lora_B moves by its share of it, lora_A by all of it."""
    ours = wrapped(fat(1.0))
    optimizer = trained(ours, make, 3, total_steps=100)
    layer = next(iter(ard.adapters(ours).values()))
    before = {name: p.detach().clone() for name, p in layer.factors.items()}
    (ours(torch.ones(16, 32))).square().mean().backward()
    gradients = {p: p.grad.clone() for p in trainable(ours) if p.grad is not None}
    twin = {p: p.detach().clone().requires_grad_() for p in gradients}
    other = make(list(twin.values()))
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for p, copy in twin.items():
        copy.grad = gradients[p]
    other.step()
    optimizer.step()
    for name, share in (("lora_A", 1.0), ("lora_B", SHARE / FAT)):
        p = layer.factors[name]
        expected = before[name] + share * (twin[p].detach() - before[name])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-8)


def test_what_an_optimizer_keeps_as_a_copy_of_the_weights_takes_the_share_too() -> None:
    """Schedule-free's z moves with its y, else their mean would not be what was trained."""
    package = pytest.importorskip("pytorch_optimizer")

    def free(parameters: list[nn.Parameter]) -> Optimizer:
        made: Optimizer = package.ScheduleFreeAdamW(parameters, lr=0.01)
        return made

    moved = {}
    for power in (0.0, 1.0):
        model = wrapped(fat(power))
        optimizer = trained(model, free, 1, total_steps=100)
        moved[power] = optimizer.state[next(iter(ard.adapters(model).values())).lora_B]["z"].clone()
    assert float(moved[0.0].abs().max()) > 0
    torch.testing.assert_close(moved[1.0], moved[0.0] * SHARE / FAT)


def test_the_share_grows_to_the_whole_step_at_the_final_ranks() -> None:
    model = wrapped(fat(1.0))
    optimizer = AdamW(trainable(model), lr=0.01)
    controller = ard.attach(model, optimizer, total_steps=20)
    seen = []
    for _ in range(20):
        seen.append(controller.step_share)
        model(torch.randn(16, 32)).square().mean().backward()
        optimizer.step()
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (SHARE / FAT, 1.0)


@pytest.mark.parametrize("power", [-0.1, 1.5, float("nan")])
def test_a_power_out_of_range_is_refused(power: float) -> None:
    with pytest.raises(ValueError, match=r"ArdConfig: step_power must be in \[0, 1\], got"):
        ard.ArdConfig(step_power=power)


def test_the_paper_knows_no_such_power() -> None:
    with pytest.raises(ValueError, match="step_power must come with mode='anneal'"):
        ard.ArdConfig(mode="paper", step_power=0.5)
