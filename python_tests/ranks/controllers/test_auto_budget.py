"""`budget="auto"`: cutting ends where a cut costs too much, by prediction and held-out loss, and none is in vain."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import ardlora_ext as ard
from ardlora_ext.config.registry import config_from_dict, config_to_dict
from ardlora_ext.ranks.controllers.ard.anneal import AnnealController
from ardlora_ext.ranks.controllers.ard.tolerance import Cut

from helpers.models import Attention, trainable

STEPS, WIDTH, PLANTED = 60, 16, (4, 2, 1, 0)
COST = 2 * WIDTH  # of a component


def config(**options: Any) -> ard.ArdConfig:
    return ard.ArdConfig(**{"r0": 2, "update_interval": 3, "budget": "auto", "freeze_ratio": 0.3,
                            "target_modules": "all-linear", **options})  # fmt: skip


class Planted(nn.Module):
    """Linear layers without a weight that are to learn updates of known ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in PLANTED)
        for layer in self.layers:
            nn.init.zeros_(layer.get_parameter("weight"))


class Run:
    """A model that learns planted ranks, step by step."""

    def __init__(self, options: ard.ArdConfig, held: bool = False, total: int | None = STEPS) -> None:
        torch.manual_seed(0)
        self.model = ard.wrap(Planted(), options)
        self.goals = [
            torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:, :r] @ torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:r]
            for r in PLANTED
        ]
        self.data = torch.randn(STEPS + 1, 64, WIDTH)
        self.optimizer = AdamW(trainable(self.model), lr=0.02, weight_decay=0.0)
        self.looks = 0
        controller = ard.attach(self.model, self.optimizer, total, self.held_out if held else None)
        assert isinstance(controller, AnnealController)
        self.controller = controller
        self.sizes: list[int] = []

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        layers = self.model.get_submodule("layers").children()
        terms = [(layer(x) - x @ goal).square().mean() for layer, goal in zip(layers, self.goals, strict=True)]
        return torch.stack(terms).sum()

    def held_out(self) -> torch.Tensor:
        self.looks += 1
        return self.loss(self.data[-1])

    def go(self, begin: int = 0, end: int = STEPS) -> Run:
        for t in range(begin, end):
            self.loss(self.data[t]).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.sizes.append(ard.parameters_report(self.model).live)
        return self

    def ranks(self) -> tuple[int, ...]:
        return tuple(layer.ranks[0] for layer in ard.adapters(self.model).values())

    def tensors(self) -> list[torch.Tensor]:
        state = [entry[key] for entry in self.optimizer.state.values() for key in sorted(entry)]
        return [*(p.detach().clone() for p in self.model.parameters()), *(v.clone() for v in state)]


@pytest.mark.parametrize("held", [False, True], ids=["predicted", "held out"])
@pytest.mark.parametrize("metric", ["loss", "update"])
def test_cutting_ends_at_the_planted_ranks(metric: str, held: bool) -> None:
    run = Run(config(metric=metric), held).go()
    assert run.sizes[0] == 8 * COST * len(PLANTED)
    assert all(a >= b for a, b in itertools.pairwise(run.sizes))
    assert run.ranks() == PLANTED
    assert run.controller.phase == "frozen"
    hold = run.controller.records[-1]
    assert (hold["event"], hold["step"]) == ("hold", 42)
    assert "more than 2.00% for each halving" in hold["reason"]
    assert (run.looks > 0) == held
    assert run.controller.summary()["budget"] is None
    if held:  # what was predicted is what was measured, but for less than the tolerance
        for record in (record for record in run.controller.records if record["event"] != "hold"):
            assert record["predicted"] == pytest.approx(record["measured"], abs=run.controller.config.tolerance)


@pytest.mark.parametrize(("interval", "looks"), [(10, 2), (8, 2), (7, 5), (3, 5)])
def test_the_loss_is_looked_at_twice_to_a_decision_or_more(interval: int, looks: int) -> None:
    metric = Run(config(update_interval=interval)).go(end=11).controller.metric  # B is 0 in step 0
    assert metric is not None
    assert metric.samples == looks


def test_a_higher_tolerance_cuts_deeper() -> None:
    sizes = [Run(config(tolerance=t)).go().sizes[-1] for t in (0.001, 0.02, 0.3, 0.9)]
    assert all(a >= b for a, b in itertools.pairwise(sizes))
    assert sizes[-1] < sizes[1] == sum(PLANTED) * COST
    assert sizes[-1] >= 8 * COST * len(PLANTED) / 64


def test_a_cut_that_proves_wrong_is_undone_bit_for_bit() -> None:
    """Held-out batches that want every component, whatever is predicted: the run is one that never cut."""
    run, never = Run(config(tolerance=0.5)), Run(config(), total=None)
    whole = ard.parameters_report(run.model).live
    looks: list[int] = []

    def loss() -> float:
        looks.append(ard.parameters_report(run.model).live)
        return float(looks[-1] < whole)

    holdout = ard.attach(_detached(run), run.optimizer, STEPS, lambda: torch.tensor(loss()))
    run.controller = holdout  # type: ignore[assignment]
    run.go(), never.go()
    assert min(looks) < whole  # it was tried
    assert {r["event"] for r in run.controller.records} == {"hold"}
    assert run.controller.records[-1]["measured"] == float("inf")
    assert all(torch.equal(a, b) for a, b in zip(run.tensors(), never.tensors(), strict=True))
    assert run.model.training


