"""Budgets are spent to the last parameter, or on what is worth most: against all allocations, one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ardlora_ext.ranks.controllers.costs import Costs, Floats, Ints
from ardlora_ext.ranks.controllers.knapsack import Menu, SharedMenu, choose, spend, whole_ranks


def lists(of: st.SearchStrategy[Any], size: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(of, min_size=size, max_size=size)


@st.composite
def menus(draw: st.DrawFn) -> list[Menu]:
    found = []
    unit = draw(st.sampled_from([1, 1, 6]))
    for _ in range(draw(st.integers(1, 4))):
        cost = sorted(draw(st.sets(st.integers(0, 300), min_size=1, max_size=5)))
        worth = draw(lists(st.floats(-100, 100), len(cost)))
        found.append(Menu(unit * np.array(cost), np.array(worth)))
    return found


@settings(max_examples=300, deadline=None)
@given(menus(), st.floats(0, 1))
def test_nothing_spends_more_within_the_budget(found: list[Menu], share: float) -> None:
    least, most = (sum(int(m.cost[i]) for m in found) for i in (0, -1))
    budget = least + int(share * (most - least))
    entries, _ = spend(found, budget)
    every = itertools.product(*(m.cost.tolist() for m in found))
    assert sum(int(m.cost[i]) for m, i in zip(found, entries, strict=True)) == max(
        total for total in map(sum, every) if total <= budget
    )
    if least > 0:
        with pytest.raises(ValueError, match="spend: budget must be at least"):
            spend(found, least - 1)


@settings(max_examples=300, deadline=None)
@given(menus(), st.floats(0, 1))
def test_nothing_within_the_budget_is_worth_more(found: list[Menu], share: float) -> None:
    found = [Menu(m.cost, np.sort(m.worth)) for m in found]  # another component takes nothing away
    least, most = (sum(int(m.cost[i]) for m in found) for i in (0, -1))
    budget = least + int(share * (most - least))
    entries, _ = choose(found, budget)

    def total(taken: Sequence[int]) -> tuple[float, float]:
        return tuple(sum(float(of[i]) for of, i in zip(every, taken, strict=True)) for every in (costs, worths))

    costs, worths = [m.cost for m in found], [m.worth for m in found]
    every = map(total, itertools.product(*(range(len(m.cost)) for m in found)))
    cost, worth = total(entries)
    assert cost <= budget
    assert worth == pytest.approx(max(value for spent, value in every if spent <= budget), abs=1e-9)


def test_one_rank_for_all_is_left_where_it_is_worth_most() -> None:
    """Spending the last parameter instead would take two components of the widest units and none of the others."""
    menus = [Menu(np.array([0, 3, 6, 9]), np.array([0.0, 3.0, 4.0, 4.5])) for _ in range(3)]
    menus += [Menu(np.array([0, 4, 8, 12]), np.array([0.0, 4.0, 5.5, 6.0])) for _ in range(2)]
    assert choose(menus, 19)[0] == [1, 1, 1, 1, 1]
    assert sum(int(m.cost[i]) for m, i in zip(menus, spend(menus, 19)[0], strict=True)) == 19


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_shared_menu_lists_the_best_ranks_of_every_cost(data: st.DataObject) -> None:
    units, levels = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    own, common = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 9))
    worth = np.array(data.draw(lists(lists(st.one_of(st.just(-math.inf), st.floats(-9, 9)), levels), units)))
    worth[:, 0] = np.where(np.isfinite(worth).any(axis=1), worth[:, 0], 0.0)
    best: dict[int, float] = {}
    for ranks in itertools.product(range(levels), repeat=units):
        value = float(sum(worth[u, r] for u, r in enumerate(ranks)))
        cost = own * sum(ranks) + common * max(ranks)
        if math.isfinite(value):
            best[cost] = max(value, best.get(cost, -math.inf))
    menu = SharedMenu.of(worth, own, common)
    assert menu.cost.tolist() == sorted(best)
    np.testing.assert_allclose(menu.worth, [best[c] for c in menu.cost.tolist()], atol=1e-9)
    for entry, cost in enumerate(menu.cost.tolist()):
        found = menu.ranks(entry)
        assert own * found.sum() + common * found.max() == cost
        assert sum(worth[u, r] for u, r in enumerate(found)) == pytest.approx(menu.worth[entry], abs=1e-9)


@st.composite
def allocations(draw: st.DrawFn, most: int = 4) -> dict[str, Any]:
    """Arguments of `whole_ranks`: modules whose units share a factor, and groups of matrices that have one rank."""
    modules = draw(
        st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=3)
    )
    own, common, module_of, group = [], [], [], []
    tied = draw(st.booleans())
    for m, (heads, price, shared) in enumerate(modules):
        heads, shared = (1, 0) if tied else (heads, shared)
        common.append(float(shared))
        for _ in range(heads):
            own.append(float(price))
            module_of.append(m)
            group.append(draw(st.integers(0, group[-1] + 1)) if tied and group else len(group))
    group = np.unique(group, return_inverse=True)[1]
    costs = Costs(np.array(own), np.array(common), np.array(module_of))
    soft = np.array(draw(lists(st.floats(1, most + 1), int(group.max()) + 1)))
    limit = np.array(draw(lists(st.integers(1, most), len(own))))
    floor, full = (costs.parameters(r) for r in (np.ones(len(own)), limit))
    return {
        "soft": soft,
        "limit": limit,
        "group": group,
        "costs": costs,
        "budget": floor + draw(st.floats(0, 1)) * (full - floor),
    }


def all_ranks(case: dict[str, Any]) -> list[Ints]:
    tops = [int(case["limit"][case["group"] == g].max()) for g in range(len(case["soft"]))]
    choices = itertools.product(*(range(1, top + 1) for top in tops))
    return [np.minimum(np.array(ranks)[case["group"]], case["limit"]) for ranks in choices]


@settings(max_examples=150, deadline=None)
@given(allocations())
def test_whole_ranks_are_the_nearest_of_those_that_spend_the_most(case: dict[str, Any]) -> None:
    def distance(ranks: Ints) -> Floats:
        groups = np.zeros(len(case["soft"]))
        np.maximum.at(groups, case["group"], ranks)
        out: Floats = ((groups - case["soft"]) ** 2).sum()
        return out

    ranks, parameters = whole_ranks(**case), case["costs"].parameters
    allowed = [other for other in all_ranks(case) if parameters(other) <= case["budget"]]
    assert parameters(ranks) == max(map(parameters, allowed))
    assert distance(ranks) == pytest.approx(
        min(distance(other) for other in allowed if parameters(other) == parameters(ranks)), abs=1e-9
    )
    assert (whole_ranks(**case) == ranks).all()


@settings(max_examples=100, deadline=None)
@given(allocations(most=9))
def test_whole_ranks_without_a_budget_are_the_papers(case: dict[str, Any]) -> None:
    ranks = whole_ranks(**{**case, "budget": None})
    for rank, g, limit in zip(ranks, case["group"], case["limit"], strict=True):
        assert rank == min(limit, max(1, math.floor(case["soft"][g] + 0.5)))


@pytest.mark.parametrize("left", [0, 128, 4096, 18432 - 128])
def test_a_large_model_is_spent_to_the_last_common_divisor(left: int) -> None:
    """The widths of a 8-billion LLaMA, 32 layers, a rank per head of q and k: every cost is a multiple of 128."""
    rng = np.random.default_rng(0)
    heads, own, common = zip(*[(32, 128, 4096), (8, 128, 4096), (1, 18432, 0), (1, 18432, 0)] * 8, strict=True)
    costs = Costs(np.repeat(own, heads).astype(float), np.array(common, dtype=float), np.repeat(np.arange(32), heads))
    soft, limit = rng.uniform(1, 12, sum(heads)), np.full(sum(heads), 16)
    budget = costs.parameters(soft.round()) + left
    ranks = whole_ranks(soft, limit, np.arange(sum(heads)), costs, budget)
    assert costs.parameters(ranks) == budget // 128 * 128
    assert np.abs(ranks - soft).max() < 2.0
