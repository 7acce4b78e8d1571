"""ARD-LoRA's anneal: the budget falls as it should, ranks go where worth is, state is carried, runs resume bitwise."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW

import ardlora_ext as ard
from ardlora_ext.native import observers
from ardlora_ext.ranks.controllers.ard.anneal import AnnealController, budget_at

from helpers.models import Attention, trainable
from helpers.optimizers import Distance

STEPS = 40


def config(**options: Any) -> ard.ArdConfig:
    return ard.ArdConfig(**{"mode": "anneal", "r0": 2, "head_dim": 8, "update_interval": 4, "granularity": "matrix",
                            **options})  # fmt: skip


class Run:
    """A model that fits random targets, step by step."""

    def __init__(self, options: ard.ArdConfig, steps: int = STEPS, total: int | None = STEPS) -> None:
        torch.manual_seed(0)
        self.model = ard.wrap(nn.Sequential(Attention(), Attention()), options)
        self.data = torch.randn(steps, 2, 16, 32)
        self.optimizer = AdamW(trainable(self.model), lr=0.01)
        controller = ard.attach(self.model, self.optimizer, total_steps=total)
        assert isinstance(controller, AnnealController)
        self.controller = controller
        self.sizes: list[int] = []

    def go(self, begin: int = 0, end: int = STEPS) -> Run:
        for t in range(begin, end):
            (self.model(self.data[t, 0]) - self.data[t, 1]).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.sizes.append(ard.parameters_report(self.model).live)
        return self

    def tensors(self) -> list[torch.Tensor]:
        state = [entry[key] for entry in self.optimizer.state.values() for key in sorted(entry)]
        return [*(p.detach().clone() for p in self.model.parameters()), *(v.clone() for v in state)]


@pytest.mark.parametrize("granularity", ["matrix", "head", "layer"])
@pytest.mark.parametrize("options", [{}, {"metric": "update"}, {"allocation": "random"}, {"factoring": "independent"}])
def test_the_budget_falls_to_its_target(granularity: str, options: dict[str, Any]) -> None:
    run = Run(config(granularity=granularity, **options)).go()
    first = sum(layer.layout.parameters([8] * layer.layout.units) for layer in ard.adapters(run.model).values())
    target = int(run.controller.budget)
    assert run.sizes[0] == first
    assert all(a >= b for a, b in itertools.pairwise(run.sizes))
    assert 0.8 * target <= run.sizes[-1] <= target  # of layers, ranks cost six matrices at once
    assert len(set(run.sizes)) >= 4  # in stages
    assert run.sizes[27] == run.sizes[-1]  # over by 70 %
    assert run.controller.phase == "frozen"
    assert run.controller.records[-1]["event"] == "freeze"
    assert not any(layer.rank_table.data_ptr() in observers.watched for layer in ard.adapters(run.model).values())
    if granularity == "layer":
        ranks = run.controller.ranks()
        assert all(len({r for n, u in ranks.items() if n.startswith(layer) for r in u}) == 1 for layer in "01")


def test_shapes_of_the_fall() -> None:
    for shape in ("geometric", "linear", "cubic"):
        path = [budget_at(p, 4000.0, 1000.0, shape) for p in np.linspace(0.0, 1.0, 11)]
        assert path[0] == pytest.approx(4000.0)
        assert path[-1] == pytest.approx(1000.0)
        assert all(a > b for a, b in itertools.pairwise(path))
    assert budget_at(0.5, 4000.0, 1000.0, "geometric") == pytest.approx(2000.0)
    early = Run(config(freeze_ratio=0.75)).go()
    assert early.sizes[9] == early.sizes[-1]


def test_uniform_gives_all_the_same_rank_and_learned_does_not() -> None:
    uniform, learned = Run(config(allocation="uniform")).go(), Run(config()).go()
    assert {r for units in uniform.controller.ranks().values() for r in units} == {2}
    assert len({r for units in learned.controller.ranks().values() for r in units}) > 2
    assert uniform.sizes == learned.sizes  # the same anneal, also on the way
    untrained = Run(config(allocation="uniform")).controller  # no update says anything
    untrained.finalize()
    assert {r for units in untrained.ranks().values() for r in units} == {2}


def test_exported_and_served_sizes_are_kept_to(tmp_path: Path) -> None:
    capped = Run(config(r0=3, step_power=0.0, serve_rank=4)).go()
    assert max(r for units in capped.controller.ranks().values() for r in units) == 4
    assert capped.sizes[-1] <= capped.controller.budget
    free = Run(config(r0=3, step_power=0.0)).go()
    assert max(r for units in free.controller.ranks().values() for r in units) > 4
    widths = [layer.in_features + layer.out_features for layer in ard.adapters(free.model).values()]
    padded = Run(config(r0=3, budget_counts="exported", budget=4 * sum(widths))).go()  # half of all at rank 8
    for run in (capped, free, padded):
        report = ard.parameters_report(run.model)
        for form, size in (("portable", report.exported), ("compact", report.compact)):
            ard.save_pretrained(run.model, tmp_path / form, form=form)  # type: ignore[arg-type]
            assert size == sum(t.numel() for t in load_file(tmp_path / form / "adapter_model.safetensors").values())
    assert report.exported <= run.controller.budget  # the last: rank 1 or 8 for those that are left
    assert report.served_rank == 8
    dropped = [ranks for ranks in run.controller.ranks().values() if ranks == [0]]
    assert 0 < len(dropped) < len(run.controller.ranks())


def test_equal_ranks_end_equal_where_widths_differ() -> None:
    """Whole budgets on the way must not leave ranks from which the last one cannot be spent."""
    for seed in range(3):
        torch.manual_seed(seed)
        shapes = [(16, 16)] * 4 + [(16, 64), (64, 16)]
        model = nn.ModuleList(nn.Linear(k, n) for k, n in shapes)
        ard.wrap(model, config(r0=1, allocation="uniform", seed=seed, update_interval=1, target_modules="all-linear"))
        optimizer = AdamW(trainable(model), lr=0.01)
        controller = ard.attach(model, optimizer, total_steps=STEPS)
        for _ in range(STEPS):
            sum((m(torch.randn(4, m.in_features)) - 1.0).square().mean() for m in model).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert controller.ranks() == {str(i): [1] for i in range(6)}


def test_worthless_units_lose_all_their_rank_and_the_floor_holds() -> None:
    def tail(floor: int | None) -> list[int]:
        torch.manual_seed(0)
        model = ard.wrap(nn.ModuleList(nn.Linear(16, 16) for _ in range(4)), config(r0=2, r_min=floor, target_modules=
                                                                                    "all-linear"))  # fmt: skip
        optimizer = AdamW(trainable(model), lr=0.01)
        ard.attach(model, optimizer, total_steps=STEPS)
        goal = torch.randn(16, 16)
        for _ in range(STEPS):
            x = torch.randn(32, 16)
            loss = (model[0](x) - x @ goal).square().mean() + 1e-8 * sum(m(x).square().mean() for m in model[1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [layer.ranks[0] for layer in ard.adapters(model).values()]

    assert tail(None) == [8, 0, 0, 0]
    assert tail(1) == [5, 1, 1, 1]


@pytest.mark.parametrize(
    ("stop", "granularity"), [(2, "matrix"), (9, "matrix"), (15, "head"), (27, "matrix"), (33, "head")]
)
def test_a_run_resumes_bitwise_in_every_phase(stop: int, granularity: str, tmp_path: Path) -> None:
    options = config(granularity=granularity)
    whole = Run(options).go()
    first = Run(options).go(0, stop)
    ard.save_state(first.model, first.optimizer, tmp_path)
    second = Run(options)
    ard.load_state(second.model, second.optimizer, tmp_path)
    second.go(stop)
    assert second.controller.records == whole.controller.records
    assert all(torch.equal(a, b) for a, b in zip(second.tensors(), whole.tensors(), strict=True))


def test_fifty_cuts_keep_the_function_of_what_is_kept_and_adam_true() -> None:
    """Full-rank data of low rank: cuts that lose nothing change nothing, in weights and moments."""
    torch.manual_seed(0)
    model = ard.wrap(nn.Sequential(nn.Linear(60, 70)), ard.LoraConfig(r=54, target_modules="all-linear"))
    layer = ard.adapters(model)["0"]
    with torch.no_grad():
        layer.lora_B[:54] = torch.randn(54, 3) @ torch.randn(3, 70)
    optimizer = AdamW(trainable(model), lr=0.0)
    (model(torch.randn(8, 60)) - 1.0).square().mean().backward()
    optimizer.step()
    before = layer.get_delta_weight().clone()
    for rank in range(53, 3, -1):
        ard.svd_prune(model, {"0": [rank]}, optimizer)
    torch.testing.assert_close(layer.get_delta_weight(), before, rtol=1e-3, atol=1e-4)
    state = optimizer.state[layer.lora_A]
    assert state["exp_avg"].shape == layer.lora_A.shape
    assert torch.isfinite(state["exp_avg"]).all()
    assert (state["exp_avg_sq"] >= 0).all()
    assert float(state["step"]) == 1.0


def test_without_a_length_the_cut_is_made_at_the_end() -> None:
    run = Run(config(), total=None).go()
    assert run.sizes[-1] == run.sizes[0]
    run.controller.finalize()
    assert ard.parameters_report(run.model).live <= run.controller.budget
    assert run.controller.phase == "frozen"
    ard.compress(run.model, 0.5, metric="loss")  # by what the run saw


def test_a_saved_adapter_goes_on(tmp_path: Path) -> None:
    run = Run(config()).go(0, 15)
    run.model.save_pretrained = None  # type: ignore[assignment]
    ard.save_pretrained(run.model, tmp_path)
    torch.manual_seed(0)
    model = ard.load_pretrained(nn.Sequential(Attention(), Attention()), tmp_path)
    again = ard.attach(model, AdamW(trainable(model), lr=0.01))
    assert again.step == 15
    assert again.ranks() == run.controller.ranks()


def test_weights_that_are_not_finite_are_named() -> None:
    run = Run(config()).go(0, 10)
    name, layer = next(iter(ard.adapters(run.model).items()))
    layer.lora_A.data[0, 0] = float("nan")
    state = copy.deepcopy(run.controller.ranks())
    with pytest.raises(ValueError, match=f"adapters must be finite, got NaN or Inf in '{name}'"):
        run.go(10, 20)
    assert run.controller.ranks() == state


@pytest.mark.parametrize(("options", "message"), [
    ({"start": 0.5}, "start must be >= 1, got 0.5"),
    ({"start": float("nan")}, "start must be >= 1, got nan"),
    ({"r_min": 3}, r"r_min must be between 0 and r0 \(2\) in mode='anneal', got 3"),
    ({"r_min": -1}, r"r_min must be between 0 and r0 \(2\)"),
    ({"shape": "round"}, "shape must be one of"),
    ({"mode": "other"}, "mode must be one of 'anneal', 'paper', got 'other'"),
    ({"serve_rank": 0}, "serve_rank must be at least r_min and 1, got 0"),
    ({"budget_counts": "exported", "granularity": "head"}, "granularity must be 'matrix' with budget_counts"),
    ({"l1": 0.3}, "l1 must come with mode='paper', got 0.3 in mode='anneal'"),
    ({"mode": "paper", "start": 2.0}, "start must come with mode='anneal', got 2.0 in mode='paper'"),
    ({"mode": "paper", "r_min": 0}, r"r_min must be between 1 and r0 \(2\) in mode='paper', got 0"),
    ({"mode": "paper", "r_min": 2}, "r_min must be 1 in mode='paper', got 2"),
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ArdConfig: {message}"):
        config(**options)


def test_a_holdout_is_refused() -> None:
    model = ard.wrap(nn.Sequential(Attention()), config())
    with pytest.raises(
        ValueError, match=r"holdout must come with ArdConfig\(budget='auto'\) or ArdConfig\(mode='paper'\)"
    ):
        ard.attach(model, AdamW(trainable(model)), holdout=lambda: torch.zeros(()))


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.Adamax(p, lr=0.01),
    lambda p: torch.optim.Adafactor(p, lr=0.01),
    lambda p: torch.optim.RMSprop(p, lr=0.001, centered=True),
    Distance,
])  # fmt: skip
def test_every_kind_of_optimizer_state_turns(make: Any) -> None:
    torch.manual_seed(0)
    model = ard.wrap(Attention(), config())
    optimizer = make(trainable(model))
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    goal = torch.randn(32, 32) / 6
    losses = []
    for _ in range(STEPS):
        x = torch.randn(64, 32)
        loss = (model(x) - x @ goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert controller.phase == "frozen"
    assert len({r["step"] for r in controller.records}) >= 4
    assert losses[-1] < losses[0]
    for layer in ard.adapters(model).values():
        assert torch.isfinite(layer.lora_A).all()
        assert not layer.lora_A[layer.ranks[0] :].any()  # rows that no unit has stay empty