def _detached(run: Run) -> nn.Module:
    run.controller.detach()
    return run.model


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_on_held_out_batches_changes_nothing(error: type[BaseException]) -> None:
    run = Run(config())
    whole = ard.parameters_report(run.model).live

    def loss() -> torch.Tensor:
        if ard.parameters_report(run.model).live < whole:
            raise error
        return torch.zeros(())

    run.controller = ard.attach(_detached(run), run.optimizer, STEPS, loss)  # type: ignore[assignment]
    with pytest.raises(error):
        run.go()
    assert ard.parameters_report(run.model).live == whole
    assert run.controller.records == []
    assert not run.controller.finished
    assert run.model.training


@pytest.mark.parametrize("stop", [3, 8, 20, 50])
@pytest.mark.parametrize("held", [False, True], ids=["predicted", "held out"])
def test_a_run_resumes_bitwise_in_every_phase(stop: int, held: bool, tmp_path: Path) -> None:
    options = config()
    whole = Run(options, held).go()
    first = Run(options, held).go(0, stop)
    ard.save_state(first.model, first.optimizer, tmp_path)
    second = Run(options, held)
    ard.load_state(second.model, second.optimizer, tmp_path)
    second.go(stop)
    assert second.controller.records == whole.controller.records
    assert second.controller.state_dict() == whole.controller.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(second.tensors(), whole.tensors(), strict=True))


def test_without_a_length_the_cuts_are_made_at_the_end() -> None:
    run = Run(config(), total=None).go()
    assert run.sizes[-1] == run.sizes[0]
    run.controller.finalize()
    assert run.ranks() == PLANTED
    assert run.controller.phase == "frozen"


def test_other_limits_hold_too() -> None:
    capped = Run(config(serve_rank=3)).go()
    assert max(capped.ranks()) == 3
    floored = Run(config(r_min=1)).go()
    assert floored.ranks() == (4, 2, 1, 1)
    padded = Run(config(budget_counts="exported")).go()
    assert padded.ranks() == (8, 8, 8, 0)  # the next rank that is served is 1
    assert ard.parameters_report(padded.model).exported == 3 * 8 * COST


def test_nothing_learned_is_nothing_cut() -> None:
    run = Run(config(warmup_ratio=0.0))
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.go()
    assert run.sizes[-1] == run.sizes[0]


def test_costs_are_counted_by_halvings() -> None:
    assert Cut(800.0, 200.0, 0.03).within(0.015)
    assert not Cut(800.0, 400.0, 0.03).within(0.015)
    assert not Cut(800.0, 400.0, 0.001, 0.03).within(0.015)
    assert not Cut(800.0, 400.0, 0.001, float("nan")).within(0.9)
    assert not Cut(800.0, 0.0, 1.0).within(0.9)


@pytest.mark.parametrize(("options", "message"), [
    ({"tolerance": 0.0}, r"tolerance must be in \(0, 1\), got 0.0"),
    ({"tolerance": 1.0}, r"tolerance must be in \(0, 1\), got 1.0"),
    ({"tolerance": float("nan")}, r"tolerance must be in \(0, 1\), got nan"),
    ({"budget": 5000, "tolerance": 0.1}, "tolerance must come with budget='auto', got budget=5000"),
    ({"budget": None, "tolerance": 0.1}, "tolerance must come with budget='auto', got budget=None"),
    ({"budget": "all"}, "budget must be a whole number or 'auto', got 'all'"),
    ({"budget": 0}, "budget must be >= 1 or 'auto', got 0"),
    ({"mode": "paper"}, "budget='auto' must come with mode='anneal', got mode='paper'"),
    ({"allocation": "uniform"}, "budget='auto' must come with allocation='learned', got 'uniform'"),
    ({"mode": "paper", "budget": None, "tolerance": 0.1}, "tolerance must come with mode='anneal'"),
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ArdConfig: {message}"):
        config(**options)


def test_the_config_comes_back_from_json() -> None:
    assert config_from_dict(config_to_dict(config(tolerance=0.1))) == config(tolerance=0.1)


@pytest.mark.parametrize("options", [{"granularity": "head", "head_dim": 8}, {"granularity": "layer"}])
def test_heads_and_layers(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ard.wrap(nn.Sequential(Attention(), Attention()), ard.ArdConfig(r0=2, budget="auto", tolerance=0.2,
                                                                            update_interval=3, **options))  # fmt: skip
    optimizer = AdamW(trainable(model), lr=0.01)
    controller = ard.attach(model, optimizer, STEPS, _fixed(model))
    whole = ard.parameters_report(model).live
    for _ in range(STEPS):
        x = torch.randn(16, 32)
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.summary()["phase"] == "frozen"
    assert whole / 64 <= ard.parameters_report(model).live < whole


def _fixed(model: nn.Module) -> Callable[[], torch.Tensor]:
    x = torch.randn(64, 32)
    return lambda: (model(x) - x.roll(1, 1)).square().mean()
