"""Rank changes: `RankUpdate` says what, `apply` does it to layers, gradients and optimizer state together.

This is the only place that changes ranks. Rows of lora_A, lora_B, their gradients and every moment move by one plan in
one native call; parameter objects, their groups, schedulers and `step` stay. All that can fail is done before the first
row moves, and no signal comes between that one and the last assignment.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.layers.start.fresh import (
    Fresh,
    from_host,
    gathered,
    on_host,
    orthogonal_rows,
    random_rows,
    rows_to_start,
    runs,
)
from ardlora_ext.layers.start.orthogonal import ROW_NORM
from ardlora_ext.layers.start.svd import NewRows, start_components
from ardlora_ext.model.record import adapters
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.ranks.eight_bit import EightBit
from ardlora_ext.ranks.optimizer import Coded, Factored, copied, copies, pin_lr, restart, store_coded, stored
from ardlora_ext.ranks.row_moves import Change, Factor, Moves, Plan, Way, calls, commit, prepare
from ardlora_ext.unbroken import nothing, unbroken

# By (factor, "" | "grad" | "lora_gate" | state key), its first rows, or a whole moment in a form of its own.
Rows = Mapping[tuple[str, str], torch.Tensor | EightBit | Factored]
ZERO = -1  # plan entry of a new row


@dataclass(frozen=True)
class UnitUpdate:
    """One unit's change: components `keep` in their new order, then `grow` new ones.

    Units that share a factor share the order of its components: the shorter lists are prefixes of the longest.
    """

    keep: tuple[int, ...]
    grow: int = 0

    @property
    def rank(self) -> int:
        """Rank after the change."""
        return len(self.keep) + self.grow


@dataclass(frozen=True)
class RankUpdate:
    """A decision about ranks, before it is applied. JSON both ways.

    Attributes:
        modules: per module, one `UnitUpdate` per unit.
        seed: of the values of new components.
        init: how new components start, see `ardlora_ext.layers.start.svd`.
        optimizer: `follow`: moments move with their rows. What ElaLoRA's code does: `restarted`, all state is
            forgotten and the learning rate stays at its peak from then on; `pinned`, only the latter.
        leave: how components go: they are dropped, or the update is recompressed to the new ranks (`svd_prune`).
    """

    modules: Mapping[str, tuple[UnitUpdate, ...]]
    seed: int = 0
    init: NewRows = "zero"
    optimizer: Literal["follow", "pinned", "restarted"] = "follow"
    leave: Literal["drop", "recompress"] = "drop"

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts and lists."""
        modules = {n: [{"keep": list(u.keep), "grow": u.grow} for u in units] for n, units in self.modules.items()}
        how = {"seed": self.seed, "init": self.init, "optimizer": self.optimizer, "leave": self.leave}
        return {**how, "modules": modules}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RankUpdate:
        """Rebuild what `to_json` made."""
        modules = {
            n: tuple(UnitUpdate(tuple(u["keep"]), u["grow"]) for u in units) for n, units in values["modules"].items()
        }
        return cls(modules, values["seed"], values["init"], values["optimizer"], values.get("leave", "drop"))


def _check(name: str, layer: LoraLinear, units: Sequence[UnitUpdate]) -> None:
    if len(units) != layer.layout.units:
        raise ValueError(f"rank change: '{name}' must have {layer.layout.units} unit updates, got {len(units)}")
    order = max((u.keep for u in units), key=len)
    for u, (unit, rank) in enumerate(zip(units, layer.ranks, strict=True)):
        kept = set(unit.keep)
        if len(kept) != len(unit.keep) or not kept.issubset(range(rank)):
            raise ValueError(
                f"rank change: keep of '{name}' unit {u} must be distinct components of {rank}, got {unit.keep}"
            )
        if unit.grow < 0 or len(kept) + unit.grow > layer.max_rank:
            raise ValueError(
                f"rank change: '{name}' unit {u} must stay between rank 0 and {layer.max_rank}, got {unit.rank}"
            )
        if layer.layout.shared and unit.keep != order[: len(unit.keep)]:
            raise ValueError(
                f"rank change: units of '{name}' share components and must keep a common order, got {unit.keep} "
                f"beside {order}"
            )


def _common_plan(ranks: Sequence[int], units: Sequence[UnitUpdate]) -> list[int]:
    """Rows of a factor that all units share: the common order, then rows still there, then new ones."""
    longest: tuple[int, ...] = max((u.keep for u in units), key=len)
    order = list(longest)
    order += [row for row in range(max(ranks)) if row not in order]
    wanted = max(u.rank for u in units)
    return order[:wanted] + [ZERO] * (wanted - len(order))


