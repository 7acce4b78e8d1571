"""Rank changes: what is kept is kept bit for bit, in parameters, gradients and optimizer state alike."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import ardlora_ext as ard
from ardlora_ext import RankUpdate, UnitUpdate
from ardlora_ext.layers.linear import Gate, LoraLinear
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.ranks import resize

from helpers.adapters import every_layout, fingerprint, make_layer, set_ranks
from helpers.models import Attention, trainable
from helpers.resizing import RowProducts, assert_followed, components, step

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw-single": lambda p: AdamW(p, lr=1e-2, foreach=False),
    "adamw-foreach": lambda p: AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "adam-amsgrad": lambda p: Adam(p, lr=1e-2, amsgrad=True),
    "sgd-momentum": lambda p: SGD(p, lr=1e-2, momentum=0.9),
    "sgd-fused": lambda p: SGD(p, lr=1e-2, momentum=0.9, fused=True),
}
every_optimizer = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))


def wrapped(factoring: Any = "shared", **options: Any) -> nn.Module:
    """A model with every kind of unit."""
    config = ard.ArdConfig(
        **{
            "mode": "paper",
            "granularity": "head",
            "r0": 3,
            "r_max": 8,
            "head_dim": 8,
            "factoring": factoring,
            **options,
        }
    )
    return ard.wrap(Attention(), config)


def random_update(model: nn.Module, rng: random.Random, grow: bool = True, prune: bool = True) -> RankUpdate:
    """Any change that fits: components dropped and reordered (in common where they are shared), others added."""
    modules = {}
    for name, layer in ard.adapters(model).items():
        order = rng.sample(range(max(layer.ranks)), max(layer.ranks)) if prune else list(range(max(layer.ranks)))
        units = []
        for rank in layer.ranks:
            if layer.layout.shared:  # a prefix of the common order, as far as the unit has those components
                keep = order[: next((i for i, k in enumerate(order) if k >= rank), rank)]
            else:
                keep = [k for k in order if k < rank]
            keep = keep[: rng.randint(0, len(keep))] if prune else keep
            units.append(UnitUpdate(tuple(keep), rng.randint(0, layer.max_rank - len(keep)) if grow else 0))
        modules[name] = tuple(units)
    return RankUpdate(modules, seed=rng.randint(0, 99))


@every_optimizer
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), factoring=st.sampled_from(["shared", "independent"]))
def test_rows_gradients_and_moments_follow(
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer], seed: int, factoring: str
) -> None:
    rng, model = random.Random(seed), wrapped(factoring)
    optimizer = make_optimizer(trainable(model))
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    for round_ in range(3):
        step(model, optimizer, seed + round_)
        layers = ard.adapters(model)
        before = {name: components(layer, optimizer) for name, layer in layers.items()}
        steps = {id(p): float(state["step"]) for p, state in optimizer.state.items() if "step" in state}
        update = random_update(model, rng)
        resize.apply(model, update, optimizer)
        for name, layer in layers.items():
            assert layer.ranks == [u.rank for u in update.modules[name]]
            assert_followed(before[name], layer, optimizer, update.modules[name])
        assert steps == {id(p): float(state["step"]) for p, state in optimizer.state.items() if "step" in state}
        assert groups == [[id(p) for p in group["params"]] for group in optimizer.param_groups]


@every_layout
@pytest.mark.parametrize("gate", ["controlled", "trained"])
def test_gates_follow(layout: Any, gate: Gate) -> None:
    layer, rng = make_layer(layout, gate=gate), random.Random(0)
    for _ in range(20):
        assert layer.gate is not None
        begins = layer.table.unit_begin
        before = [layer.gate[a:b].tolist() for a, b in pairwise(begins)]
        update = random_update(layer, rng)
        resize.apply(layer, update)
        units, expected = update.modules[""], []
        for unit, old in zip(units, before, strict=True):
            expected += [old[k] for k in unit.keep] + [0.0] * unit.grow
        assert layer.gate[: sum(layer.ranks)].tolist() == expected
        layer.gate.data[: sum(layer.ranks)] = torch.rand(sum(layer.ranks))


@every_layout
@pytest.mark.parametrize("gate", ["none", "controlled"])
@pytest.mark.parametrize("seed", range(5))
def test_growth_leaves_outputs_bitwise_unchanged(layout: Any, gate: Gate, seed: int) -> None:
    layer, x = make_layer(layout, gate=gate), torch.randn(7, layout.in_features)
    rng = random.Random(seed)
    for _ in range(3):
        before = layer(x)
        resize.apply(layer, random_update(layer, rng, prune=False))
        if layer.lora_gate is not None:
            layer.lora_gate.clamp_(min=0.1)  # opened: it is lora_B (or lora_A) that is zero
            continue
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factoring", ["shared", "independent"])
@pytest.mark.parametrize("kind", ["matrix", "out_heads", "in_heads"])
def test_growth_moves_no_bit_of_wide_layers(isa: str, kind: Any, factoring: Any, dtype: torch.dtype) -> None:
    """From rank 1 up through every tile size of the kernels."""
    layout = UnitLayout(kind, factoring, 1 if kind == "matrix" else 3, 612, 606)
    layer = LoraLinear(nn.Linear(612, 606).to(dtype), layout, 1, 0.7, max_rank=48)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 612).to(dtype)
    for t, growth in enumerate((1, 1, 1, 2, 3, 7, 12, 20)):
        before = layer(x)
        grown = [UnitUpdate(tuple(range(r)), growth if (u + t) % 2 == 0 else 0) for u, r in enumerate(layer.ranks)]
        resize.apply(layer, RankUpdate({"": tuple(grown)}))
        assert torch.equal(layer(x), before), layer.ranks


@every_layout
def test_no_component_is_born_dead(layout: Any) -> None:
    layer = LoraLinear(nn.Linear(layout.in_features, layout.out_features), layout, 1, 1.0, max_rank=4)
    x = torch.randn(9, layout.in_features)
    for ranks in ([2, 1, 1, 1], [2, 2, 1, 1], [3, 2, 3, 1], [3, 3, 3, 3]):  # one after the other, without a step
        set_ranks(layer, lambda _, u, ranks=ranks: ranks[u])
        layer.zero_grad()
        layer(x).square().sum().backward()
        for (factor, u, j), rows in components(layer, None).items():
            other = components(layer, None)["lora_B" if factor == "lora_A" else "lora_A", u, j]
            assert rows["grad"].any() or other["grad"].any(), f"component {j} of unit {u} can never learn"


@every_layout
def test_a_new_direction_is_orthogonal_to_the_live_ones(layout: Any) -> None:
    layer = make_layer(layout)
    set_ranks(layer, lambda *_: 1)
    old = layer.lora_A[: layer.layout.rows(layer.ranks)[0]].detach().clone()
    set_ranks(layer, lambda _, u: 2 if u == 0 else 1)
    new = components(layer, None)["lora_A", 0, 1]["parameter"]
    assert new.norm() > 0.1
    assert (old @ new).abs().max() < 1e-6 * old.norm() * new.norm()


@every_optimizer
@pytest.mark.parametrize("factoring", ["shared", "independent"])
def test_prune_then_step_equals_step_then_prune(
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer], factoring: str
) -> None:
    ends = []
    for prune_first in (True, False):
        torch.manual_seed(0)
        model = wrapped(factoring, r0=6)
        optimizer = make_optimizer(trainable(model))
        update = random_update(model, random.Random(1), grow=False)
        step(model, optimizer, 0)
        if prune_first:  # moves the gradients too
            resize.apply(model, update, optimizer)
        optimizer.step()
        if not prune_first:
            resize.apply(model, update, optimizer)
        ends.append({name: components(layer, optimizer) for name, layer in ard.adapters(model).items()})
    for name, expected in ends[1].items():
        assert ends[0][name].keys() == expected.keys()
        for key, rows in expected.items():
            for what, row in rows.items():
                torch.testing.assert_close(ends[0][name][key][what], row, rtol=1e-6, atol=1e-9)


@every_optimizer
def test_training_goes_on_through_fifty_rank_changes(
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
) -> None:
    model, rng = wrapped(), random.Random(0)
    optimizer = make_optimizer(trainable(model))
    x, y = torch.randn(64, 32), torch.randn(64, 32)

    def train() -> float:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    for _ in range(50):
        train()
        resize.apply(model, random_update(model, rng), optimizer)
        for layer in ard.adapters(model).values():
            gate = layer.lora_gate
            assert gate is not None
            gate[: sum(layer.ranks)] = 1.0
            assert len(gate) == len(layer.gated)
            assert not gate[sum(layer.ranks) :].any()
            h = torch.randn(3, layer.layout.in_features)
            torch.testing.assert_close(layer(h), layer.base_layer(h) + h @ layer.get_delta_weight().T)
    set_ranks(model, lambda *_: 4, optimizer)
    losses = [train() for _ in range(30)]
    assert losses[-1] < losses[0]


def _two_units(first: UnitUpdate, *rest: UnitUpdate) -> tuple[UnitUpdate, ...]:
    return (first, *rest, *[UnitUpdate((0, 1, 2))] * (3 - len(rest)))


@pytest.mark.parametrize(
    ("name", "units", "message"),
    [
        ("nowhere", (), "module must be an adapter of the model, got 'nowhere'"),
        ("o_proj", (UnitUpdate((0,)),), "'o_proj' must have 4 unit updates, got 1"),
        ("o_proj", _two_units(UnitUpdate((1, 1))), r"keep of 'o_proj' unit 0 must be distinct components of 3, got"),
        ("o_proj", _two_units(UnitUpdate((0, 3))), r"must be distinct components of 3, got \(0, 3\)"),
        ("o_proj", _two_units(UnitUpdate((-1,))), r"must be distinct components of 3, got \(-1,\)"),
        ("o_proj", _two_units(UnitUpdate((0,), 8)), "'o_proj' unit 0 must stay between rank 0 and 8, got 9"),
        ("o_proj", _two_units(UnitUpdate((0,), -1)), "must stay between rank 0 and 8, got 0"),
        ("o_proj", _two_units(UnitUpdate((2, 0))), "units of 'o_proj' share components and must keep a common order"),
    ],
)
def test_an_update_that_does_not_fit_changes_nothing(name: str, units: Any, message: str) -> None:
    model = wrapped()
    optimizer = AdamW(trainable(model))
    step(model, optimizer, 0)
    before, state = fingerprint(model), copy.deepcopy(optimizer.state_dict())
    update = RankUpdate({"q_proj": (UnitUpdate((2, 0)),) * 4, name: units})
    with pytest.raises(ValueError, match=message):
        resize.apply(model, update, optimizer)
    assert fingerprint(model) == before
    assert str(optimizer.state_dict()) == str(state)


def test_optimizer_state_that_cannot_follow_is_refused_before_anything_changes() -> None:
    model = wrapped()
    optimizer = RowProducts(trainable(model))
    step(model, optimizer, 0)
    before, state = fingerprint(model), str(optimizer.state_dict())
    with pytest.raises(ValueError, match="state 'gram' of RowProducts must have an entry per"):
        resize.apply(model, random_update(model, random.Random(0)), optimizer)
    assert fingerprint(model) == before
    assert str(optimizer.state_dict()) == state


unit_updates = st.builds(
    UnitUpdate, st.lists(st.integers(0, 40), unique=True, max_size=6).map(tuple), st.integers(0, 9)
)


@settings(max_examples=30, deadline=None)
@given(
    modules=st.dictionaries(st.text(min_size=1, max_size=9), st.lists(unit_updates, max_size=4).map(tuple), max_size=3),
    seed=st.integers(0, 2**40),
)
def test_json_round_trip(modules: dict[str, tuple[UnitUpdate, ...]], seed: int) -> None:
    update = RankUpdate(modules, seed)
    assert RankUpdate.from_json(json.loads(json.dumps(update.to_json()))) == update


class _Copies(TorchDispatchMode):
    """Counts conversions to another dtype or device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("init", ["zero", "unit"])
