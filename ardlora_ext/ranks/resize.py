"""Rank changes: `RankUpdate` says what, `apply` does it to layers, gradients and optimizer state together.

This is the only place that changes ranks. Rows of lora_A, lora_B, their gradients and every moment move by one plan in
one native call; parameter objects, their groups, schedulers and `step` stay. All that can fail is done before the first
row moves, and no signal comes between that one and the last assignment.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
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
from ardlora_ext.model.record import adapters, check_unmerged
from ardlora_ext.native.dispatch import rank_resize
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.ranks.eight_bit import EightBit, empty_as
from ardlora_ext.ranks.factored import Factored
from ardlora_ext.ranks.optimizer import Coded, State, copies, moments, pin_lr, restart, store_coded, stored
from ardlora_ext.unbroken import nothing, unbroken

# By (factor, "" | "grad" | "lora_gate" | state key), its first rows, or a whole moment in a form of its own.
Rows = Mapping[tuple[str, str], torch.Tensor | EightBit | Factored]
ZERO = -1  # plan entry of a new row
_OWN = {"", "grad", "lora_gate"}  # of what has the rows of a factor: not the optimizer's


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


class _Way(NamedTuple):
    """What a change of units means for a matrix of their layout and ranks; matrices that agree share it."""

    units: tuple[UnitUpdate, ...]
    ranks: list[int]
    live: tuple[int, int]  # rows of lora_A and lora_B
    plans: tuple[list[int], list[int]]  # of both, padded to their capacity; lora_E moves with its factor
    table: torch.Tensor | None  # `layer.rank_table` of the new ranks, where they are others
    number: int  # of the first of its plans, in the native call


def _way(name: str, layer: LoraLinear, units: tuple[UnitUpdate, ...], known: dict[Hashable, _Way]) -> _Way:
    key = layer.layout, tuple(layer.ranks), units, layer.max_rank, layer.capacity
    found = known.get(key)
    if found is None:
        _check(name, layer, units)
        plan_a, plan_b = row_plans(layer.layout, layer.ranks, units)
        live = len(plan_a), len(plan_b)
        caps = layer.capacities(*live)
        plans = plan_a + [ZERO] * (caps[0] - live[0]), plan_b + [ZERO] * (caps[1] - live[1])
        ranks = [len(unit.keep) + unit.grow for unit in units]
        table = None if ranks == layer.ranks else layer.layout.encode(ranks)
        found = known[key] = _Way(units, ranks, live, plans, table, 2 * len(known))
    return found


class _Factor(NamedTuple):
    """A factor that moves, with all that has its rows, by key: "" for itself, "grad", "lora_gate", or of its state."""

    parameter: nn.Parameter
    plan: int  # 0: rows of lora_A, 1: rows of lora_B
    old: dict[str, torch.Tensor]
    new: dict[str, torch.Tensor]  # the same tensors where rows move in place
    state: dict[str, Any]  # entries of the optimizer's state that are new; of moments in a form of their own moved, too


class _Change(NamedTuple):
    name: str
    layer: LoraLinear
    way: _Way
    factors: dict[str, _Factor]


def _prepare(name: str, layer: LoraLinear, way: _Way, optimizer: Optimizer | None, coded: Coded) -> _Change:
    """Check and allocate everything one module needs but what is added to `coded`; nothing of the model changes."""
    check_unmerged("rank change", name, layer)
    gate_on_a, factors = layer.layout.gate_on_a, {}
    gates = layer._buffers["lora_gate"]
    for factor, parameter in layer.factors.items():
        on_a = factor == "lora_A" or (gate_on_a and factor == "lora_E")
        plan, live = (way.plans[0], way.live[0]) if on_a else (way.plans[1], way.live[1])
        rows, state = len(plan), dict[str, Any]()
        old = {"": parameter.data}
        if parameter.grad is not None:
            old["grad"] = parameter.grad
        if gates is not None and on_a == gate_on_a:
            old["lora_gate"] = gates  # a new component is closed until its controller opens it
        kept: State = {} if optimizer is None else optimizer.state.get(parameter, {})  # its hash takes a microsecond
        for key, moment in moments(optimizer, parameter, kept).items() if optimizer is not None and kept else ():
            if isinstance(moment, torch.Tensor):
                old[key] = moment
            elif isinstance(moment, EightBit):
                coded.append((state, parameter, key, moment, plan))
            else:
                state |= stored(kept, key, moment.gather(plan, live))
        new = old
        for key, value in old.items():
            if key in _OWN and not value.is_contiguous():  # moments are
                raise ValueError(f"rank change: {factor} of '{name}' must be contiguous, got strides {value.stride()}")
        if parameter.shape[0] != rows:
            new = {}
            for key, value in old.items():
                if key in _OWN:
                    new[key] = value.new_empty((rows, *value.shape[1:]))
                else:
                    new[key] = moved = empty_as(kept[key], (rows, *value.shape[1:]))  # a view knows no pages
                    state |= stored(kept, key, moved)
        factors[factor] = _Factor(parameter, 0 if on_a else 1, old, new, state)
    return _Change(name, layer, way, factors)


def _moves(changes: Sequence[_Change], ways: Iterable[_Way]) -> list[Callable[[], None]]:
    """Return what moves all rows: one native call per device, the CPU's, which still allocates, first."""
    plans = [plan for way in ways for plan in way.plans]
    moves: dict[torch.device, list[tuple[int, ...]]] = {}
    for change in changes:
        first = change.way.number
        for parameter, plan, olds, news, _ in change.factors.values():
            rows, on_cpu, here = parameter.shape[0], parameter.is_cpu, moves.setdefault(parameter.device, [])
            for key, old in olds.items():
                there = here if old.is_cpu == on_cpu else moves.setdefault(old.device, [])  # a paged moment
                address, row_bytes = old.data_ptr(), old.stride(0) * old.itemsize
                there.append(
                    (address, address if news is olds else news[key].data_ptr(), row_bytes, rows, first + plan)
                )
    devices = sorted(moves, key=lambda device: device.type != "cpu")
    return [rank_resize(np.array(moves[device], dtype=np.int64), plans, device) for device in devices]