def row_plans(layout: UnitLayout, ranks: Sequence[int], units: Sequence[UnitUpdate]) -> tuple[list[int], list[int]]:
    """Return where each new live row of (lora_A, lora_B) comes from; -1 for a new row."""
    own, begin = list[int](), 0
    for rank, unit in zip(ranks, units, strict=True):
        own += [begin + k for k in unit.keep] + [ZERO] * unit.grow
        begin += rank
    if not layout.shared:
        return own, own
    common = _common_plan(ranks, units)
    return (own, common) if layout.gate_on_a else (common, own)


def _way(
    name: str, layer: LoraLinear, units: tuple[UnitUpdate, ...], known: dict[Hashable, Way], plans: list[list[int]]
) -> Way:
    """Return what the change means for this layer, checked; a new way adds its plans to those of the native call."""
    key = layer.layout, tuple(layer.ranks), units, layer.max_rank, layer.capacity
    found = known.get(key)
    if found is None:
        _check(name, layer, units)
        plan_a, plan_b = row_plans(layer.layout, layer.ranks, units)
        caps = layer.capacities(len(plan_a), len(plan_b))
        plans.append(plan_a + [ZERO] * (caps[0] - len(plan_a)))
        of_a = of_b = Plan(plans[-1], len(plan_a), len(plans) - 1)
        if plan_b is not plan_a:
            plans.append(plan_b + [ZERO] * (caps[1] - len(plan_b)))
            of_b = Plan(plans[-1], len(plan_b), len(plans) - 1)
        kept, ranks = [len(unit.keep) for unit in units], [unit.rank for unit in units]
        table = None if ranks == layer.ranks else layer.layout.encode(ranks)
        of_gate = 0 if layer.layout.gate_on_a else 1
        found = known[key] = Way(ranks, kept, (of_a, of_b), of_gate, table, len(known))
    return found


Started = list[tuple[Factor, int, torch.Tensor]]  # rows that are new, float32 on the host, and the first one's number


def _started(changes: Sequence[Change], update: RankUpdate) -> Started:
    """Return the new rows of all factors that are not zero, as `update.init` says."""
    growing = [change for change in changes if change.way.grows]
    found, fresh = (_rows_of_A if update.init == "zero" else _components)(growing, update)
    orthogonal_rows(fresh)
    return found


def _rows_of_A(growing: Sequence[Change], update: RankUpdate) -> tuple[Started, list[Fresh]]:  # noqa: N802
    """Draw the rows of lora_A that `rows_to_start` names."""
    found, fresh = Started(), list[Fresh]()
    known: dict[int, tuple[list[int], list[int]]] = {}  # of a way: the rows to start, and what the others were
    for _, layer, way, _ in growing:
        if way.number not in known:
            plan_a, plan_b = way.plans
            new = rows_to_start(layer.layout, way.ranks, plan_a.rows, plan_b.rows)
            known[way.number] = new, [source for source in plan_a.rows[: plan_a.live] if source != ZERO]
    growing = [change for change in growing if known[change.way.number][0]]
    olds = on_host([change.factors["lora_A"].parameter for change in growing])
    sizes = [len(known[change.way.number][0]) * old.shape[1] for change, old in zip(growing, olds, strict=True)]
    drawn = torch.split(random_rows(sum(sizes), update.seed), sizes)
    for change, old, values in zip(growing, olds, drawn, strict=True):
        factor, width, (new, kept) = change.factors["lora_A"], old.shape[1], known[change.way.number]
        rows, live = values.view(len(new), width), factor.plan.live
        if len(new) < live <= width:
            fresh.append(Fresh(old, kept, rows, ROW_NORM))
        else:
            rows.div_(math.sqrt(width))
        found += [(factor, new[i], rows if end - i == len(new) else rows[i:end]) for i, end in runs(new)]
    return found, fresh


def _components(growing: Sequence[Change], update: RankUpdate) -> tuple[Started, list[Fresh]]:
    """Start new components of the P Lambda Q form, rows of all three factors."""
    found, fresh = Started(), list[Fresh]()
    olds = iter(on_host([factor.parameter for change in growing for factor in change.factors.values()]))
    for change in growing:
        way, rows, new = change.way, dict[str, torch.Tensor](), dict[str, list[int]]()
        for name, factor in change.factors.items():
            plan = factor.plan.rows[: factor.plan.live]
            rows[name] = gathered(next(olds), plan)
            new[name] = [row for row, source in enumerate(plan) if source == ZERO]
        own = zlib.crc32(f"{update.seed}/{change.name}".encode())
        fresh += start_components(rows, way.ranks, way.kept, update.init, own)
        for name, factor in change.factors.items():
            places = new[name]
            found += [(factor, places[i], rows[name][places[i] :][: end - i]) for i, end in runs(places)]
    return found, fresh


