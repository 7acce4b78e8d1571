"""ARD-LoRA: against a slow transcription of its update, and in its phases."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import AdamW

import ardlora_ext as ard
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.ranks import resize
from ardlora_ext.ranks.controllers.ard.controller import ArdController
from ardlora_ext.ranks.controllers.ard.order import component_orders
from ardlora_ext.ranks.controllers.units import Units
from ardlora_ext.unbroken import nothing

from helpers.adapters import scramble, set_ranks
from helpers.ard_runs import fast, run
from helpers.models import Attention, trainable
from helpers.resizing import assert_followed, components
from helpers.slow_ard import SlowArd

# A model with every kind of unit, two layers deep.


def gates_of(model: nn.Module) -> torch.Tensor:
    layers = ard.adapters(model).values()
    return torch.cat([layer.gate[: sum(layer.ranks)] for layer in layers if layer.gate is not None])


# The update, transcribed.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"slope": "tangent"},
        {"slope": "tangent", "factoring": "independent"},
        {"factoring": "independent"},
        {"granularity": "layer"},
        {"l1": 0.5},
        {"budget": 1100, "tv": 3.0, "reorder": False},
        {"gate": "ste", "slope": "tangent"},
        {"gate": "sigmoid", "slope": "tangent", "variation": "temporal_abs", "tv": 0.5},
        {"gate": "scale", "slope": "tangent", "cost_weighted": False},
        {"variation_form": "explicit", "l1": 0.5, "tv": 5.0},
        {"slope": "tangent", "normalize": False, "lr_alpha": 1.0, "l1": 0.01},
    ],
    ids=str,
)
def test_every_step_equals_the_transcription(options: Any) -> None:
    torch.manual_seed(0)
    steps, adapting = 540, 300
    config = ard.ArdConfig(
        **{
            "mode": "paper",
            "granularity": "head",
            "r0": 3,
            "head_dim": 8,
            "update_interval": 5,
            "lr_alpha": 0.03,
            **options,
        }
    )
    depth = 2 if config.granularity == "layer" else 1
    model = ard.wrap(nn.Sequential(*[Attention() for _ in range(depth)]), config)
    uniform = ard.parameters_report(model).live
    data = torch.randn(adapting, 2, 16, 32)
    optimizer = AdamW(trainable(model), lr=0.01)
    slow = SlowArd(model, config, 54, None if config.l1 is not None else options.get("budget", uniform))
    controller = ard.attach(model, optimizer, total_steps=steps)
    assert isinstance(controller, ArdController)
    slow.allocate()
    optimizer.register_step_pre_hook(lambda *_: slow.observe())
    optimizer.register_step_post_hook(lambda *_: slow.propose())
    seen = set()
    for x, y in data:
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert controller.alpha == pytest.approx(slow.alpha, rel=1e-5)
        assert controller.price == pytest.approx(slow.price, rel=1e-5, abs=1e-5)
        for unit in slow.units:
            assert unit.layer.ranks[unit.index] == unit.live
            assert unit.gates() == pytest.approx(slow.expected_gates(unit), rel=1e-5, abs=1e-6)
        seen.add(tuple(u.live for u in slow.units))
    assert controller.phase == "adapt"
    assert len(seen) > 1, "ranks moved"


# Decisions.


@pytest.mark.parametrize("factoring", ["shared", "independent"])
def test_orders_equal_the_transcription(factoring: Any) -> None:
    torch.manual_seed(0)
    model = ard.wrap(nn.Sequential(Attention(), Attention()), fast(r0=5, r_max=5, factoring=factoring))
    layers = ard.adapters(model)
    set_ranks(model, lambda _, u: 5 - u % 2)
    scramble(model)
    rho = 2.5 + 3.0 * torch.rand(sum(layer.layout.units for layer in layers.values())).double().numpy()
    expected: dict[int, list[int]] = {}
    unit = 0
    for m, layer in enumerate(layers.values()):
        units, live = layer.layout.units, max(layer.ranks)
        still = min([math.floor(r) for r in rho[unit : unit + units]] + layer.ranks)
        unit += units
        if units > 1 and not layer.layout.shared:
            continue
        gated, other = layer.gated.detach(), (layer.lora_A if layer.gated is layer.lora_B else layer.lora_B).detach()
        begins = [sum(layer.ranks[:u]) for u in range(units)]
        useful = [sum(float(gated[b + j].norm()) for b in begins) * float(other[j].norm()) for j in range(still)]
        order = [*sorted(range(still), key=lambda j: -useful[j]), *range(still, live)]
        if order != list(range(live)):
            expected[m] = order
    assert component_orders(Units(layers), rho) == expected
    assert len(expected) > 2


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("name", ["1.q_proj", "1.o_proj", "1.up"])
def test_nan_in_either_factor_is_named(factor: str, name: str) -> None:
    model = ard.wrap(nn.Sequential(Attention(), Attention()), fast(r0=5, r_max=5))
    scramble(model)
    layers = ard.adapters(model)
    layers[name].factors[factor].data[1, 2] = float("nan")
    units = Units(layers)
    with pytest.raises(ValueError, match=f"must be finite, got NaN or Inf in '{name}'"):
        component_orders(units, np.full(len(units), 3.0))


# Phases.


def test_phases() -> None:
    config = fast(warmup_ratio=0.2, harden_ratio=0.1, freeze_ratio=0.3)
    phases: list[str] = []
    ranks: list[Any] = []
    opening: list[torch.Tensor] = []

    def watch(_: int, controller: ArdController, model: nn.Module) -> None:
        phases.append(controller.phase)
        ranks.append(controller.ranks())
        if controller.phase == "harden":
            opening.append(gates_of(model).clone())
        if controller.phase == "frozen":
            assert (gates_of(model) == 1).all()
            assert controller.ranks() == {name: layer.ranks for name, layer in ard.adapters(model).items()}
        assert min(rank for units in controller.ranks().values() for rank in units) >= 1

    controller = run(config, 100, watch)
    order = ["warmup", "adapt", "harden", "frozen"]
    assert [p for i, p in enumerate(phases) if i == 0 or phases[i - 1] != p] == order
    assert [phases.count(p) for p in order] == [19, 40, 9, 32]
    assert all(r == ranks[0] for r, p in zip(ranks, phases, strict=True) if p == "warmup")
    assert all(r == ranks[-1] for r, p in zip(ranks, phases, strict=True) if p in ("harden", "frozen"))
    assert len({json.dumps(r) for r in ranks}) > 3, "ranks moved in between"
    moves = torch.stack(opening).diff(dim=0)
    assert ((moves >= 0).all(dim=0) | (moves <= 0).all(dim=0)).all(), "gates slide one way"
    assert moves.abs().max() <= 0.25
    steps = [record["step"] for record in controller.records]
    assert steps == sorted(steps)
    assert min(steps) > 20
    assert max(steps) <= 60


@pytest.mark.parametrize("factoring", ["shared", "independent"])
def test_no_rank_change_makes_the_loss_jump(factoring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(2, 32, 32)
    apply, jumps, ends = resize.apply, [], []

    def watched(
        model: nn.Module, update: ard.RankUpdate, optimizer: Any = None, *, first: Any = nothing, then: Any = nothing
    ) -> None:
        def loss() -> float:
            with torch.no_grad():
                return float((model(x) - y).square().mean())

        if isinstance(model, LoraLinear):  # what an optimizer is tried on
            apply(model, update, optimizer)
            return
        first()  # gates follow alpha
        layers = {name: ard.adapters(model)[name] for name in update.modules}
        before, rows = loss(), {name: components(layer, optimizer) for name, layer in layers.items()}
        apply(model, update, optimizer)
        for name, layer in layers.items():
            assert_followed(rows[name], layer, optimizer, update.modules[name])
        jumps.append(abs(loss() - before) / before)
        ends.append({rank for layer in ard.adapters(model).values() for rank in layer.ranks})
        then()

    monkeypatch.setattr(resize, "apply", watched)
    controller = run(fast(update_interval=1, factoring=factoring, lr_alpha=0.3), 110)
    assert controller.phase == "frozen"
    assert len(jumps) >= 50
    assert max(jumps) < 1e-6
    assert len(ends[-1]) > 1, "ranks differ at the end"


@pytest.mark.parametrize("granularity", ["head", "matrix", "layer"])
@pytest.mark.parametrize("factoring", ["shared", "independent"])
@pytest.mark.parametrize("share", [0.0, 0.3, None, 1.0])
def test_the_budget_is_met(granularity: Any, factoring: Any, share: float | None) -> None:
    options: dict[str, Any] = {"granularity": granularity, "factoring": factoring}
    probe = ard.wrap(nn.Sequential(Attention(), Attention()), fast(**options))
    layouts = [layer.layout for layer in ard.adapters(probe).values()]
    floor, uniform, full = (sum(lay.parameters([r] * lay.units) for lay in layouts) for r in (1, 3, 6))
    budget = uniform if share is None else round(floor + share * (full - floor))
    live: list[int] = []
    config = fast(**options, budget=None if share is None else budget, lr_alpha=0.05)
    controller = run(config, 40, lambda _, __, model: live.append(ard.parameters_report(model).live))
    assert floor <= live[-1] <= budget
    assert controller.summary()["parameters"] == live[-1]
    if share in (0.0, None, 1.0):  # equal ranks would spend all of it: so do those learned
        assert live[-1] == budget


def test_a_budget_above_the_soft_ranks_is_spent() -> None:
    """A run too short for the ranks to grow: what is left is given when ranks are fixed, and trains from then on."""
    gates: list[torch.Tensor] = []

    def watch(step: int, controller: ArdController, model: nn.Module) -> None:
        assert (controller.phase == "warmup") == (step < 4)
        if controller.phase != "warmup":
            gates.append(gates_of(model))

    budget = 2 * (4 * 5 * (32 + 4 * 8) + 5 * (32 + 64))
    config = fast(budget=budget, warmup_ratio=0.2, harden_ratio=0.3, freeze_ratio=0.4, lr_alpha=1e-4)
    controller = run(config, 20, watch)
    assert controller.summary()["parameters"] == budget
    assert max(controller.rho) < 3.1
    assert {len(g) for g in gates} != {len(gates[0])}
    assert (gates[-1] == 1).all()


MOVES: dict[str, Callable[[nn.Module], object]] = {
    "to": lambda model: model.to(torch.float64).to(torch.float32),
    "load": lambda model: model.load_state_dict(model.state_dict()),
    "by hand": lambda model: [setattr(m, "lora_gate", m.lora_gate.clone()) for m in ard.adapters(model).values()],
    "shared": lambda model: model.share_memory(),
    "in place": lambda model: [m.lora_gate.share_memory_() for m in ard.adapters(model).values()],
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_gates_are_written_where_their_buffers_are_now(move: Callable[[nn.Module], object]) -> None:
    def gates(moved: bool) -> list[torch.Tensor]:
        seen = []

        def watch(step: int, controller: ArdController, model: nn.Module) -> None:
            if step == 13 and moved:
                move(model)
            seen.append(gates_of(model).clone())

        run(fast(update_interval=50, lr_alpha=0.02, warmup_ratio=0.0), 30, watch)
        return seen

    plain, other = gates(moved=False), gates(moved=True)
    assert not torch.equal(plain[12], plain[18])
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_layer_granularity_ties_the_ranks_of_a_layer() -> None:
    seen = set()

    def watch(_: int, controller: ArdController, __: nn.Module) -> None:
        ranks = controller.ranks()
        for layer in ("0", "1"):
            assert len({units[0] for name, units in ranks.items() if name.startswith(layer)}) == 1
        seen.add((ranks["0.up"][0], ranks["1.up"][0]))

    run(fast(granularity="layer"), 80, watch)
    assert len(seen) > 2


def test_state_survives_json() -> None:
    states: list[str] = []
    controller = run(fast(), 60, lambda _, c, __: states.append(json.dumps(c.state_dict())))
    assert len(set(states)) == 60
    for state in states:
        controller.load_state_dict(json.loads(state))
        assert json.dumps(controller.state_dict()) == state


def test_state_of_another_model_is_refused() -> None:
    model = ard.wrap(Attention(), fast())
    state = ard.attach(model, AdamW(trainable(model))).state_dict()
    other = ard.wrap(Attention(), fast(granularity="matrix"))
    controller = ard.attach(other, AdamW(trainable(other)))
    with pytest.raises(ValueError, match="state: alpha must have 4 entries, got 10"):
        controller.load_state_dict(state)


# Costs.


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(
        st.tuples(
            st.sampled_from(["matrix", "out_heads", "in_heads"]),
            st.sampled_from(["shared", "independent"]),
            st.integers(1, 4),
            st.integers(1, 6),
            st.integers(1, 9),
        ),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
def test_costs_are_the_layouts_own_count(kinds: list[Any], data: st.DataObject) -> None:
    layers = {}
    for i, (kind, factoring, heads, dim, other) in enumerate(kinds):
        units = 1 if kind == "matrix" else heads
        k, n = (heads * dim, other) if kind == "in_heads" else (other, heads * dim)
        layers[str(i)] = LoraLinear(nn.Linear(k, n), UnitLayout(kind, factoring, units, k, n), 1, 1.0)
    units = Units(layers)
    ranks = data.draw(st.lists(st.integers(0, 9), min_size=len(units), max_size=len(units)))
    by_module = units.by_module(np.array(ranks))
    expected = sum(layers[name].layout.parameters(values) for name, values in by_module.items())
    assert units.costs.parameters(np.array(ranks)) == expected
