"""ARD-LoRA: against a slow transcription of its update, and in its phases."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layers import scramble, set_ranks
from test_resize import assert_followed, components
from torch import nn
from torch.optim import AdamW

import ardlora_ext as ard
from ardlora_ext import resize
from ardlora_ext.controllers import ArdController
from ardlora_ext.controllers.base import Units
from ardlora_ext.controllers.order import component_orders
from ardlora_ext.layers import LoraLinear
from ardlora_ext.units import UnitLayout

from conftest import Attention, trainable

# A model with every kind of unit, two layers deep.

EveryStep = Callable[[int, ArdController, nn.Module], None]


def run(config: ard.ArdConfig, steps: int, watch: EveryStep | None = None, lr: float = 0.01) -> ArdController:
    """Fit random targets for `steps` steps; `watch` looks after each."""
    torch.manual_seed(0)
    model = ard.wrap(nn.Sequential(Attention(), Attention()), config)
    data = torch.randn(steps, 2, 16, 32)
    optimizer = AdamW(trainable(model), lr=lr)
    controller = ard.attach(model, optimizer, total_steps=steps)
    assert isinstance(controller, ArdController)
    for t in range(steps):
        (model(data[t, 0]) - data[t, 1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            watch(t + 1, controller, model)
    return controller


def fast(**options: Any) -> ard.ArdConfig:
    """Ranks that move within a few steps."""
    return ard.ArdConfig(**{"r0": 3, "r_max": 6, "head_dim": 8, "update_interval": 2, "lr_alpha": 0.1, **options})


def gates_of(model: nn.Module) -> torch.Tensor:
    layers = ard.adapters(model).values()
    return torch.cat([layer.gate[: sum(layer.ranks)] for layer in layers if layer.gate is not None])


# The update, transcribed.


@dataclass
class SlowUnit:
    layer: LoraLinear
    index: int
    module: int
    group: int
    own: float
    limit: int
    live: int
    fisher: float = 0.0
    spectrum: list[float] = field(default_factory=list)

    def dots(self) -> list[float]:
        """<W_j, dL/dW_j> of each component."""
        begin = sum(self.layer.ranks[: self.index])
        weight, grad = self.layer.gated.detach().double(), self.layer.gated.grad
        assert grad is not None
        return [float(weight[begin + j] @ grad[begin + j].double()) for j in range(self.live)]

    def gates(self) -> list[float]:
        begin = sum(self.layer.ranks[: self.index])
        assert self.layer.gate is not None
        return [float(g) for g in self.layer.gate[begin : begin + self.live]]


class SlowArd:
    """docs/design.md, "ARD-LoRA, reconstructed", one number after the other."""

    def __init__(self, model: nn.Module, config: ard.ArdConfig, warmup: int, budget: float | None) -> None:
        self.config, self.warmup, self.budget, self.step = config, warmup, budget, 0
        self.units: list[SlowUnit] = []
        self.common: list[float] = []  # parameters of a row that units share, by module
        for m, (name, layer) in enumerate(ard.adapters(model).items()):
            layout = layer.layout
            gated, other = layout.b_width, layout.a_width
            if layout.gate_on_a:
                gated, other = other, gated
            self.common.append(other if layout.shared else 0.0)
            for u in range(layout.units):
                group = int(name.split(".")[0]) if config.granularity == "layer" else len(self.units)
                own = gated if layout.shared else gated + other
                self.units.append(SlowUnit(layer, u, m, group, own, layer.max_rank, layer.ranks[u]))
        self.groups = max(u.group for u in self.units) + 1
        self.limits = [max(u.limit for u in self.units if u.group == g) for g in range(self.groups)]
        self.alpha = [min(1.0, limit / config.r0) for limit in self.limits]
        self.previous = list(self.alpha)
        self.square = self.dual = 0.0
        self.price = 0.0 if config.l1 is None else config.l1
        self.slope: list[float] | None = None

    def rho(self, unit: SlowUnit) -> float:
        return min(self.config.r0 * self.alpha[unit.group], unit.limit)

    def observe(self) -> None:
        slopes = [0.0] * self.groups
        for unit in self.units:
            dots, boundary = unit.dots(), min(math.floor(self.rho(unit)), unit.live - 1)
            if self.config.slope == "tangent":
                slopes[unit.group] += self.tangent(unit, dots, boundary)
                continue
            unit.fisher = 0.95 * unit.fisher + 0.05 * sum(dots) ** 2
            if self.step % self.config.update_interval == 0:
                unit.spectrum = [float(s) ** 2 for s in unit.layer.singular_values()[unit.index]]
            total = sum(unit.spectrum)
            slopes[unit.group] -= math.sqrt(unit.fisher * unit.spectrum[boundary] / total) if total else 0.0
        self.square = 0.95 * self.square + 0.05 * sum(s * s for s in slopes) / len(slopes)
        scale = math.sqrt(self.square / (1 - 0.95 ** (self.step + 1)))
        self.slope = [s / max(scale, 1e-30) if self.config.normalize else s * self.config.r0 for s in slopes]

    def tangent(self, unit: SlowUnit, dots: list[float], boundary: int) -> float:
        """<dL/dm, dm/drho>, with dL/dm_j = dots_j / m_j."""
        gates = unit.gates()
        if self.config.gate == "sigmoid":
            return sum(d * (1 - g) / self.config.gate_width for d, g in zip(dots[1:], gates[1:], strict=True))
        if self.config.gate == "scale":  # every open gate is alpha
            return sum(dots[: self.open(unit)]) / self.rho(unit)
        return dots[boundary] / gates[boundary]

    def open(self, unit: SlowUnit) -> int:
        return max(1, math.floor(self.rho(unit) + 0.5))

    def propose(self) -> None:
        phase_is_adapt = self.step >= self.warmup
        self.step += 1
        if not phase_is_adapt:
            return
        self.move_alpha()
        if self.step % self.config.update_interval == 0:
            self.allocate()

    def parameters(self) -> float:
        total = sum(u.own * self.rho(u) for u in self.units)
        for m, common in enumerate(self.common):
            total += common * max(self.rho(u) for u in self.units if u.module == m)
        return total

    def marginal(self, unit: SlowUnit) -> float:
        """What the unit's next component costs; a shared row is paid by those that reach it."""
        beside = [self.rho(u) for u in self.units if u.module == unit.module]
        share = self.rho(unit) ** 8 / sum(r**8 for r in beside)
        return unit.own + share * self.common[unit.module]

    def move_alpha(self) -> None:
        assert self.slope is not None
        c = self.config
        costs = [sum(self.marginal(u) for u in self.units if u.group == g) for g in range(self.groups)]
        weights = [cost / (sum(costs) / len(costs)) if c.cost_weighted else 1.0 for cost in costs]
        if c.slope == "secant":
            weights = [math.sqrt(w) for w in weights]
        if self.budget is not None:
            excess = self.parameters() / self.budget - 1
            self.dual = max(0.0, self.dual + c.lr_price * excess)
            self.price = max(0.0, self.dual + 2 * math.sqrt(c.lr_price / c.lr_alpha) * excess)
        for g in range(self.groups):
            live = [u.live for u in self.units if u.group == g and u.live < u.limit]
            pull = self.slope[g] + self.price * weights[g]  # alpha >= 0: l1 is linear
            strength, last = self.price * c.tv, self.previous[g]
            if c.variation_form == "explicit":
                change = -c.lr_alpha * (pull + strength * (self.alpha[g] - last))
            elif c.variation == "temporal_abs":  # soft threshold of the step
                change = -math.copysign(max(abs(c.lr_alpha * pull) - c.lr_alpha * strength, 0.0), pull)
            else:
                change = -c.lr_alpha * pull / (1 + c.lr_alpha * strength)
            self.previous[g] = self.alpha[g]
            self.alpha[g] = max(1 / c.r0, min(self.alpha[g] + change, min([self.limits[g], *live]) / c.r0))

    def allocate(self) -> None:
        for unit in self.units:
            wanted = min(math.ceil(self.rho(unit)) + 1, unit.limit)
            kept = min(math.ceil(self.rho(unit) + self.config.hysteresis) + 1, unit.limit)
            if unit.live < wanted or unit.live > kept:
                unit.live = wanted

    def expected_gates(self, unit: SlowUnit) -> list[float]:
        rho, floor, kind = self.rho(unit), self.config.gate_floor, self.config.gate
        gates = []
        for j in range(unit.live):
            if kind == "sigmoid":
                gates.append(1 / (1 + math.exp(-(rho - j - 0.5) / self.config.gate_width)))
                continue
            if kind in ("ste", "scale"):
                gates.append((1.0 if kind == "ste" else self.alpha[unit.group]) if j < self.open(unit) else floor)
                continue
            inside = rho - j  # above 0 in what the soft rank covers, then the look-ahead
            gates.append(max(min(inside, 1.0), floor) if inside >= 0 else max(0.0, floor * (1 + inside)))
        return gates if kind == "scale" else [1.0, *gates[1:]]  # component 0 is always open


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
    config = ard.ArdConfig(**{"r0": 3, "head_dim": 8, "update_interval": 5, "lr_alpha": 0.03, **options})
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

    def watched(model: nn.Module, update: ard.RankUpdate, optimizer: Any = None) -> None:
        def loss() -> float:
            with torch.no_grad():
                return float((model(x) - y).square().mean())

        layers = {name: ard.adapters(model)[name] for name in update.modules}
        before, rows = loss(), {name: components(layer, optimizer) for name, layer in layers.items()}
        apply(model, update, optimizer)
        for name, layer in layers.items():
            assert_followed(rows[name], layer, optimizer, update.modules[name])
        jumps.append(abs(loss() - before) / before)
        ends.append({rank for layer in ard.adapters(model).values() for rank in layer.ranks})

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