def _writes(
    started: Started, changes: Sequence[Change], given: Mapping[str, Rows], optimizer: Optimizer | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what is written once rows have moved, where and what: the new rows, and what the caller gives."""
    where, what = list[torch.Tensor](), list[torch.Tensor]()
    there = from_host([rows for _, _, rows in started], [factor.parameter for factor, _, _ in started])
    copying = optimizer is not None and copied(optimizer)
    for (factor, begin, _), rows in zip(started, there, strict=True):
        end = begin + rows.shape[0]
        where.append(factor.new[""].data[begin:end])
        what.append(rows)
        for key in copies(optimizer, factor.parameter) if optimizer is not None and copying else ():
            where.append(factor.new[key][begin:end])
            what.append(rows.to(where[-1]))
    for change in changes if given else ():
        for (name, key), value in given[change.name].items():
            factor = change.factors[name]
            if isinstance(value, (EightBit, Factored)):
                assert optimizer is not None
                factor.state.update(stored(optimizer.state[factor.parameter], key, value))
            else:
                where.append(factor.new[key].data[: len(value)])
                what.append(value.to(where[-1]))
    return where, what


@torch.no_grad()
def apply(
    model: nn.Module,
    update: RankUpdate,
    optimizer: Optimizer | None = None,
    rows: Mapping[str, Rows] | None = None,
    *,
    first: Callable[[], None] = nothing,
    then: Callable[[], None] = nothing,
) -> None:
    """Change ranks as `update` says, in the model and in the optimizer.

    Kept rows and their moments are bitwise unchanged (8-bit moments whose rows are not whole blocks are encoded again),
    new rows' moments are zero (`Factored` ones: the mean), `step` stays. Call it between steps, when no graph is alive.
    The function of the model changes only by the components that are dropped.

    Args:
        model: a wrapped model.
        update: the decision.
        optimizer: the optimizer of the adapters, or None before there is one.
        rows: by module of the update, first rows that get other values once all have moved.
        first: called just before rows move, when nothing can fail any more.
        then: called after the last assignment, in the same piece.

    Raises:
        ValueError: the update does not fit the model, or the optimizer's state cannot follow.
        Whatever is raised, nothing has changed then; after Ctrl-C all or nothing has.
    """
    layers = adapters(model)
    ways: dict[Hashable, Way] = {}
    plans, changes, coded, moves = list[list[int]](), list[Change](), Coded(), Moves()
    for name, units in update.modules.items():
        layer = layers.get(name)
        if layer is None:
            raise ValueError(f"rank change: module must be an adapter of the model, got '{name}'")
        if update.init != "zero" and (layer.lora_E is None or layer.layout.shared):
            raise ValueError(
                f"rank change: init='{update.init}' must meet trained gates and units with their own rows, got '{name}'"
            )
        way = _way(name, layer, tuple(units), ways, plans)
        changes.append(prepare(name, layer, way, optimizer, coded, moves))
    store_coded(optimizer, coded)
    where, what = _writes(_started(changes, update), changes, rows or {}, optimizer)
    ready = calls(moves, plans)
    with unbroken():
        first()
        for call in ready:
            call()
        if where:
            torch._foreach_copy_(where, what)
        commit(changes, optimizer)
        if optimizer is not None and update.optimizer != "follow":
            pin_lr(optimizer)
        if optimizer is not None and update.optimizer == "restarted":
            restart(optimizer)
        then()


def apply_to_copy(model: nn.Module, copy: nn.Module, update: RankUpdate) -> None:
    """Change the ranks of an average of the model, which has changed; its new rows begin as the model's.

    Raises:
        ValueError: the update does not fit; nothing of the copy has changed then.
    """
    ours, theirs = adapters(model), adapters(copy)
    new = {n: row_plans(theirs[n].layout, theirs[n].ranks, units) for n, units in update.modules.items()}
    apply(copy, update)
    with torch.no_grad():
        for name, (of_a, of_b) in new.items():
            layer = theirs[name]
            for factor, average in layer.factors.items():
                plan = of_a if factor == "lora_A" or (factor == "lora_E" and layer.layout.gate_on_a) else of_b
                fresh = [row for row, source in enumerate(plan) if source == ZERO]
                average.data[fresh] = ours[name].factors[factor].data[fresh].to(average)