def _commit(change: _Change, optimizer: Optimizer | None) -> None:
    """Point parameters, gradients, state and ranks at what was moved; assignments only.

    What moved in place stays untouched: DDP's hooks hang on the gradient accumulator, compiled code on addresses.
    """
    for parameter, _, old, new, state in change.factors.values():
        if new is not old:
            parameter.grad = None  # set_ resets the gradient accumulator, which must not see the old shape
            parameter.set_(new[""])  # type: ignore[call-overload]
            parameter.grad = new.get("grad")
            if "lora_gate" in new:
                change.layer.lora_gate = new["lora_gate"]
        if optimizer is not None and state:
            optimizer.state[parameter].update(state)
    change.layer.set_ranks(change.way.ranks, change.way.table)


Started = list[tuple[_Factor, int, torch.Tensor]]  # rows that are new, float32 on the host, and the first one's number


def _started(changes: Sequence[_Change], update: RankUpdate) -> Started:
    """Return the new rows of all factors that are not zero, as `update.init` says."""
    growing = [change for change in changes if any(unit.grow for unit in change.way.units)]
    found, fresh = (_rows_of_A if update.init == "zero" else _components)(growing, update)
    orthogonal_rows(fresh)
    return found


def _rows_of_A(growing: Sequence[_Change], update: RankUpdate) -> tuple[Started, list[Fresh]]:  # noqa: N802
    """Draw the rows of lora_A that `rows_to_start` names."""
    found, fresh = Started(), list[Fresh]()
    known = {c.way.number: rows_to_start(c.layer.layout, c.way.ranks, *c.way.plans) for c in growing}
    growing = [change for change in growing if known[change.way.number]]
    olds = on_host([change.factors["lora_A"].old[""] for change in growing])
    sizes = [len(known[change.way.number]) * old.shape[1] for change, old in zip(growing, olds, strict=True)]
    drawn = torch.split(random_rows(sum(sizes), update.seed), sizes)
    for change, old, values in zip(growing, olds, drawn, strict=True):
        new, plan, width = known[change.way.number], change.way.plans[0][: change.way.live[0]], old.shape[1]
        rows = values.view(len(new), width)
        if len(new) < len(plan) <= width:
            fresh.append(Fresh(old, [source for source in plan if source != ZERO], rows, ROW_NORM))
        else:
            rows.div_(math.sqrt(width))
        found += [(change.factors["lora_A"], new[i], rows[i:end]) for i, end in runs(new)]
    return found, fresh


