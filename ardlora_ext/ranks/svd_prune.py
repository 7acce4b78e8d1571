"""Lower the ranks of a model by recompression, and turn the optimizer's state with its factors; see `recompress`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.record import adapters, injection
from ardlora_ext.native import reference
from ardlora_ext.ranks import resize
from ardlora_ext.ranks.eight_bit import EightBit
from ardlora_ext.ranks.loss_metric import Batch, LossFunction, LossMetric, measured
from ardlora_ext.ranks.optimizer import Factored, copied, moments
from ardlora_ext.ranks.recompress import (
    Group,
    Metric,
    Recompressed,
    check_finite,
    factor_names,
    groups,
    recompress,
)
from ardlora_ext.ranks.resize import RankUpdate, Rows, UnitUpdate
from ardlora_ext.unbroken import nothing

Basis = Literal["update", "loss"]

# How optimizer state follows: linear in the gradient, in its squares, or as the weights themselves do.
_LINEAR = {"grad", "exp_avg", "momentum_buffer", "grad_avg"}
_SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_avg_var", "hessian"}
Rule = Literal["linear", "squares", "weights"]


@dataclass
class _Plan:
    """What one layer will hold: by (factor, "" | "grad" | "lora_gate" | state key), its live rows."""

    ranks: list[int]
    rows: Rows
    lost: float
    results: list[Recompressed]  # by group


def _rule(optimizer: Optimizer, key: str, values: torch.Tensor) -> Rule:
    """Return how a state tensor follows: by its name, else a tensor without a negative number holds squares."""
    if key in copied(optimizer) or key in ("p0", "z"):  # of Prodigy, of schedule-free ones
        return "weights"
    if key in ("state1", "state2"):  # bitsandbytes: one moment, or the first and the second
        squares = key == "state2" or type(optimizer).__name__.startswith(("RMSprop", "Adagrad"))
        return "squares" if squares else "linear"
    if key in _LINEAR or bool((values < 0).any()):
        return "linear"
    return "squares" if key in _SQUARES or bool(values.any()) else "linear"


_Found = dict[tuple[str, str], tuple[torch.Tensor, Rule]]
_Coded = dict[tuple[str, str], EightBit | Factored]


def _tensors(layer: LoraLinear, optimizer: Optimizer | None) -> tuple[_Found, _Coded]:
    """Return (values [rows, any], rule) of all that turns, by (factor, "" | "grad" | state key), and coded moments.

    Raises:
        ValueError: a moment is not in floating point.
    """
    found: _Found = {}
    coded: _Coded = {}
    for factor, parameter in layer.factors.items():
        found[factor, ""] = parameter.data, "weights"
        if parameter.grad is not None:
            found[factor, "grad"] = parameter.grad, "linear"
        for key, moment in ({} if optimizer is None else moments(optimizer, parameter)).items():
            assert optimizer is not None
            if isinstance(moment, Factored):
                coded[factor, key] = moment
                found[factor, key] = moment.row.reshape(len(moment.row), -1), "squares"
                continue
            if isinstance(moment, EightBit):
                coded[factor, key] = moment
            values = moment.decode() if isinstance(moment, EightBit) else moment
            if not values.is_floating_point():
                raise ValueError(
                    f"svd_prune: optimizer state must be in floating point, got '{key}' ({values.dtype}) of "
                    f"{type(optimizer).__name__}"
                )
            found[factor, key] = values, _rule(optimizer, key, values)
        if (factor, "grad_avg") in found:  # RMSprop takes the root of the variance: that is what turns by squares
            mean, square = (found[factor, key][0] for key in ("grad_avg", "square_avg"))
            found[factor, "square_avg"] = (square - mean.square()).clamp(min=0.0), "squares"
    return found, coded


def _blocks(
    layer: LoraLinear, ranks: Sequence[int], group: Group, result: Recompressed
) -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor, slice, slice]]:
    """Return what a group's result fills: (factor, new rows, turn of gradients, of weights, old place, new place)."""
    common, own = factor_names(layer)
    of_common, of_own = (1, 0) if layer.layout.gate_on_a else (0, 1)
    before, after = (reference.unit_slices(layer.layout, r) for r in (layer.ranks, ranks))
    widest = max(group.units, key=lambda u: layer.ranks[u]), max(group.units, key=lambda u: ranks[u])
    places = before[widest[0]][of_common], after[widest[1]][of_common]
    blocks = [(common, result.common, result.turn_common, result.common_map, *places)]
    for i, u in enumerate(group.units):
        places = before[u][of_own], after[u][of_own]
        blocks.append((own, result.own[i], result.turn_own[i], result.own_map[i], *places))
        blocks.append(("lora_E", result.gate[i][:, None], result.turn_gate[i], result.turn_gate[i], *places))
    return blocks


