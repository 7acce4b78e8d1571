"""A frozen copy of the adapted model as it is now: the reference of preference training (DPO, KTO, GRPO)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ardlora_ext.layers.experts import ExpertStack
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.layers.tokens import TokenRows
from ardlora_ext.model.inject import replace_modules, replacement
from ardlora_ext.model.record import Model, adapters, check_unmerged, home, injection


def frozen_copy(model: Model) -> Model:
    """Return the model as it computes now, in eval mode, without gradients: for `ref_model` of TRL's trainers.

    Frozen weights of the base are shared, not copied, so that it costs the memory of the adapters and of
    `modules_to_save`. It does not follow what the original learns from then on.

    Args:
        model: a wrapped model.

    Raises:
        ValueError: the model is not wrapped, or merged.

    Example:
        trainer = DPOTrainer(model, ref_model=ard.frozen_copy(model), args=..., callbacks=[ard.RankCallback()])
    """
    injection(model)
    _check("frozen_copy", model)
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    found = copy.deepcopy(model, dict(shared))
    for parameter in found.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return found.eval()


@torch.no_grad()
def lend_adapter(model: nn.Module, other: nn.Module) -> None:
    """Put a frozen copy of the model's adapter, and of its `modules_to_save`, into another model of the same base.

    Raises:
        ValueError: the other one has adapters, or lacks a layer.
    """
    _check("lend_adapter", model)
    part, layers, tokens = home(model), adapters(model), injection(model).tokens
    if adapters(other):
        raise ValueError("lend_adapter: the other model must not be wrapped")
    modules = dict(other.named_modules(remove_duplicate=False))
    places = {name: name.rpartition(".")[0] if isinstance(x, ExpertStack) else name for name, x in layers.items()}
    places |= {name: name for name in tokens}
    missing = [name for name, place in places.items() if place not in modules]
    if missing:
        raise ValueError(f"lend_adapter: the other model must have the layers of the first, got no '{missing[0]}'")
    both = [*layers.items(), *tokens.items()]
    bases: dict[int, Any] = {id(layer.base_layer): modules[places[name]] for name, layer in both}
    copies: dict[str, LoraLinear | TokenRows] = copy.deepcopy({**layers, **tokens}, dict(bases))
    for layer in copies.values():
        layer.eval().requires_grad_(False)
    replace_modules(other, {id(layer.base_layer): replacement(layer) for layer in copies.values()})
    for name in injection(part).modules_to_save:
        other.get_submodule(name).load_state_dict(part.get_submodule(name).state_dict())


def _check(op: str, model: nn.Module) -> None:
    for name, layer in adapters(model).items():
        check_unmerged(op, name, layer)
