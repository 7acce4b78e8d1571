"""Compression and SVD pruning against dense oracles, on all unit kinds, with the optimizer's state."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ardlora_ext as ard
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.native import reference
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.ranks import resize
from ardlora_ext.ranks.controllers.worth import offers
from ardlora_ext.ranks.recompress import cores, groups, recompress
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate

from helpers.models import Attention, trainable

LAYOUTS = [
    UnitLayout("matrix", "shared", 1, 24, 32),
    *(UnitLayout("out_heads", f, 4, 24, 32) for f in ("shared", "independent")),  # type: ignore[arg-type]
    *(UnitLayout("in_heads", f, 4, 24, 32) for f in ("shared", "independent")),  # type: ignore[arg-type]
]
PRUNED = {1: [[0], [1], [3], [5]], 4: [[0, 0, 0, 0], [1, 1, 1, 1], [3, 0, 5, 2], [5, 4, 5, 5]]}
CASES = [(layout, ranks) for layout in LAYOUTS for ranks in PRUNED[layout.units]]


class Wrapped(nn.Module):
    """One adapter that counts as a wrapped model."""

    def __init__(self, layout: UnitLayout, gate: str = "none", r: int = 5) -> None:
        super().__init__()
        self.x = nn.Linear(24, 32)
        ard.wrap(self, ard.LoraConfig(r=r))
        base = self.x.base_layer
        self.x = LoraLinear(base, layout, r, 0.7, gate=gate)  # type: ignore[arg-type]
        with torch.no_grad():
            a_rows, b_rows = layout.rows(self.x.ranks)
            self.x.lora_A[:a_rows].normal_()
            self.x.lora_B[:b_rows].normal_()
            if self.x.gate is not None:
                self.x.gate[: sum(self.x.ranks)].uniform_(0.2, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.x(x)
        return out


def blocks(layer: LoraLinear) -> list[torch.Tensor]:
    """The dense update of each unit, in float64."""
    dense = reference.lora_delta(
        layer.layout, layer.ranks, layer.lora_A.double(), layer.lora_B.double(), layer.gate, layer.scaling
    ).detach()
    return [dense[out, cols] for _, _, cols, out in
            ((a, b, c, o) for a, b, c, o in reference.unit_slices(layer.layout, layer.ranks))]  # fmt: skip


def dropped(model: Wrapped, ranks: list[int]) -> Wrapped:
    """The model without all but the first components of each unit."""
    other = copy.deepcopy(model)
    resize.apply(other, RankUpdate({"x": tuple(UnitUpdate(tuple(range(r))) for r in ranks)}))
    return other


def distance(a: Wrapped, b: Wrapped) -> float:
    return sum((x - y).square().sum().item() for x, y in zip(blocks(a.x), blocks(b.x), strict=True)) ** 0.5


@pytest.mark.parametrize("gate", ["none", "controlled", "trained"])
@pytest.mark.parametrize(("layout", "ranks"), CASES)
def test_pruned_update_is_the_best_approximation(layout: UnitLayout, ranks: list[int], gate: str) -> None:
    model = Wrapped(layout, gate)
    before = copy.deepcopy(model)
    old = blocks(model.x)
    change = ard.svd_prune(model, {"x": ranks})
    assert model.x.ranks == ranks
    assert change == pytest.approx(distance(model, before), rel=1e-4, abs=1e-4)
    assert distance(model, before) <= distance(dropped(before, ranks), before) * (1 + 1e-6)
    new = blocks(model.x)
    if not layout.shared:
        for block, result, r in zip(old, new, ranks, strict=True):
            u, s, vh = torch.linalg.svd(block)
            torch.testing.assert_close(result, (u[:, :r] * s[:r]) @ vh[:r], rtol=1e-4, atol=1e-5)
    elif len(set(ranks)) == 1:
        axis = 0 if layout.kind == "out_heads" else 1
        u, s, vh = torch.linalg.svd(torch.cat(old, dim=axis))
        r = ranks[0]
        torch.testing.assert_close(torch.cat(new, dim=axis), (u[:, :r] * s[:r]) @ vh[:r], rtol=1e-4, atol=1e-5)
    a_rows, b_rows = layout.rows(ranks)
    assert not model.x.lora_A[a_rows:].any()
    assert not model.x.lora_B[b_rows:].any()
    if gate == "controlled":
        assert model.x.lora_gate is not None
        assert len(model.x.lora_gate) == len(model.x.gated)
        assert not model.x.lora_gate[sum(ranks) :].any()
    x = torch.randn(6, 24)
    dense = model.x.base_layer(x).double() + x.double() @ model.x.get_delta_weight().double().T
    torch.testing.assert_close(model(x).double(), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("layout", [lay for lay in LAYOUTS if lay.shared])
def test_common_basis_is_no_worse_than_any_common_order_of_dropping(layout: UnitLayout, seed: int) -> None:
    torch.manual_seed(seed)
    model = Wrapped(layout)
    with torch.no_grad():
        model.x.lora_B.mul_(torch.rand(model.x.lora_B.shape[0], 1) ** 2)
    ranks = torch.randint(0, 6, (4,)).tolist()
    svd = copy.deepcopy(model)
    ard.svd_prune(svd, {"x": ranks})
    change = distance(svd, model)
    for order in itertools.islice(itertools.permutations(range(5)), 0, None, 6):
        other = copy.deepcopy(model)
        resize.apply(other, RankUpdate({"x": tuple(UnitUpdate(order[:r]) for r in ranks)}))
        slack = 1e-6 if order == tuple(range(5)) else 0.01  # the first is a guarantee, the others are found
        assert change <= distance(other, model) * (1 + slack) + 1e-4


@pytest.mark.parametrize("gate", ["none", "controlled", "trained"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_turn_as_gradients_do(layout: UnitLayout, gate: str) -> None:
    """A function whose gradient is the same after pruning: first moments made of it must be what it gives then."""
    model = Wrapped(layout, gate)
    layer = model.x
    direction = torch.randn(32, 24)

    def gradients() -> dict[str, torch.Tensor]:
        delta = reference.lora_delta(layout, layer.ranks, layer.lora_A, layer.lora_B, layer.gate, layer.scaling)
        loss = (delta * direction).sum()
        names = list(layer.factors)
        return dict(zip(names, torch.autograd.grad(loss, [layer.factors[n] for n in names]), strict=True))

    if gate == "trained":
        with torch.no_grad():  # orthonormal rows: then turned gates are exact as well
            for block in groups(layer):
                for rows in (block.common, *block.own):
                    rows.copy_(torch.linalg.qr(rows.T).Q.T)
    optimizer = torch.optim.Adam(list(layer.factors.values()))
    for name, gradient in gradients().items():
        state = {"step": torch.tensor(7.0), "exp_avg": gradient.clone(), "exp_avg_sq": gradient.square()}
        optimizer.state[layer.factors[name]] = state
        layer.factors[name].grad = gradient.clone()
    ranks = [3] * layout.units
    ard.svd_prune(model, {"x": ranks}, optimizer)
    a_rows, b_rows = layout.rows(ranks)
    live = {"lora_A": a_rows, "lora_B": b_rows}
    for name, expected in gradients().items():
        parameter = layer.factors[name]
        state = optimizer.state[parameter]
        assert state["step"] == 7.0
        assert state["exp_avg"].shape == parameter.shape == state["exp_avg_sq"].shape
        assert (state["exp_avg_sq"] >= 0).all()
        assert not state["exp_avg"][live.get(name, sum(ranks)) :].any()
        if name != "lora_E":  # gates are carried by the diagonal terms only
            torch.testing.assert_close(state["exp_avg"], expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-3)


def test_second_moments_are_carried_by_squares() -> None:
    model = Wrapped(LAYOUTS[0])
    group = groups(model.x)[0]
    result = recompress(group, [3])
    square = torch.rand(5, 24)
    optimizer = torch.optim.Adam([model.x.lora_A])
    optimizer.state[model.x.lora_A] = {"exp_avg_sq": torch.cat([square, torch.zeros(3, 24)])}
    ard.svd_prune(model, {"x": [3]}, optimizer)
    expected = (result.turn_common**2 @ square.double()).float()
    torch.testing.assert_close(optimizer.state[model.x.lora_A]["exp_avg_sq"][:3], expected)
    torch.testing.assert_close(result.turn_own[0] @ result.turn_common.T, torch.eye(3, dtype=torch.float64))
    assert cores(group)[0].shape == (5, 5)


def test_full_rank_and_rank_deficient_units() -> None:
    model = Wrapped(LAYOUTS[0])
    same = copy.deepcopy(model)
    assert ard.svd_prune(model, {"x": [5]}) == 0.0
    assert torch.equal(model.x.lora_A, same.x.lora_A)
    with torch.no_grad():
        model.x.lora_B[2:] = 0.0  # rank 2 of 5: a third component must stay trainable
    before = copy.deepcopy(model)
    assert ard.svd_prune(model, {"x": [3]}) == pytest.approx(0.0, abs=1e-5)
    assert distance(model, before) < 1e-5
    assert model.x.lora_A[2].norm() > 0.1
    fresh = ard.wrap(Attention(), ard.LoraConfig(r=4))
    rows = fresh.q_proj.lora_A[:2].clone()
    ard.svd_prune(fresh, {"q_proj": [2]})  # an update of zero: first components, as they were
    assert torch.equal(fresh.q_proj.lora_A[:2], rows)


def test_fixed_capacity_keeps_addresses() -> None:
    model = ard.wrap(Attention(), ard.LoraConfig(r=4, capacity="fixed"))
    nn.init.normal_(model.q_proj.lora_B)
    address = model.q_proj.lora_B.data_ptr()
    ard.svd_prune(model, {"q_proj": [1]})
    assert model.q_proj.lora_B.data_ptr() == address
    assert not model.q_proj.lora_B[1:].any()


def test_errors_leave_everything_as_it_was() -> None:
    model = ard.wrap(Attention(), ard.ArdConfig(mode="paper", r0=4, granularity="matrix"))
    for layer in ard.adapters(model).values():
        nn.init.normal_(layer.lora_B)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adamax(trainable(model))
    model(torch.randn(2, 32)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    state = optimizer.state[ard.adapters(model)["q_proj"].lora_A]
    kept, state["exp_inf"] = state["exp_inf"], state["exp_inf"].long()
    with pytest.raises(ValueError, match="must be in floating point, got 'exp_inf'"):
        ard.svd_prune(model, {"q_proj": [2]}, optimizer)
    state["exp_inf"] = kept
    with pytest.raises(ValueError, match="must be an adapter of the model, got 'nope'"):
        ard.svd_prune(model, {"nope": [2]})
    for ranks in ([5], [-1], [1, 1]):
        with pytest.raises(ValueError, match="each between 0 and the present"):
            ard.svd_prune(model, {"q_proj": ranks})
    for budget in (0, -3, 1.5, 0.0, float("nan")):
        with pytest.raises(ValueError, match="budget must be parameters"):
            ard.compress(model, budget)
    with pytest.raises(TypeError, match="budget must be a number, got str"):
        ard.compress(model, "9")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"budget must be at least 320 parameters \(rank 1 everywhere\), got 255"):
        ard.compress(model, 255, min_rank=1)
    with pytest.raises(ValueError, match="min_rank must be >= 0, got -1"):
        ard.compress(model, 300, min_rank=-1)
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items())
    ard.attach(model, torch.optim.AdamW(trainable(model)), total_steps=10)
    with pytest.raises(ValueError, match="ranks must be settled, got phase 'warmup'"):
        ard.compress(model, 0.5)
    with pytest.raises(ValueError, match="must be wrapped"):
        ard.compress(Attention(), 0.5)
    with pytest.raises(ValueError, match="must have been trained"):
        ard.compress(ard.wrap(Attention(), ard.LoraConfig()), 0.5)


CONFIGS = [
    ard.LoraConfig(r=6),
    ard.DoraConfig(r=6),
    ard.ElaConfig(r=6),
    *(ard.LoraConfig(r=6, granularity="head", head_dim=8, factoring=f) for f in ("shared", "independent")),  # type: ignore[arg-type]
]


def trained_model(config: ard.AdapterConfig) -> Attention:
    """A wrapped block with updates of very different size and rank."""
    model = ard.wrap(Attention(), config)
    with torch.no_grad():
        for i, layer in enumerate(ard.adapters(model).values()):
            rows = layer.layout.rows(layer.ranks)[1]
            layer.lora_B[:rows].normal_()
            layer.lora_B[:rows] *= 0.1 * 2.0**i * torch.rand(rows, 1)
            if layer.lora_E is not None:
                layer.lora_E[:rows].normal_()
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{type(c).__name__}-{c.granularity}-{c.factoring}")
@pytest.mark.parametrize("budget", [0.5, 0.1, 700, 10**9])
def test_compress_meets_any_budget(config: ard.AdapterConfig, budget: float) -> None:
    model = trained_model(config)
    before = ard.parameters_report(model).live
    deltas = {n: torch.cat([b.reshape(-1) for b in blocks(layer)]) for n, layer in ard.adapters(model).items()}
    report = ard.compress(model, budget)
    after = ard.parameters_report(model).live
    allowed = int(budget * before) if budget < 1 else budget
    assert (report.before, report.after) == (before, after)
    assert after <= allowed
    assert report.ranks == {n: layer.ranks for n, layer in ard.adapters(model).items()}
    if budget < before:
        assert after > allowed - 64  # the cheapest component of matrices; DoRA pays magnitudes first
    lost = total = 0.0
    for name, layer in ard.adapters(model).items():
        new = torch.cat([b.reshape(-1) for b in blocks(layer)])
        lost += (new - deltas[name]).square().sum().item()
        total += deltas[name].square().sum().item()
    assert report.change == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-5)
    assert model(torch.randn(2, 32)).shape == (2, 32)


def test_one_threshold_over_all_matrices_equals_the_sorted_list() -> None:
    model = trained_model(ard.LoraConfig(r=6))
    values = []
    for name, layer in ard.adapters(model).items():
        cost = layer.layout.parameters([1])
        sigma = torch.linalg.svdvals(blocks(layer)[0])[:6]
        values += [(s.item() ** 2 / cost, cost, name) for s in sigma]
    values.sort(reverse=True)
    taken = values[:9]
    report = ard.compress(model, sum(cost for _, cost, _ in taken))
    assert report.after == sum(cost for _, cost, _ in taken)
    assert report.ranks == {n: [sum(name == n for _, _, name in taken)] for n in report.ranks}
    assert values[9][0] <= report.threshold * (1 + 1e-5)
    assert report.threshold <= values[8][0] * (1 + 1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.95), least=st.integers(0, 1))
def test_no_ranks_within_the_budget_are_worth_more(seed: int, share: float, least: int) -> None:
    """Against all 5^6 allocations of units of four costs: two that share, matrices of other widths."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(k, n) for k, n in ((6, 4), (6, 10), (3, 4), (7, 2), (5, 5))))
    heads = {"0": ("out", 2)}
    ard.wrap(model, ard.LoraConfig(r=4, granularity="head", head_dim=heads, capacity="fixed"))
    layers = ard.adapters(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.normal_()
            layer.lora_B.mul_(torch.rand(layer.lora_B.shape[0], 1))
    every = {name: offers(name, layer, least) for name, layer in layers.items()}

    def worth_of(ranks: Mapping[str, Sequence[int]]) -> float:
        return sum(float(o.worth[range(len(o.indices)), [ranks[n][u] for u in o.indices]].sum())
                   for n, some in every.items() for o in some)  # fmt: skip

    best: dict[int, float] = {}
    for flat in itertools.product(*(range(least, r + 1) for layer in layers.values() for r in layer.ranks)):
        left = iter(flat)
        ranks = {name: [next(left) for _ in layer.ranks] for name, layer in layers.items()}
        total = sum(layer.layout.parameters(ranks[name]) for name, layer in layers.items())
        best[total] = max(worth_of(ranks), best.get(total, -math.inf))
    before = ard.parameters_report(model).live
    allowed = max(min(best), round(share * before), 1)
    report = ard.compress(model, allowed, min_rank=least)
    assert report.after <= allowed
    wanted = max(worth for total, worth in best.items() if total <= allowed)
    assert worth_of({name: list(layer.ranks) for name, layer in layers.items()}) == pytest.approx(wanted, rel=1e-6)


def test_training_goes_on_after_compression() -> None:
    torch.manual_seed(3)
    model = ard.wrap(Attention(), ard.LoraConfig(r=8))
    x, target = torch.randn(64, 32), torch.randn(64, 32)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ard.attach(model, optimizer)
    losses = []
    for step in range(60):
        if step == 30:
            ard.compress(model, 0.4, optimizer=optimizer)
            assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in trainable(model))
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[30] < losses[0]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("layout", "ranks"), CASES)
def test_everything_is_made_on_the_layers_device(layout: UnitLayout, ranks: list[int], trained: bool) -> None:
    """A default device that is not the layer's: a tensor made without naming one would meet the layer's and fail."""
    layer = Wrapped(layout, "trained" if trained else "none").x
    for there, here in zip(groups(layer), groups(layer), strict=True):
        new = [ranks[u] for u in here.units]
        expected = recompress(here, new, trained)
        with torch.device("meta"):
            found = recompress(there, new, trained)
        assert found.lost == expected.lost
        assert torch.equal(found.common, expected.common)
        assert all(map(torch.equal, found.turn_own, expected.turn_own))
    expected_menus = offers("x", layer, 0)
    with torch.device("meta"):
        menus = offers("x", layer, 0)
    assert all((a.worth == b.worth).all() for a, b in zip(menus, expected_menus, strict=True))