def _plan(layer: LoraLinear, ranks: list[int], optimizer: Optimizer | None, metric: Sequence[Metric | None]) -> _Plan:
    """Compute everything one layer will hold; nothing of the model changes."""
    tensors, coded = _tensors(layer, optimizer)
    a_rows, b_rows = layer.layout.rows(ranks)
    live = {"lora_A": a_rows, "lora_B": b_rows, "lora_E": sum(ranks)}
    rows = {
        (factor, key): old.new_zeros(live[factor], old.shape[1], dtype=torch.float64)
        for (factor, key), (old, _) in tensors.items()
    }
    gate = layer.lora_A.new_zeros(sum(ranks), dtype=torch.float64)
    lost, results = 0.0, []
    for group, known in zip(groups(layer), metric, strict=True):
        result = recompress(group, [ranks[u] for u in group.units], layer.lora_E is not None, known)
        results.append(result)
        lost += layer.scaling**2 * result.lost
        for owner, value, turn, of_weights, before, after in _blocks(layer, ranks, group, result):
            by = {"linear": turn, "squares": turn**2, "weights": of_weights}
            for (factor, key), (old, rule) in tensors.items():
                if factor == owner:
                    rows[factor, key][after] = value if key == "" else by[rule] @ old[before].double()
            if owner == "lora_E":
                gate[after] = value[:, 0]
    if layer.lora_gate is not None:
        rows[factor_names(layer)[1], "lora_gate"] = gate
    for factor in {found for found, key in rows if key == "grad_avg"}:
        rows[factor, "square_avg"] += rows[factor, "grad_avg"].square()
    given: dict[tuple[str, str], torch.Tensor | EightBit | Factored] = dict(rows)
    held = dict(zip(("lora_A", "lora_B"), layer.capacities(a_rows, b_rows), strict=True))
    held["lora_E"] = held["lora_A" if layer.layout.gate_on_a else "lora_B"]
    for (factor, key), moment in coded.items():
        value = rows[factor, key]
        if isinstance(moment, Factored):
            given[factor, key] = moment.with_rows(value[:, 0], held[factor])
        else:
            whole = value.new_zeros(held[factor], value.shape[1], dtype=torch.float32)
            whole[: len(value)] = value.float()
            given[factor, key] = moment.with_values(whole)
    return _Plan(ranks, given, lost, results)


def check_settled(model: nn.Module, caller: str) -> None:
    """Refuse a model whose controller still moves ranks."""
    controller = injection(model).controller
    phase = "fixed" if controller is None else controller.summary()["phase"]
    if phase not in ("fixed", "frozen"):
        raise ValueError(f"{caller}: ranks must be settled, got phase '{phase}'; call controller.finalize() first")


