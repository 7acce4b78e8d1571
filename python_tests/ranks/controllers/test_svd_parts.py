"""Parts of ElaLoRA and AdaLoRA that need no training run: choice of components, schedule, regulariser, first rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext.layers.start import fresh
from ardlora_ext.layers.start.fresh import Fresh, orthogonal_rows, random_rows
from ardlora_ext.layers.start.svd import projected_row
from ardlora_ext.native import reference
from ardlora_ext.ranks.controllers.svd.ela import candidates, exchange, with_ties
from ardlora_ext.ranks.controllers.svd.schedule import Phases, exchange_count
from ardlora_ext.ranks.controllers.svd.soft_orthogonality import (
    Rows,
    add_penalty_gradients,
    penalty,
    penalty_gradient,
    share,
)
from ardlora_ext.ranks.optimizer import pin_lr
from ardlora_ext.ranks.resize import apply

from helpers.slow_svd import batch, chain_and_teacher


def test_rounds_of_a_published_script() -> None:
    """RTE: 1950 steps, b = 4, warm-up 300, final 500, interval 50 give 21 rounds and 67 moves."""
    phases = Phases(300, 500, 1950)
    moves = [exchange_count(t, phases, 50, 4, True) for t in range(1950)]
    assert sum(m > 0 for m in moves) == 21
    assert sum(moves) == 67


def test_candidates_keep_one_component_and_pass_over_young_ones() -> None:
    scores = np.array([5.0, 1.0, 2.0, 9.0, 4.0, 3.0])
    unit, live = np.array([0, 0, 0, 1, 2, 2]), np.array([3, 1, 2])
    young = np.array([False, True, False, False, False, False])
    pool = candidates(scores, unit, live, young, k=2)
    assert pool.members.tolist() == [2, 5, 0]
    assert pool.prunable.all()
    pool = candidates(scores, unit, live, young, k=2, single=True)
    assert pool.members.tolist() == [2, 5, 0, 3]
    assert pool.prunable.tolist() == [True, True, True, False]
    assert pool.exchanges == 2


def test_exchange_is_disjoint_balanced_and_respects_room() -> None:
    scores = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    unit, live = np.array([0, 0, 1, 1, 2, 2]), np.array([2, 2, 2])
    pool = candidates(scores, unit, live, np.zeros(6, dtype=bool), k=2)
    assert pool.members.tolist() == [0, 2, 4]
    low, high = exchange(pool, unit, np.array([9, 9, 9]), b=5)
    assert (low.tolist(), high.tolist()) == ([0], [4])
    low, high = exchange(pool, unit, np.array([9, 9, 0]), b=1)
    assert (low.tolist(), high.tolist()) == ([0], [2])
    low, high = exchange(pool, unit, np.array([9, 0, 0]), b=1)
    assert (low.tolist(), high.tolist()) == ([], [])


def test_ties_at_the_threshold_are_pruned_together_in_code_mode() -> None:
    scores = np.array([1.0, 1.0, 7.0, 1.0, 8.0, 9.0])
    unit, live = np.array([0, 0, 0, 1, 1, 1]), np.array([3, 3])
    pool = candidates(scores, unit, live, np.zeros(6, dtype=bool), k=2)
    assert pool.members.tolist() == [0, 1, 3, 4]
    assert with_ties(np.array([0]), pool, unit, scores).tolist() == [0, 1]


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_closed_form_gradient_equals_autograd(form: Any) -> None:
    for shape in [(1, 5), (3, 7), (6, 6)]:
        rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(penalty(rows, form), rows)
        torch.testing.assert_close(penalty_gradient(rows.detach(), form), expected, rtol=1e-12, atol=1e-12)
    assert penalty_gradient(torch.eye(3), form).abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["squared", "norm"])
def test_penalty_gradients_of_all_units(form: Any, dtype: torch.dtype, isa: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def rows(r: int, width: int) -> torch.Tensor:
        return (torch.randn(r, width, generator=generator) / width**0.5).to(dtype)

    sizes = [(5, 33), (0, 8), (1, 1), (16, 200), (3, 64), (70, 75)]
    factors = [rows(r + 2, width) for r, width in sizes]
    grads = [rows(*f.shape) for f in factors]
    grads[4] = rows(64, 5).T  # not contiguous: torch does it
    before = [g.double() for g in grads]
    units = [Rows(f, g, 1, 1 + r, 0.1 + r) for (r, _), f, g in zip(sizes, factors, grads, strict=True)]
    units += [Rows(factors[3], grads[3], 17, 18, 2.0)]  # two units of one factor
    add_penalty_gradients(units, form)
    expected, roundings = [g.clone() for g in before], [g.abs() for g in before]
    for unit, k in zip(units, (0, 1, 2, 3, 4, 5, 3), strict=True):
        part, m = slice(unit.begin, unit.end), factors[k][unit.begin : unit.end].double()
        expected[k][part] += unit.strength * penalty_gradient(m, form)
        norm = 1.0 if form == "squared" else penalty(m, form).clamp(min=0.1)
        roundings[k][part] += unit.strength * 4.0 / norm * ((m.abs() @ m.abs().T + 1.0) @ m.abs())
    for grad, e, size in zip(grads, expected, roundings, strict=True):
        assert ((grad.double() - e).abs() <= torch.finfo(dtype).eps * e.abs() + 1e-6 * size).all()


def test_both_forms_start_equally_strong() -> None:
    rows = 0.02 * torch.randn(8, 768, dtype=torch.float64)
    squared = share(8, 768, 72, "squared") * penalty_gradient(rows, "squared").norm()
    norm = share(8, 768, 72, "norm") * penalty_gradient(rows, "norm").norm()
    assert float(squared) == pytest.approx(float(norm), rel=0.02)


def joined(rows: torch.Tensor, new: list[int], norm: float) -> Fresh:
    """Say that the rows `new`, neighbours in this order, have joined the others."""
    kept = [i for i in range(len(rows)) if i not in new]
    return Fresh(rows, kept, rows[new[0] : new[-1] + 1], norm)


def test_gram_schmidt_is_exact_and_one_projection_is_not() -> None:
    others = 0.1 * torch.randn(7, 24)
    row = torch.randn(24)
    rows = torch.cat([others, row[None]])
    orthogonal_rows([joined(rows, [7], 1.0)])
    assert float((others @ rows[7]).abs().max()) < 1e-7
    assert float(rows[7].norm()) == pytest.approx(1.0, rel=1e-6)
    left = float((others @ projected_row(row, others)).norm() / (others @ row).norm() * row.norm())
    assert 0.2 < left < 1.0


@pytest.mark.parametrize("related", [False, True])
@pytest.mark.parametrize(("count", "width", "new"), [(1, 5, [0]), (3, 3, [2]), (9, 40, [4, 5, 6]), (16, 1023, [2, 3])])
def test_new_rows_are_the_reference(
    count: int, width: int, new: list[int], related: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randn(count, width)
    if related:  # all close to one direction: little is left of a row, and roundings would be much of it
        rows = rows[:1] + 0.02 * rows
    wanted = reference.orthogonal_rows(rows.double(), new, 0.5)
    other, before = rows.clone(), rows.clone()
    orthogonal_rows([joined(rows, new, 0.5)])
    torch.testing.assert_close(rows.double(), wanted, atol=1e-4 if related else 2e-6, rtol=0)
    kept = [i for i in range(count) if i not in new]
    assert torch.equal(rows[kept], before[kept])
    basis = torch.linalg.qr(rows[kept].double().T).Q.T
    assert float((basis @ rows[new].double().T).abs().max() if kept else 0.0) < 2e-6
    monkeypatch.setattr(fresh, "threads", lambda: 1)
    orthogonal_rows([joined(other, new, 0.5)])
    assert torch.equal(other, rows)


def test_random_rows_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    many = random_rows(200_001, 7)
    assert float(many.min()) >= -1.0
    assert float(many.max()) < 1.0
    assert abs(float(many.mean())) < 0.01
    assert float(many.var()) == pytest.approx(1 / 3, rel=0.01)
    assert abs(float((many[1:] * many[:-1]).mean())) < 0.01
    assert len(many.unique()) > 190_000
    assert not torch.equal(many, random_rows(200_001, 8))
    monkeypatch.setattr(fresh, "threads", lambda: 1)
    assert torch.equal(random_rows(200_001, 7), many)
    assert random_rows(0, 7).numel() == 0


def test_a_new_row_that_is_a_sum_of_others_is_drawn_anew() -> None:
    rows = torch.randn(4, 9)
    rows[3] = rows[0] - 2.0 * rows[1]
    dependent = torch.cat([torch.ones(2, 8), torch.zeros(1, 8), torch.arange(8.0)[None]])
    full = torch.cat([torch.eye(3), torch.ones(1, 3)])
    orthogonal_rows([joined(rows, [3], 1.0), joined(dependent, [3], 2.0), joined(full, [3], 1.0)])
    assert float((rows[:3] @ rows[3]).abs().max()) < 1e-6
    assert float(rows[3].norm()) == pytest.approx(1.0, rel=1e-6)
    assert float(dependent[0] @ dependent[3]) == pytest.approx(0.0, abs=1e-6)
    assert float(dependent[3].norm()) == pytest.approx(2.0, rel=1e-6)
    assert torch.equal(full[3], torch.ones(3))  # no room


def test_new_rows_need_trained_gates() -> None:
    model, _ = chain_and_teacher()
    ard.wrap(model, ard.LoraConfig(r=2))
    with pytest.raises(ValueError, match="init='unit' must meet trained gates"):
        apply(model, ard.RankUpdate({"layers.0": (ard.UnitUpdate((0, 1), 1),)}, init="unit"))


@pytest.mark.parametrize("start", ["gaussian", "orthonormal"])
def test_start_leaves_the_function_alone(start: str) -> None:
    model, _ = chain_and_teacher()
    before = model(batch(0))
    ard.wrap(model, ard.ElaConfig(r=3, start=start))  # type: ignore[arg-type]
    assert torch.equal(model(batch(0)), before)
    layer = next(iter(ard.adapters(model).values()))
    gram = (layer.lora_A[:3] @ layer.lora_A[:3].T).detach()
    if start == "orthonormal":
        torch.testing.assert_close(gram, torch.eye(3), atol=1e-5, rtol=0)
    else:
        assert 0.01 < float(layer.lora_A.detach()[:3].std()) < 0.03


def test_pinned_rate_is_the_peak() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.1)
    for expected in (0.95, 0.45, -0.05):
        weight.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
        assert weight.item() == pytest.approx(expected)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
        pin_lr(optimizer)  # once is enough


def test_rank_1_units_can_grow_only_when_allowed() -> None:
    scores, unit, live = np.array([1.0, 2.0, 3.0, 9.0]), np.array([0, 0, 0, 1]), np.array([3, 1])
    young = np.zeros(4, dtype=bool)
    room = np.array([9, 9])
    stuck = exchange(candidates(scores, unit, live, young, 2), unit, room, 1)
    free = exchange(candidates(scores, unit, live, young, 2, single=True), unit, room, 1)
    assert unit[stuck[1]].tolist() == [0]
    assert unit[free[1]].tolist() == [1]
