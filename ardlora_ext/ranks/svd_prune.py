"""Lower the ranks of a model by recompression, and turn the optimizer's state with its factors; see `recompress`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.record import adapters, injection
from ardlora_ext.native import reference
from ardlora_ext.ranks import resize
from ardlora_ext.ranks.eight_bit import EightBit
from ardlora_ext.ranks.optimizer import moments
from ardlora_ext.ranks.recompress import Group, Recompressed, factor_names, groups, recompress
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate
from ardlora_ext.unbroken import nothing

# How a state tensor follows: with the coefficients (linear in the gradient) or with their squares.
_POWER = {"grad": 1, "exp_avg": 1, "momentum_buffer": 1, "grad_avg": 1}
_POWER |= {"exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2}


@dataclass
class _Plan:
    """What one layer will hold: by (factor, "" | "grad" | "lora_gate" | state key), its live rows."""

    ranks: list[int]
    rows: dict[tuple[str, str], torch.Tensor]
    lost: float


def _tensors(layer: LoraLinear, optimizer: Optimizer | None) -> dict[tuple[str, str], torch.Tensor]:
    found = {}
    for factor, parameter in layer.factors.items():
        found[factor, ""] = parameter.data
        if parameter.grad is not None:
            found[factor, "grad"] = parameter.grad
        for key, value in ({} if optimizer is None else moments(optimizer, parameter)).items():
            if not isinstance(value, torch.Tensor):
                form = "in 8 bit" if isinstance(value, EightBit) else "as two vectors"
                raise ValueError(
                    f"svd_prune: optimizer state must be in floating point, got {type(optimizer).__name__} {form}"
                )
            if key not in _POWER or not value.is_floating_point():
                raise ValueError(
                    f"svd_prune: optimizer state must be one of {', '.join(k for k in _POWER if k != 'grad')} in "
                    f"floating point, got '{key}' ({value.dtype}) of {type(optimizer).__name__}"
                )
            found[factor, key] = value
    return found


def _blocks(
    layer: LoraLinear, ranks: Sequence[int], group: Group, result: Recompressed
) -> list[tuple[str, torch.Tensor, torch.Tensor, slice, slice]]:
    """Return what a group's result fills: (factor, new rows, their turn, old rows' place, new rows' place)."""
    common, own = factor_names(layer)
    of_common, of_own = (1, 0) if layer.layout.gate_on_a else (0, 1)
    before, after = (reference.unit_slices(layer.layout, r) for r in (layer.ranks, ranks))
    widest = max(group.units, key=lambda u: layer.ranks[u]), max(group.units, key=lambda u: ranks[u])
    places = before[widest[0]][of_common], after[widest[1]][of_common]
    blocks = [(common, result.common, result.turn_common, *places)]
    for i, u in enumerate(group.units):
        places = before[u][of_own], after[u][of_own]
        blocks.append((own, result.own[i], result.turn_own[i], *places))
        blocks.append(("lora_E", result.gate[i][:, None], result.turn_gate[i], *places))
    return blocks


def _plan(layer: LoraLinear, ranks: list[int], optimizer: Optimizer | None) -> _Plan:
    """Compute everything one layer will hold; nothing of the model changes."""
    tensors = _tensors(layer, optimizer)
    a_rows, b_rows = layer.layout.rows(ranks)
    live = {"lora_A": a_rows, "lora_B": b_rows, "lora_E": sum(ranks)}
    rows = {
        (factor, key): old.new_zeros(live[factor], old.shape[1], dtype=torch.float64)
        for (factor, key), old in tensors.items()
    }
    gate = layer.lora_A.new_zeros(sum(ranks), dtype=torch.float64)
    lost = 0.0
    for group in groups(layer):
        result = recompress(group, [ranks[u] for u in group.units], layer.lora_E is not None)
        lost += layer.scaling**2 * result.lost
        for owner, value, turn, before, after in _blocks(layer, ranks, group, result):
            for (factor, key), old in tensors.items():
                if factor == owner:
                    new = value if key == "" else turn ** _POWER[key] @ old[before].double()
                    rows[factor, key][after] = new
            if owner == "lora_E":
                gate[after] = value[:, 0]
    if layer.lora_gate is not None:
        rows[factor_names(layer)[1], "lora_gate"] = gate
    return _Plan(ranks, rows, lost)


def check_settled(model: nn.Module, caller: str) -> None:
    """Refuse a model whose controller still moves ranks."""
    controller = injection(model).controller
    phase = "fixed" if controller is None else controller.summary()["phase"]
    if phase not in ("fixed", "frozen"):
        raise ValueError(f"{caller}: ranks must be settled, got phase '{phase}'; call controller.finalize() first")


@torch.no_grad()
def svd_prune(model: nn.Module, ranks: Mapping[str, Sequence[int]], optimizer: Optimizer | None = None) -> float:
    """Lower units to these ranks with the least change of their updates, and turn the optimizer's state with them.

    Unlike dropping components, which keeps rows (and their moments) bit for bit, every kept component is a new
    combination of the old ones. Gates are folded in (trained gates become singular values).

    Args:
        model: a wrapped model.
        ranks: by module name, the new rank of each unit, none above the present one; modules left out stay.
        optimizer: the optimizer of the adapters, or None before there is one. Adam, AdamW, NAdam, RAdam, Adagrad,
            RMSprop or SGD.

    Returns:
        Frobenius norm of the change of all updates together.

    Raises:
        ValueError: the model is not wrapped, its controller still moves ranks, ranks do not fit, or the optimizer keeps
            a state that cannot turn. Nothing changes then.
    """
    check_settled(model, "svd_prune")
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
        if new != layer.ranks:
            plans[name] = _plan(layer, new, optimizer)
    update = {name: tuple(UnitUpdate(tuple(range(r))) for r in plan.ranks) for name, plan in plans.items()}
    controller = injection(model).controller
    then = nothing if controller is None else controller.applied
    resize.apply(model, RankUpdate(update), optimizer, {name: plan.rows for name, plan in plans.items()}, then=then)
    return math.sqrt(sum(plan.lost for plan in plans.values()))
