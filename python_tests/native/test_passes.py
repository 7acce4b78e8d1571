"""The native passes of controllers and rank changes against the reference: dots, scores, slopes, costs, gates, rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ardlora_ext.native import reference
from ardlora_ext.native.compiled import DTYPE_CODES, core

from helpers.tolerances import ACTIVATIONS


@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_row_dots(isa: str, dtype: torch.dtype) -> None:
    pairs = [(torch.randn(r, c).to(dtype), torch.randn(r, c).to(dtype)) for r, c in ((3, 70), (1, 1), (9, 33), (2, 64))]
    blocks = np.array([(w.data_ptr(), g.data_ptr(), *w.shape) for w, g in pairs], dtype=np.int64)
    out = core.row_dots(blocks, DTYPE_CODES[dtype], 2)
    expected = torch.cat([reference.row_dots(w.double(), g.double()) for w, g in pairs])
    scale = torch.cat([(w.double().norm(dim=1) * g.double().norm(dim=1)) for w, g in pairs])
    assert ((torch.from_numpy(out).double() - expected).abs() <= 1e-6 * scale).all()


def test_row_dots_do_not_depend_on_threads() -> None:
    sizes = ((7001, 33), (0, 5), (3, 70_001), (1, 1), (2000, 130))  # the parts of threads end within rows and blocks
    pairs = [(torch.randn(r, c), torch.randn(r, c)) for r, c in sizes]
    blocks = np.array([(w.data_ptr(), g.data_ptr(), *w.shape) for w, g in pairs], dtype=np.int64)
    alone = core.row_dots(blocks, DTYPE_CODES[torch.float32], 1)
    expected = torch.cat([reference.row_dots(w.double(), g.double()) for w, g in pairs])
    torch.testing.assert_close(torch.from_numpy(alone).double(), expected, rtol=0, atol=1e-2)
    for threads in (2, 3, 7):
        assert np.array_equal(core.row_dots(blocks, DTYPE_CODES[torch.float32], threads), alone)
    with pytest.raises(ValueError, match="row_dots: blocks must have columns, got 3 x 0"):
        core.row_dots(np.array([[0, 0, 3, 0]]), DTYPE_CODES[torch.float32], 1)


def importance_blocks(dtypes: list[torch.dtype]) -> list[tuple[torch.Tensor, ...]]:
    """Weight, gradient, sensitivity and uncertainty of factors of odd sizes, one of them large enough for threads."""
    shapes = ((3, 70), (1, 1), (9, 33), (0, 5), (130, 1030))
    return [
        (torch.randn(s).to(d), torch.randn(s).to(d), torch.rand(s), torch.rand(s))
        for s, d in zip(shapes, itertools.cycle(dtypes), strict=False)
    ]


def importance_table(blocks: list[tuple[torch.Tensor, ...]]) -> np.ndarray:
    rows = [(*(t.data_ptr() for t in b), *b[0].shape, DTYPE_CODES[b[0].dtype]) for b in blocks]
    return np.array(rows, dtype=np.int64)


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16, torch.float32], [torch.float16]])
def test_importance_follows_its_equations(isa: str, dtypes: list[torch.dtype]) -> None:
    blocks = importance_blocks(dtypes)
    expected = [reference.importance_step(*(t.double() for t in b), 0.85, 0.9) for b in blocks]
    again = [(w, g, s.clone(), u.clone()) for w, g, s, u in blocks]
    assert core.importance(importance_table(blocks), 0.85, 0.9, 1)
    assert core.importance(importance_table(again), 0.85, 0.9, 3)
    for (_, _, s, u), (exact_s, exact_u), (_, _, same_s, same_u) in zip(blocks, expected, again, strict=True):
        torch.testing.assert_close(s.double(), exact_s, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(u.double(), exact_u, rtol=1e-6, atol=1e-6)
        assert torch.equal(s, same_s), "the same for any number of threads"
        assert torch.equal(u, same_u)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 296), (4, 130 * 1030 - 1), (4, 70_000)])
def test_importance_changes_nothing_where_a_gradient_is_not_finite(
    isa: str, bad: float, place: tuple[int, int]
) -> None:
    blocks = importance_blocks([torch.float32])
    blocks[place[0]][1].view(-1)[place[1]] = bad
    before = [(s.clone(), u.clone()) for _, _, s, u in blocks]
    assert not core.importance(importance_table(blocks), 0.85, 0.9, 2)
    for (_, _, s, u), (old_s, old_u) in zip(blocks, before, strict=True):
        assert torch.equal(s, old_s)
        assert torch.equal(u, old_u)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 12), cols=st.integers(1, 9), in_place=st.booleans())
def test_rank_resize_is_a_gather_in_any_order(data: st.DataObject, rows: int, cols: int, in_place: bool) -> None:
    count = rows if in_place else data.draw(st.integers(0, 14))
    sources = data.draw(st.permutations([*range(rows), *[-1] * 14]))[:count]
    old = torch.randn(rows, cols)
    expected = reference.rank_resize(old, sources)
    new = old if in_place else torch.full((count, cols), float("nan"))
    moves = np.array([(old.data_ptr(), new.data_ptr(), 4 * cols, rows, 0)], dtype=np.int64)
    core.rank_resize(moves, [sources], 2)
    assert torch.equal(new[:count], expected)


def test_rank_resize_checks_everything_before_it_moves() -> None:
    good, bad = torch.ones(2, 3), torch.ones(2, 3)
    moves = np.array(
        [(good.data_ptr(), good.data_ptr(), 12, 2, 0), (bad.data_ptr(), bad.data_ptr(), 12, 2, 1)], dtype=np.int64
    )
    with pytest.raises(ValueError, match="rank_resize: index must use each row once, got 1 twice"):
        core.rank_resize(moves, [[-1, -1], [1, 1]], 1)
    assert good.all()


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(live=st.lists(st.integers(1, 9), min_size=1, max_size=12), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_secant_slopes(live: list[int], width: int, seed: int) -> None:
    units = len(live)
    dots = [_random(seed + u, r).float() - 0.5 for u, r in enumerate(live)]
    rho, spectrum, fisher = 12.0 * _random(seed, units) - 1.0, _random(seed + 1, units, width), _random(seed + 2, units)
    spectrum[0] = 0.0  # a unit whose lora_B is still zero
    ours = fisher.numpy().copy()
    slopes = core.secant_slopes(torch.cat(dots).numpy(), np.array(live), rho.numpy(), spectrum.numpy(), ours, 0.95)
    expected, mean = reference.secant_slopes([d.double() for d in dots], rho, spectrum, fisher, 0.95)
    torch.testing.assert_close(torch.from_numpy(slopes), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.from_numpy(ours), mean, rtol=1e-12, atol=0)
    assert slopes[0] == 0.0


def test_secant_slopes_refuses_what_does_not_fit() -> None:
    live, ones = np.array([2, 1]), np.ones(2)
    with pytest.raises(ValueError, match="secant_slopes: dots must have 3 entries, got 2"):
        core.secant_slopes(np.ones(2, np.float32), live, ones, np.ones((2, 2)), ones, 0.9)
    with pytest.raises(ValueError, match="secant_slopes: live ranks must be >= 1, got 0"):
        core.secant_slopes(np.ones(1, np.float32), np.array([1, 0]), ones, np.ones((2, 2)), ones, 0.9)
    with pytest.raises(ValueError, match="secant_slopes: arrays must have 2 units each"):
        core.secant_slopes(np.ones(3, np.float32), live, ones, np.ones((1, 2)), ones, 0.9)
    with pytest.raises(ValueError, match="unit_costs: modules must be 0 to 1, got 2"):
        core.unit_costs(ones, ones, np.array([0, 2]), ones)


@settings(max_examples=60, deadline=None)
@given(units=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_unit_costs(units: list[int], seed: int) -> None:
    module_of = torch.repeat_interleave(torch.arange(len(units)), torch.tensor(units))
    own, common = 100 * _random(seed, sum(units)), 1000 * _random(seed + 1, len(units))
    ranks = 8.0 * _random(seed + 2, sum(units))
    ranks[module_of == 0] = 0.0
    parameters, marginal = core.unit_costs(own.numpy(), common.numpy(), module_of.numpy(), ranks.numpy())
    expected, costs = reference.unit_costs(own, common, module_of, ranks)
    assert parameters == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.from_numpy(marginal), costs, rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    alpha=st.lists(st.floats(0, 4), min_size=1, max_size=8),
    step=st.floats(1e-3, 1.0),
    price=st.floats(0, 2),
    tv=st.floats(0, 5),
    seed=st.integers(0, 99),
)
def test_prox_step_is_the_minimiser(alpha: list[float], step: float, price: float, tv: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.tensor(alpha, dtype=torch.float64)
    grad = torch.randn(len(a), generator=generator, dtype=torch.float64)
    weight = torch.rand(len(a), generator=generator, dtype=torch.float64) + 0.1
    lo, hi = torch.full_like(a, 0.125), torch.full_like(a, 4.0)
    ours = a.numpy().copy()
    core.prox_step(ours, grad.numpy(), weight.numpy(), lo.numpy(), hi.numpy(), step, price, tv)
    torch.testing.assert_close(
        torch.from_numpy(ours), reference.prox_step(a, grad, weight, lo, hi, step, price, tv), rtol=1e-12, atol=1e-12
    )

    def objective(z: torch.Tensor) -> torch.Tensor:
        return grad * z + price * weight * z.abs() + (price * tv + 1.0 / step) / 2.0 * (z - a) ** 2

    grid = torch.linspace(0.125, 4.0, 4001, dtype=torch.float64)
    best = torch.stack([objective(g.expand_as(a)) for g in grid]).min(dim=0).values
    assert (objective(torch.from_numpy(ours)) <= best + 1e-9).all()


GATES = ["ramp", "ste", "sigmoid", "scale"]


@pytest.mark.parametrize("rho", [-1.0, 0.0, 1.0, 2.0, 2.3, 2.95, 3.0, 7.999, 12.0])
@pytest.mark.parametrize("kind", GATES)
def test_gates(kind: str, rho: float) -> None:
    gate = torch.full((9,), -1.0)
    blocks = np.array([[gate.data_ptr(), 9]], dtype=np.int64)
    core.set_gates(blocks, np.array([rho]), GATES.index(kind), 0.1, 4.0)
    torch.testing.assert_close(gate, reference.gates(kind, rho, 9, 0.1, 4.0).float())
    live = gate[: int(np.ceil(rho)) + 1]
    assert (live[:-1] > 0).all(), "the boundary component is always trained"


def test_ramp_gates_are_continuous() -> None:
    points = np.linspace(1.0, 6.0, 2001)
    gates = torch.stack([reference.gates("ramp", float(r), 8, 0.1) for r in points])
    rise = gates[1:] - gates[:-1]
    assert rise.max().item() <= points[1] - points[0] + 1e-9
    assert rise.min().item() >= -1e-12, "more rank never closes a gate"
    assert not gates[0, 2:].any()
