"""Rank changes: `RankUpdate` says what, `apply` does it to layers, gradients and optimizer state together.

This is the only place that changes ranks. Rows of lora_A, lora_B, their gradients and every moment move by one plan in
one native call; parameter objects, their groups, schedulers and `step` stay. All that can fail is done before the first
row moves, and no signal comes between that one and the last assignment.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.layers.rows import initial_rows
from ardlora_ext.layers.start.orthogonal import ROW_NORM
from ardlora_ext.layers.start.svd import Fresh, NewRows, orthogonal_rows, start_components
from ardlora_ext.model.record import adapters, check_unmerged
from ardlora_ext.native.dispatch import rank_resize
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.ranks.eight_bit import EightBit, empty_as
from ardlora_ext.ranks.factored import Factored
from ardlora_ext.ranks.optimizer import copies, moments, pin_lr, restart, stored
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
    order: tuple[int, ...] = max((u.keep for u in units), key=lambda keep: len(keep))
    for u, (unit, rank) in enumerate(zip(units, layer.ranks, strict=True)):
        kept = set(unit.keep)
        if len(kept) != len(unit.keep) or not kept.issubset(range(rank)):
            raise ValueError(
                f"rank change: keep of '{name}' unit {u} must be distinct components of {rank}, got {unit.keep}"
            )
        if unit.grow < 0 or unit.rank > layer.max_rank:
            raise ValueError(
                f"rank change: '{name}' unit {u} must stay between rank 0 and {layer.max_rank}, got {unit.rank}"
            )
        if layer.layout.shared and unit.keep != order[: len(unit.keep)]:
            raise ValueError(
                f"rank change: units of '{name}' share components and must keep a common order, got {unit.keep} "
                f"beside {order}"
            )


def _own_plan(ranks: Sequence[int], units: Sequence[UnitUpdate]) -> list[int]:
    """Rows of a factor that has one row per unit and component."""
    plan: list[int] = []
    begin = 0
    for rank, unit in zip(ranks, units, strict=True):
        plan += [begin + k for k in unit.keep] + [ZERO] * unit.grow
        begin += rank
    return plan


def _common_plan(ranks: Sequence[int], units: Sequence[UnitUpdate]) -> list[int]:
    """Rows of a factor that all units share: the common order, then rows still there, then new ones."""
    longest: tuple[int, ...] = max((u.keep for u in units), key=lambda keep: len(keep))
    order = list(longest)
    order += [row for row in range(max(ranks)) if row not in order]
    wanted = max(u.rank for u in units)
    return order[:wanted] + [ZERO] * (wanted - len(order))


def row_plans(layout: UnitLayout, ranks: Sequence[int], units: Sequence[UnitUpdate]) -> tuple[list[int], list[int]]:
    """Return where each new live row of (lora_A, lora_B) comes from; -1 for a new row."""
    own = _own_plan(ranks, units)
    if not layout.shared:
        return own, own
    common = _common_plan(ranks, units)
    return (own, common) if layout.gate_on_a else (common, own)


@dataclass
class _Factor:
    """A factor that moves, with all that has its rows, by key: "" for itself, "grad", "lora_gate", or of its state."""

    parameter: nn.Parameter
    plan: int  # 0: rows of lora_A, 1: rows of lora_B
    old: dict[str, torch.Tensor]
    new: dict[str, torch.Tensor]  # the same tensors where rows move in place
    state: dict[str, Any]  # entries of the optimizer's state that are new; of moments in a form of their own moved, too
    copies: set[str]  # keys of what the optimizer keeps as a copy of the weights: new rows begin as theirs do


@dataclass
class _Change:
    name: str
    layer: LoraLinear
    units: tuple[UnitUpdate, ...]
    plans: tuple[list[int], list[int]]  # of lora_A and lora_B, padded to their capacity; lora_E moves with its factor
    factors: dict[str, _Factor]
    table: torch.Tensor  # `layer.rank_table` of the new ranks
    writes: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # once rows have moved: where, what

    @property
    def ranks(self) -> list[int]:
        return [unit.rank for unit in self.units]


def _prepare(name: str, layer: LoraLinear, units: tuple[UnitUpdate, ...], optimizer: Optimizer | None) -> _Change:
    """Check and allocate everything one module needs; nothing of the model changes."""
    _check(name, layer, units)
    check_unmerged("rank change", name, layer)
    plan_a, plan_b = row_plans(layer.layout, layer.ranks, units)
    live = len(plan_a), len(plan_b)
    caps = layer.capacities(*live)
    plans = plan_a + [ZERO] * (caps[0] - len(plan_a)), plan_b + [ZERO] * (caps[1] - len(plan_b))
    places = {"lora_A": 0, "lora_B": 1, "lora_E": 0 if layer.layout.gate_on_a else 1}
    factors = {}
    for factor, parameter in layer.factors.items():
        place = places[factor]
        old, state = {"": parameter.data}, dict[str, Any]()
        if parameter.grad is not None:
            old["grad"] = parameter.grad
        if layer.lora_gate is not None and parameter is layer.gated:
            old["lora_gate"] = layer.lora_gate  # a new component is closed until its controller opens it
        for key, moment in ({} if optimizer is None else moments(optimizer, parameter)).items():
            if isinstance(moment, EightBit):
                state |= stored(optimizer, parameter, key, moment.gather(plans[place]))
            elif isinstance(moment, Factored):
                state |= stored(optimizer, parameter, key, moment.gather(plans[place], live[place]))
            else:
                old[key] = moment
        for value in old.values():
            if not value.is_contiguous():
                raise ValueError(f"rank change: {factor} of '{name}' must be contiguous, got strides {value.stride()}")
        same = len(parameter) == caps[place]
        kept = {} if optimizer is None else optimizer.state.get(parameter, {})  # a view knows nothing of its memory
        new = old if same else {k: empty_as(kept.get(k, v), (caps[place], *v.shape[1:])) for k, v in old.items()}
        for key in () if same else new.keys() - _OWN:
            state |= stored(optimizer, parameter, key, new[key])
        known = set() if optimizer is None else copies(optimizer, parameter).keys() & old.keys()
        factors[factor] = _Factor(parameter, place, old, new, state, known)
    return _Change(name, layer, units, plans, factors, layer.layout.encode([u.rank for u in units]))


def _moves(changes: Sequence[_Change]) -> list[Callable[[], None]]:
    """Return what moves all rows: one native call per device, the CPU's, which still allocates, first."""
    plans = [plan for change in changes for plan in change.plans]
    moves: dict[torch.device, list[tuple[int, ...]]] = {}
    for first, change in enumerate(changes):
        for factor in change.factors.values():
            rows = len(factor.old[""])
            for key, old in factor.old.items():
                row_bytes = old.nbytes // max(rows, 1)
                move = (old.data_ptr(), factor.new[key].data_ptr(), row_bytes, rows, 2 * first + factor.plan)
                moves.setdefault(old.device, []).append(move)
    devices = sorted(moves, key=lambda device: device.type != "cpu")
    return [rank_resize(np.array(moves[device], dtype=np.int64), plans, device) for device in devices]


