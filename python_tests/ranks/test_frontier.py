"""The frontier: sizes and scores are those of cuts made alone, and the model comes out bit for bit as it went in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ardlora_ext as ard

from helpers.models import Attention, trainable


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def trained(
    config: ard.AdapterConfig, steps: int = 20
) -> tuple[nn.Module, torch.optim.Optimizer, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model = ard.wrap(Attention(), config)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    controller = ard.attach(model, optimizer, total_steps=steps)
    data = [(torch.randn(16, 32), torch.randn(16, 32)) for _ in range(steps)]
    for batch in data:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    controller.finalize()
    return model, optimizer, data[:4]


CONFIGS = [
    ard.LoraConfig(r=6),
    ard.ArdConfig(r0=3),
    ard.ArdConfig(mode="paper", r0=3, granularity="head", head_dim=8),
    ard.LoraConfig(r=4, capacity="fixed"),
    ard.AdaConfig(init_r=4, target_r=3),
    ard.DoraConfig(r=4),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_points_are_cuts_made_alone_and_nothing_changes(config: ard.AdapterConfig) -> None:
    model, optimizer, data = trained(config)
    loss_of(model, data[0]).backward()
    everything = [*model.parameters(), *model.buffers()]
    before = [t.detach().clone() for t in everything]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    ranks = {name: list(layer.ranks) for name, layer in ard.adapters(model).items()}
    whole = ard.parameters_report(model).live
    alone = copy.deepcopy(model)

    points = ard.frontier(model, data, loss_fn=loss_of, shares=(1.0, 0.5, 0.2))
    assert [p.parameters for p in points] == sorted((p.parameters for p in points), reverse=True)
    assert points[0].parameters == whole
    assert points[0].ranks == ranks
    assert len(points) == 3
    assert {name: list(layer.ranks) for name, layer in ard.adapters(model).items()} == ranks
    now = [*model.parameters(), *model.buffers()]
    assert all(map(torch.equal, now, before))
    assert all((p.grad is None) == (g is None) and (g is None or torch.equal(p.grad, g))  # type: ignore[arg-type]
               for p, g in zip(model.parameters(), grads, strict=True))  # fmt: skip
    assert points[0].score <= points[-1].score + 1e-3  # AdaLoRA has learned next to nothing by then

    report = ard.compress(alone, points[1].parameters, metric="loss", batches=data, loss_fn=loss_of)
    assert (report.after, report.ranks) == (points[1].parameters, points[1].ranks)
    with torch.no_grad():
        score = sum(float(loss_of(alone.eval(), batch)) for batch in data) / len(data)
    assert score == pytest.approx(points[1].score, rel=1e-5)
    for batch in data:  # training goes on
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_smallest_that_is_good_enough() -> None:
    points = [ard.Point(size, size, score, {}) for size, score in ((100, 0.80), (50, 0.82), (20, 0.81), (10, 0.70))]
    assert ard.smallest_within(points, 0.01, "higher").parameters == 20
    assert ard.smallest_within(points, 0.0, "higher").parameters == 50
    assert ard.smallest_within(points, 0.05).parameters == 10
    assert ard.smallest_within(points, 1.0, "higher").parameters == 10
    for bad in ({"tolerance": -1.0}, {"tolerance": float("nan")}, {"tolerance": 0.1, "better": "more"}):
        with pytest.raises(ValueError, match="smallest_within: needs points, a tolerance >= 0"):
            ard.smallest_within(points, **bad)  # type: ignore[arg-type]


def test_bad_input_is_refused() -> None:
    model = ard.wrap(Attention(), ard.LoraConfig(r=4))
    data = [(torch.randn(4, 32), torch.randn(4, 32))]
    with pytest.raises(ValueError, match="frontier: adapters must have been trained, got updates that are all zero"):
        ard.frontier(model, data, loss_fn=loss_of)
    for shares in ((), (0.0,), (0.5, 2.0), (float("nan"),)):
        with pytest.raises(ValueError, match=r"frontier: shares must be in \(0, 1\]"):
            ard.frontier(model, data, loss_fn=loss_of, shares=shares)
    moving = ard.wrap(Attention(), ard.ArdConfig(r0=2))
    ard.attach(moving, torch.optim.AdamW(trainable(moving)), total_steps=100)
    with pytest.raises(ValueError, match="frontier: ranks must be settled, got phase 'warmup'"):
        ard.frontier(moving, data, loss_fn=loss_of)


def test_an_error_while_scoring_leaves_the_model_as_it_was() -> None:
    model, _, data = trained(ard.LoraConfig(r=4))
    before = [p.detach().clone() for p in model.parameters()]

    def broken(of: nn.Module) -> float:
        if ard.parameters_report(of).live < 2000:
            raise RuntimeError("no")
        return 0.0

    model.train()
    with pytest.raises(RuntimeError, match="no"):
        ard.frontier(model, data, loss_fn=loss_of, score=broken)
    assert all(map(torch.equal, model.parameters(), before))
    assert model.training
