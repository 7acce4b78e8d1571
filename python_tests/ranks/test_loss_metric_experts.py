"""The metric of the loss on experts: each has the moments of its own rows, on every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext.layers.experts import ExpertStack
from ardlora_ext.ranks.loss_metric import LossMetric, measured
from ardlora_ext.ranks.recompress import cores, groups

from helpers.experts import ExpertBed, tiny_experts, tokens
from helpers.models import trainable

PLANTED, COUNTS = (1, 2, 3, 4), (5, 0, 9, 2)


def bed(gated: bool = False) -> tuple[Any, ExpertStack]:
    torch.manual_seed(0)
    config = ard.ArdConfig(mode="paper", r0=3, granularity="head") if gated else ard.LoraConfig(r=3)
    model: Any = ard.wrap(ExpertBed(PLANTED, COUNTS), config)
    stack = ard.adapters(model)["experts.weight"]
    assert isinstance(stack, ExpertStack)
    with torch.no_grad():
        stack.lora_B.normal_()
        if stack.gate is not None:
            stack.gate.uniform_(0.2, 1.0)
    return model, stack


@pytest.mark.parametrize("gated", [False, True])
def test_moments_of_an_expert_are_those_of_its_rows(gated: bool) -> None:
    model, stack = bed(gated)
    metric = LossMetric({"e": stack})
    metric.watch(True)
    x, dy = torch.randn(16, 24), torch.randn(16, 24)
    model.experts(x.requires_grad_(), list(COUNTS)).backward(dy)
    metric.take()
    ours, means = groups(stack), metric.means["e"]
    rows = [dict(zip(("x", "dy"), pair, strict=True)) for pair in zip(x.split(COUNTS), dy.split(COUNTS), strict=True)]
    sums = [(part["dy"] @ g.own[0].float().T).square().sum() for part, g in zip(rows, ours, strict=True)]
    for e, (part, group) in enumerate(zip(rows, ours, strict=True)):
        h, k = part["x"].double() @ group.common.T, part["dy"].double() @ group.own[0].T
        torch.testing.assert_close(means.common[e], h.T @ h / max(COUNTS[e], 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(means.own[e], k.T @ k / float(sum(sums)), rtol=1e-4, atol=1e-5)
    assert not means.common[1].any()  # nobody came


def test_paths_see_the_same() -> None:
    found = []
    for path in ("grouped_mm", "eager"):
        model = tiny_experts("mixtral")
        model.set_experts_implementation(path)
        ard.wrap(model, ard.LoraConfig(r=3, target_modules=["experts"]))
        torch.manual_seed(1)
        for layer in ard.adapters(model).values():
            nn.init.normal_(layer.lora_A)
            nn.init.normal_(layer.lora_B)
        ids = tokens()
        metric = measured(model, ard.adapters(model), [{"input_ids": ids, "labels": ids}], None)
        found.append(metric.means)
    assert found[0].keys() == found[1].keys()
    for name, means in found[0].items():
        for a, b in zip([*means.common, *means.own], [*found[1][name].common, *found[1][name].own], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_an_expert_that_nobody_meets_keeps_what_is_known_and_counts_least() -> None:
    model, stack = bed()
    metric = LossMetric({"e": stack})
    metric.watch(True)

    def look(counts: list[int]) -> None:
        model.experts(torch.randn(sum(counts), 24, requires_grad=True), counts).square().sum().backward()
        metric.take()

    look([4, 0, 4, 4])
    before = metric.means["e"]
    found = metric.of("e")
    least = min(float(m.own[0].trace()) for e, m in enumerate(found) if m is not None and e != 1)
    assert found[1] is not None
    assert float(found[1].own[0].trace()) == pytest.approx(least)
    assert all(float(core.abs().max()) > 0 for core in cores(groups(stack)[1], found[1]))
    look([0, 0, 4, 4])
    after = metric.means["e"]
    assert torch.equal(after.common[0], before.common[0])
    assert float(after.own[0].trace()) < float(before.own[0].trace())
    assert not torch.equal(after.common[2], before.common[2])
    again = LossMetric({"e": stack})
    again.load_state_dict(metric.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.means["e"].own, after.own, strict=True))


def test_compress_asks_the_loss_about_experts() -> None:
    torch.manual_seed(0)
    model: Any = ard.wrap(ExpertBed((4,) * 4, (30, 30, 2, 2), noise=0.1), ard.LoraConfig(r=4))
    optimizer = torch.optim.Adam(trainable(model), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
    ard.compress(model, 0.5, metric="loss", batches=[None] * 3, loss_fn=lambda m, _: m.loss())
    ranks = ard.adapters(model)["experts.weight"].ranks
    assert min(ranks[:2]) > max(ranks[2:])  # all updates are of one size: the tokens decide