def _commit(change: _Change, optimizer: Optimizer | None) -> None:
    """Point parameters, gradients, state and ranks at what was moved; assignments only.

    What moved in place stays untouched: DDP's hooks hang on the gradient accumulator, compiled code on addresses.
    """
    for where, what in change.writes:
        where.copy_(what)
    for factor in change.factors.values():
        parameter = factor.parameter
        if factor.new is not factor.old:
            parameter.grad = None  # set_ resets the gradient accumulator, which must not see the old shape
            parameter.set_(factor.new[""])  # type: ignore[call-overload]
            parameter.grad = factor.new.get("grad")
            if "lora_gate" in factor.new:
                change.layer.lora_gate = factor.new["lora_gate"]
        if optimizer is not None and factor.state:
            optimizer.state[parameter].update(factor.state)
    change.layer.set_ranks(change.ranks, change.table)


def _gathered(change: _Change, name: str) -> torch.Tensor:
    """Return a copy of the live rows that a factor will have, zeros for new ones."""
    factor = change.factors[name]
    plan = change.plans[factor.plan][: change.layer.layout.rows(change.ranks)[factor.plan]]
    kept = [row for row, source in enumerate(plan) if source != ZERO]
    rows = factor.old[""].new_zeros(len(plan), factor.parameter.shape[1])
    rows[kept] = factor.old[""][[plan[row] for row in kept]]
    return rows