def _components(growing: Sequence[_Change], update: RankUpdate) -> tuple[Started, list[Fresh]]:
    """Start new components of the P Lambda Q form, rows of all three factors."""
    found, fresh = Started(), list[Fresh]()
    olds = iter(on_host([factor.old[""] for change in growing for factor in change.factors.values()]))
    for change in growing:
        way, rows, new = change.way, dict[str, torch.Tensor](), dict[str, list[int]]()
        for name, factor in change.factors.items():
            plan = way.plans[factor.plan][: way.live[factor.plan]]
            rows[name] = gathered(next(olds), plan)
            new[name] = [row for row, source in enumerate(plan) if source == ZERO]
        own, kept = zlib.crc32(f"{update.seed}/{change.name}".encode()), [len(unit.keep) for unit in way.units]
        fresh += start_components(rows, way.ranks, kept, update.init, own)
        for name, factor in change.factors.items():
            places = new[name]
            found += [(factor, places[i], rows[name][places[i] :][: end - i]) for i, end in runs(places)]
    return found, fresh


def _writes(
    started: Started, changes: Sequence[_Change], given: Mapping[str, Rows], optimizer: Optimizer | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what is written once rows have moved, where and what: the new rows, and what the caller gives."""
    where, what = list[torch.Tensor](), list[torch.Tensor]()
    there = from_host([rows for _, _, rows in started], [factor.old[""] for factor, _, _ in started])
    for (factor, begin, _), rows in zip(started, there, strict=True):
        known = () if optimizer is None else copies(optimizer, factor.parameter)
        for key in ("", *known):
            where.append(factor.new[key][begin : begin + rows.shape[0]])
            what.append(rows.to(where[-1]))
    for change in changes if given else ():
        for (name, key), value in given[change.name].items():
            factor = change.factors[name]
            if isinstance(value, (EightBit, Factored)):
                assert optimizer is not None
                factor.state.update(stored(optimizer.state[factor.parameter], key, value))
            else:
                where.append(factor.new[key][: len(value)])
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
    new rows' moments are zero (`factored` ones: the mean), `step` stays. Call it between steps, when no graph is alive.
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
    ways: dict[Hashable, _Way] = {}
    changes, coded = list[_Change](), Coded()
    for name, units in update.modules.items():
        layer = layers.get(name)
        if layer is None:
            raise ValueError(f"rank change: module must be an adapter of the model, got '{name}'")
        if update.init != "zero" and (layer.lora_E is None or layer.layout.shared):
            raise ValueError(
                f"rank change: init='{update.init}' must meet trained gates and units with their own rows, got '{name}'"
            )
        changes.append(_prepare(name, layer, _way(name, layer, tuple(units), ways), optimizer, coded))
    store_coded(optimizer, coded)
    where, what = _writes(_started(changes, update), changes, rows or {}, optimizer)
    moves = _moves(changes, ways.values())
    with unbroken():
        first()
        for move in moves:
            move()
        if where:
            torch._foreach_copy_(where, what)
        for change in changes:
            _commit(change, optimizer)
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