@torch.no_grad()
def svd_prune(
    model: nn.Module,
    ranks: Mapping[str, Sequence[int]],
    optimizer: Optimizer | None = None,
    *,
    metric: Basis = "update",
    batches: Iterable[Batch] | None = None,
    loss_fn: LossFunction | None = None,
) -> float:
    """Lower units to these ranks with the least change of their updates, and turn the optimizer's state with them.

    Unlike dropping components, which keeps rows (and their moments) bit for bit, every kept component is a new
    combination of the old ones. Gates are folded in (trained gates become singular values).

    Args:
        model: a wrapped model.
        ranks: by module name, the new rank of each unit, none above the present one; modules left out stay.
        optimizer: the optimizer of the adapters, or None before there is one: any that `attach` takes. First moments
            turn exactly, squares by the squares of the coefficients.
        metric: which change is least: that of the `update` (Frobenius norm), or what it costs the `loss` to second
            order, see `ardlora_ext.ranks.loss_metric`.
        batches: for `metric="loss"`, a few batches that the loss is looked at on; None: what the run itself saw
            (ARD-LoRA in `mode="anneal"`).
        loss_fn: `loss_fn(model, batch)` returns a scalar; None: `model(**batch).loss`.

    Returns:
        Frobenius norm of the change of all updates together.

    Raises:
        ValueError: the model is not wrapped, its controller still moves ranks, ranks do not fit, the optimizer keeps
            a state that cannot turn, or nothing is known of the loss. Nothing changes then.
    """
    check_settled(model, "svd_prune")
    known = known_metric(model, metric, batches, loss_fn, "svd_prune")
    controller = injection(model).controller
    return prune(model, ranks, optimizer, known, then=nothing if controller is None else controller.applied)


def known_metric(
    model: nn.Module, metric: Basis, batches: Iterable[Batch] | None, loss_fn: LossFunction | None, caller: str
) -> LossMetric | None:
    """Return what is known of the loss, or None for the metric of the update.

    Raises:
        ValueError: `metric` is another, batches come without need, or nothing is known.
    """
    if metric not in ("update", "loss"):
        raise ValueError(f"{caller}: metric must be one of 'update', 'loss', got {metric!r}")
    if metric == "update":
        if batches is not None:
            raise ValueError(f"{caller}: batches must come with metric='loss', got metric='update'")
        return None
    if batches is not None:
        return measured(model, adapters(model), batches, loss_fn)
    found: LossMetric | None = getattr(injection(model).controller, "metric", None)
    if found is None or not found.samples:
        raise ValueError(
            f"{caller}: metric='loss' must know the loss: give batches, or train with ArdConfig(mode='anneal') first"
        )
    return found


@torch.no_grad()
def prune(
    model: nn.Module,
    ranks: Mapping[str, Sequence[int]],
    optimizer: Optimizer | None,
    metric: LossMetric | None,
    *,
    first: Callable[[], None] = nothing,
    then: Callable[[], None] = nothing,
) -> float:
    """Do what `svd_prune` does, while ranks still move too; `first` and `then` as in `resize.apply`."""
    layers = adapters(model)
    plans: dict[str, _Plan] = {}
    for name, wanted in ranks.items():
        if name not in layers:
            raise ValueError(f"svd_prune: module must be an adapter of the model, got '{name}'")
        layer, new = layers[name], [int(r) for r in wanted]
        if len(new) != layer.layout.units or any(not 0 <= r <= old for r, old in zip(new, layer.ranks, strict=True)):
            raise ValueError(f"svd_prune: ranks of '{name}' must be {layer.layout.units}, each between 0 and the "
                             f"present {layer.ranks}, got {new}")  # fmt: skip
        if "initial_A" in layer.extras:
            raise ValueError(f"svd_prune: '{name}' must not start from pissa, whose update is not lora_B lora_A alone")
        check_finite(name, layer)
        if new != layer.ranks:
            count = 1 if layer.layout.shared else layer.layout.units
            plans[name] = _plan(layer, new, optimizer, [None] * count if metric is None else metric.of(name))
    update = {name: tuple(UnitUpdate(tuple(range(r))) for r in plan.ranks) for name, plan in plans.items()}
    turned = {} if metric is None else metric.turned({name: plan.results for name, plan in plans.items()})

    def done() -> None:
        if metric is not None:
            metric.means = turned
        then()

    rows = {name: plan.rows for name, plan in plans.items()}
    resize.apply(model, RankUpdate(update), optimizer, rows, first=first, then=done)
    return math.sqrt(sum(plan.lost for plan in plans.values()))