def _start(change: _Change, init: NewRows, seed: int) -> tuple[dict[str, torch.Tensor], list[Fresh]]:
    """Return the live rows of the factors that get new ones, and which of these are to be made orthogonal.

    With `init="zero"` lora_B's new rows stay zero, so the function does not change. Where an existing row of a shared
    lora_B meets a new row of lora_A, that one stays zero instead and lora_B carries the gradient.
    """
    layout, ranks = change.layer.layout, change.ranks
    if not any(unit.grow for unit in change.units):
        return {}, []
    if init != "zero":
        rows = {name: _gathered(change, name) for name in change.factors}
        return rows, start_components(rows, ranks, [len(u.keep) for u in change.units], init, seed)
    live = layout.rows(ranks)[0]
    plan_a, plan_b = change.plans[0][:live], change.plans[1]
    fresh = [row for row, source in enumerate(plan_a) if source == ZERO]
    if layout.gate_on_a:
        begins = np.cumsum([0, *ranks])
        component = {int(b) + j: j for b, rank in zip(begins, ranks, strict=False) for j in range(rank)}
        fresh = [row for row in fresh if plan_b[component[row]] == ZERO]
    if not fresh:
        return {}, []
    a = _gathered(change, "lora_A")
    a[fresh] = initial_rows(len(fresh), layout.a_width, torch.Generator().manual_seed(seed)).to(a)
    room = len(fresh) < live and live <= layout.a_width
    return {"lora_A": a}, [Fresh(a, fresh, ROW_NORM)] if room else []


def _plan_writes(
    change: _Change, started: Mapping[str, torch.Tensor], given: Rows, optimizer: Optimizer | None
) -> None:
    """Note what is written once rows have moved: the new rows, and what the caller gives."""
    for name, rows in started.items():
        factor = change.factors[name]
        plan = change.plans[factor.plan][: len(rows)]
        begin = 0
        for new, run in groupby(source == ZERO for source in plan):
            place = slice(begin, begin + len(list(run)))
            for key in ("", *factor.copies) if new else ():
                change.writes.append((factor.new[key][place], rows[place].to(factor.new[key])))
            begin = place.stop
    for (name, key), value in given.items():
        factor = change.factors[name]
        if isinstance(value, (EightBit, Factored)):
            factor.state |= stored(optimizer, factor.parameter, key, value)
        else:
            target = factor.new[key][: len(value)]
            change.writes.append((target, value.to(target)))


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
    changes: list[_Change] = []
    fresh: list[Fresh] = []
    started: list[dict[str, torch.Tensor]] = []
    for name, units in update.modules.items():
        if name not in layers:
            raise ValueError(f"rank change: module must be an adapter of the model, got '{name}'")
        if update.init != "zero" and (layers[name].lora_E is None or layers[name].layout.shared):
            raise ValueError(
                f"rank change: init='{update.init}' must meet trained gates and units with their own rows, got '{name}'"
            )
        changes.append(_prepare(name, layers[name], tuple(units), optimizer))
        values, unfinished = _start(changes[-1], update.init, zlib.crc32(f"{update.seed}/{name}".encode()))
        started.append(values)
        fresh += unfinished
    orthogonal_rows(fresh)
    for change, values in zip(changes, started, strict=True):
        _plan_writes(change, values, {} if rows is None else rows[change.name], optimizer)
    moves = _moves(changes)
    with unbroken():
        first()
        for move in moves:
            move()
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
