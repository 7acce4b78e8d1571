"""`compress(refine=...)`: steps on singular values alone, which help or are not there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ardlora_ext as ard

from helpers.models import Attention, trainable

Pair = tuple[torch.Tensor, torch.Tensor]

CONFIGS = [
    ard.LoraConfig(r=6),
    ard.LoraConfig(r=6, granularity="head", head_dim=8),
    ard.LoraConfig(r=6, granularity="head", head_dim=8, factoring="independent"),
    ard.LoraConfig(r=6, capacity="fixed"),
    ard.AdaConfig(init_r=6, target_r=5),
    ard.DoraConfig(r=6),
]
IDS = ["matrix", "heads", "own factors", "fixed", "adalora", "dora"]


def loss_of(model: nn.Module, batch: Pair) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def trained(config: ard.AdapterConfig) -> tuple[nn.Module, torch.optim.Optimizer, list[Pair]]:
    torch.manual_seed(0)
    model = ard.wrap(Attention(), config)
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
    controller = ard.attach(model, optimizer, total_steps=30)
    goal = copy.deepcopy(Attention())
    data = []
    with torch.no_grad():
        for _ in range(30):
            x = torch.randn(32, 32)
            data.append((x, goal(x)))
    for batch in data:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    controller.finalize()
    return model, optimizer, data


def directions(layer: ard.LoraLinear) -> list[torch.Tensor]:
    """Projections on what the update reads and writes."""
    left, _, right = torch.linalg.svd(layer.get_delta_weight().detach().double(), full_matrices=False)
    rank = int(torch.linalg.matrix_rank(layer.get_delta_weight().detach().double(), rtol=1e-5))
    return [left[:, :rank] @ left[:, :rank].T, right[:rank].T @ right[:rank]]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_the_loss_falls_and_nothing_but_singular_values_moves(config: ard.AdapterConfig) -> None:
    model, optimizer, data = trained(config)
    for p in trainable(model):
        p.grad = torch.full_like(p, 0.5)
    plain, seeds = copy.deepcopy(model), torch.get_rng_state()
    cut = ard.compress(plain, 0.3, metric="loss", batches=data[:4], loss_fn=loss_of)
    found = ard.compress(model, 0.3, optimizer=optimizer, metric="loss", batches=data[:4], loss_fn=loss_of,
                         refine=data[:12])  # fmt: skip
    assert torch.equal(torch.get_rng_state(), seeds)
    assert (found.ranks, found.change) == (cut.ranks, cut.change)
    assert cut.losses is None
    assert found.losses is not None
    with torch.no_grad():
        losses = [sum(float(loss_of(m, batch)) for batch in data[:12]) / 12 for m in (plain, model)]
    assert found.losses == pytest.approx(losses, rel=1e-4)
    assert losses[1] < losses[0]
    for name, layer in ard.adapters(model).items():
        if layer.layout.units == 1 and not isinstance(config, ard.DoraConfig):  # whose update has more in it
            torch.testing.assert_close(directions(layer), directions(ard.adapters(plain)[name]), rtol=1e-3, atol=1e-3)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trainable(model))
    optimizer.zero_grad()
    for batch in data:  # training goes on
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert sum(float(loss_of(model, batch)) for batch in data[:12]) / 12 < losses[1]


def test_steps_that_do_not_help_are_not_there() -> None:
    """A loss that always rises: the cut is as without refinement, to the bit."""
    model, _, data = trained(ard.LoraConfig(r=6))
    plain, calls = copy.deepcopy(model), []

    def worse(of: nn.Module, batch: Pair) -> torch.Tensor:
        calls.append(1)
        return loss_of(of, batch) + len(calls)

    found = ard.compress(model, 0.3, refine=data[:4], loss_fn=worse)
    ard.compress(plain, 0.3)
    assert found.losses is not None
    assert found.losses[0] == found.losses[1]
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_on_the_way_changes_nothing(error: type[BaseException]) -> None:
    model, optimizer, data = trained(ard.LoraConfig(r=6))
    before = [p.detach().clone() for p in model.parameters()]
    moments = copy.deepcopy(optimizer.state_dict())
    calls = []

    def broken(of: nn.Module, batch: Pair) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise error
        return loss_of(of, batch)

    with pytest.raises(error):
        ard.compress(model, 0.3, optimizer=optimizer, refine=data[:4], loss_fn=broken)
    assert all(map(torch.equal, model.parameters(), before))
    assert {r for layer in ard.adapters(model).values() for r in layer.ranks} == {6}
    state = optimizer.state_dict()["state"]
    assert all(torch.equal(state[k][n], v) for k, entry in moments["state"].items() for n, v in entry.items())


def test_no_batches_are_refused() -> None:
    model, _, _ = trained(ard.LoraConfig(r=6))
    with pytest.raises(ValueError, match="compress: refine must hold batches, got none"):
        ard.compress(model, 0.3, refine=[])
