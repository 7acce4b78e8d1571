"""What moves with the rows of factors: gradients, gates and moments are found, memory is made, moved and put in place.

A decision asks every matrix of a model for it, so this is written for time: a microsecond here is one a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.record import check_unmerged
from ardlora_ext.native.dispatch import rank_resize
from ardlora_ext.ranks.eight_bit import EightBit, empty_as
from ardlora_ext.ranks.optimizer import Coded, State, moments, stored

_OWN = {"", "grad", "lora_gate"}  # of what has the rows of a factor: not the optimizer's


class Plan(NamedTuple):
    """Where the rows of a factor come from."""

    rows: list[int]  # for each row of its capacity, -1 for a new one
    live: int
    number: int  # in the native call


class Way(NamedTuple):
    """What a change of units means for a matrix of their layout and ranks; matrices that agree share it."""

    ranks: list[int]
    kept: list[int]  # components of each unit that stay
    plans: tuple[Plan, Plan]  # of lora_A and lora_B
    of_gate: int  # which of them gates and lora_E move by
    table: torch.Tensor | None  # `layer.rank_table` of the new ranks, where they are others
    number: int  # of its kind

    @property
    def grows(self) -> bool:
        """Whether a unit gets new components."""
        return self.kept != self.ranks


class Factor(NamedTuple):
    """A factor that moves."""

    parameter: nn.Parameter
    plan: Plan
    new: dict[str, torch.Tensor]  # what has its rows, by key: "" for itself, "grad", "lora_gate", or of its state
    state: dict[str, Any]  # entries of the optimizer's state that are new; of moments in a form of their own moved, too
    in_place: bool


class Change(NamedTuple):
    """A matrix whose rows move."""

    name: str
    layer: LoraLinear
    way: Way
    factors: dict[str, Factor]


Moves = dict[torch.device, list[int]]  # of a device, one after the other as `rank_resize` takes them


def prepare(name: str, layer: LoraLinear, way: Way, optimizer: Optimizer | None, coded: Coded, moves: Moves) -> Change:
    """Check and allocate everything one matrix needs; nothing of the model changes.

    Args:
        name: of the module.
        layer: it.
        way: its change.
        optimizer: of the factors.
        coded: takes the 8-bit moments, which move all at once.
        moves: takes the moves of all else.

    Raises:
        ValueError: the layer is merged, a tensor is not contiguous, or the optimizer's state cannot follow.
    """
    check_unmerged("rank change", name, layer)
    gates = layer._buffers["lora_gate"]
    factors: dict[str, Factor] = {}  # dict[...]() would take 0.4 us
    for factor, parameter in layer.factors.items():
        which = 0 if factor == "lora_A" else way.of_gate if factor == "lora_E" else 1
        plan = way.plans[which]
        old: dict[str, torch.Tensor] = {"": parameter}
        state: dict[str, Any] = {}
        if (grad := parameter.grad) is not None:
            old["grad"] = grad
        if gates is not None and which == way.of_gate:
            old["lora_gate"] = gates  # a new component is closed until its controller opens it
        for value in old.values():
            if not value.is_contiguous():  # moments are
                raise ValueError(f"rank change: {factor} of '{name}' must be contiguous, got strides {value.stride()}")
        kept: State = {} if optimizer is None else optimizer.state.get(parameter, {})
        for key, moment in moments(optimizer, parameter, kept).items() if optimizer is not None and kept else ():
            if isinstance(moment, torch.Tensor):
                old[key] = moment
            elif isinstance(moment, EightBit):
                coded.append((state, parameter, key, moment, plan.rows))
            else:
                state |= stored(kept, key, moment.gather(plan.rows, plan.live))
        in_place = parameter.shape[0] == len(plan.rows)
        new = old if in_place else _allocated(old, len(plan.rows), kept, state)
        _list_moves(moves, old, new, plan)
        factors[factor] = Factor(parameter, plan, new, state, in_place)
    return Change(name, layer, way, factors)


def _allocated(
    old: Mapping[str, torch.Tensor], rows: int, kept: State, state: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Return tensors like `old` with so many rows, unset; add those of the optimizer's state `kept` to `state`."""
    new: dict[str, torch.Tensor] = {}
    for key, value in old.items():
        if key == "lora_gate":
            new[key] = value.new_empty(rows)
        elif key in _OWN:
            new[key] = value.new_empty(rows, value.shape[1])
        else:
            new[key] = moved = empty_as(kept[key], rows, value.shape[1])  # a view knows no pages
            state |= stored(kept, key, moved)
    return new


def _list_moves(moves: Moves, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], plan: Plan) -> None:
    """Add the moves of one factor."""
    parameter = old[""]
    before, after = parameter.shape[0], len(plan.rows) or 1
    on_cpu, here = parameter.is_cpu, moves.setdefault(parameter.device, [])
    for key, value in old.items():
        there = here if value.is_cpu == on_cpu else moves.setdefault(value.device, [])  # a paged moment
        moved = new[key]
        there += value.data_ptr(), moved.data_ptr(), moved.nbytes // after, before, plan.number


def calls(moves: Moves, plans: list[list[int]]) -> list[Callable[[], None]]:
    """Return what moves all rows: one native call per device, the CPU's, which still allocates, first."""
    devices = sorted(moves, key=lambda device: device.type != "cpu")
    return [rank_resize(np.array(moves[device], dtype=np.int64).reshape(-1, 5), plans, device) for device in devices]


def commit(changes: Iterable[Change], optimizer: Optimizer | None) -> None:
    """Point parameters, gradients, state and ranks at what was moved; assignments only.

    What moved in place stays untouched: DDP's hooks hang on the gradient accumulator, compiled code on addresses.
    """
    for _, layer, way, factors in changes:
        for parameter, _, new, state, in_place in factors.values():
            if not in_place:
                parameter.grad = None  # set_ resets the gradient accumulator, which must not see the old shape
                parameter.set_(new[""])  # type: ignore[call-overload]
                parameter.grad = new.get("grad")
                if "lora_gate" in new:
                    layer.lora_gate = new["lora_gate"]
            if optimizer is not None and state:
                optimizer.state[parameter].update(state)
        if way.table is not None:
            layer.set_ranks(way.ranks, way.table)