def test_growth_fetches_and_sends_once_however_many_layers_grow(init: Any) -> None:
    counts = []
    for layers in (1, 6):
        layout, gate = UnitLayout("matrix", "shared", 1, 24, 24), "none" if init == "zero" else "trained"
        parts = [LoraLinear(nn.Linear(24, 24), layout, 2, 1.0, max_rank=6, gate=gate) for _ in range(layers)]  # type: ignore[arg-type]
        model = nn.Sequential(*parts)
        for layer in parts:
            for factor in (layer.lora_A, layer.lora_B):
                factor.data = factor.data.to(torch.bfloat16)
        update = RankUpdate({name: (UnitUpdate((1, 0), 1),) for name in ard.adapters(model)}, init=init)
        with _Copies() as copies:
            resize.apply(model, update)
        counts.append(copies.count)
        for layer in parts:
            rows = layer.lora_A.detach().double()
            assert float((rows[:2] @ rows[2]).abs().max()) < 0.02 * float(rows[2].norm())
            assert 0.5 < float(rows[2].norm()) < 1.1
    assert counts[0] == counts[1] > 0


@every_optimizer
def test_matrices_that_change_alike_and_not_alike(make_optimizer: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    model = nn.Sequential(*(nn.Linear(n, 8) for n in (8, 8, 12, 8)))
    ard.wrap(model, ard.LoraConfig(r=4))
    optimizer = make_optimizer(trainable(model))
    step(model, optimizer, 0)
    names = list(ard.adapters(model))
    turned, cut = (UnitUpdate((2, 0, 1), 1),), (UnitUpdate((3,)),)
    update = RankUpdate(dict(zip(names, (turned, turned, turned, cut), strict=True)))
    before = {name: components(layer, optimizer) for name, layer in ard.adapters(model).items()}
    resize.apply(model, update, optimizer)
    for name, layer in ard.adapters(model).items():
        assert_followed(before[name], layer, optimizer, update.modules[name])


def test_the_same_update_gives_the_same_model() -> None:
    model = wrapped()
    update = random_update(model, random.Random(3))
    bits = []
    for _ in range(2):
        clone = copy.deepcopy(model)
        torch.manual_seed(random.getrandbits(20))  # not what counts
        resize.apply(clone, update)
        bits.append(fingerprint(clone)["bits"])
    assert bits[0] == bits[1]
