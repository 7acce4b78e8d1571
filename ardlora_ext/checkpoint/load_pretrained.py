"""`load_pretrained`: wrap a base model with the adapter that `save_pretrained` wrote."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ardlora_ext.checkpoint.adapter_state import STATE, read_state
from ardlora_ext.checkpoint.wrap import or_unwrapped, wrap
from ardlora_ext.config import AdapterConfig
from ardlora_ext.config.patterns import check_pattern
from ardlora_ext.config.registry import config_from_dict
from ardlora_ext.errors import written_by_strangers
from ardlora_ext.layers.expert_stacks import expert_stacks
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.inject import part_to_wrap
from ardlora_ext.model.record import Model, adapters, injection
from ardlora_ext.model.saved_modules import new_modules
from ardlora_ext.model.targets import plan_targets
from ardlora_ext.model.token_rows import own_rows
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate, apply


@torch.no_grad()
def load_pretrained(model: Model, directory: str | Path) -> Model:
    """Wrap a base model with the adapters that `save_pretrained` wrote, in place, to go on training or to evaluate.

    Ranks, weights and gates are restored exactly; the controller's state waits for `attach`.

    Args:
        model: the base model, not wrapped.
        directory: what `save_pretrained` wrote.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: no `ardlora_state.json` there.
        ValueError: the state is corrupt, foreign, or of another model; the model is unchanged then.
    """
    part = part_to_wrap(model)
    state, tensors, _ = read_state(Path(directory))
    with written_by_strangers(f"load_pretrained: {STATE} must be one that save_pretrained wrote"):
        # What was kept whole then is kept now, whatever this base was loaded from.
        config = replace(config_from_dict(state["config"]), modules_to_save=tuple(state["modules_to_save"]))
        if isinstance(config.target_modules, str):
            check_pattern(config.target_modules, f"load_pretrained: target_modules in {STATE}")
        for option in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, option) or ():
                check_pattern(pattern, f"load_pretrained: {option} in {STATE}")
        _check_model(part, config, state, tensors)
    with or_unwrapped(part):
        wrap(part, config)
        saved = _fill(part, state, tensors)
    _say_what_is_random(part, saved)
    return model


def _fill(model: nn.Module, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the adapters their ranks and values; return what was in `modules_to_save`."""
    layers = adapters(model)
    _check_rest(layers, state, tensors)
    _check_tokens(model, tensors)
    modules = {
        name: tuple(UnitUpdate(tuple(range(min(a, b))), max(b - a, 0)) for a, b in zip(layer.ranks, want, strict=True))
        for name, layer in layers.items()
        if (want := state["modules"][name]["ranks"]) != layer.ranks
    }
    apply(model, RankUpdate(modules))
    for name, layer in layers.items():
        for factor in ("lora_A", "lora_B"):
            value = tensors[f"{name}.{factor}"]
            getattr(layer, factor)[: len(value)] = value
        if layer.gate is not None:
            layer.gate[: sum(layer.ranks)] = tensors[f"{name}.gate"]
        for key, value in layer.extras.items():
            value.copy_(tensors[f"{name}.{key}"])
    for name, rows in own_rows(injection(model).tokens).items():
        rows.token_rows.copy_(tensors[f"{name}.token_rows"])
    saved = {key.removeprefix("saved."): value for key, value in tensors.items() if key.startswith("saved.")}
    model.load_state_dict(saved, strict=False)
    injection(model).controller_state = state["controller"]
    for layer in adapters(model).values():
        layer.loaded = False  # `attach` is told by the state
    injection(model).started = True
    return saved


def _say_what_is_random(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Warn of parameters that neither the base's checkpoint nor the adapter had."""
    random = [name for name in new_modules(model) if not any(key.startswith(f"{name}.") for key in saved)]
    random = [name for name in random if not isinstance(model.get_submodule(name), LoraLinear)]
    if random:
        warnings.warn(
            f"load_pretrained: {', '.join(map(repr, random))} must come from the base's checkpoint or the adapter, and "
            "is in neither: its values are random",
            stacklevel=3,
        )


def _check_model(
    model: nn.Module, config: AdapterConfig, state: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Check that every module and tensor of the checkpoint fits the model, before it changes."""
    if getattr(model, "_ardlora", None) is None:
        _check_features(model, state)
    layouts = plan_targets(model, config)[1]
    if layouts.keys() != state["modules"].keys():
        raise ValueError("load_pretrained: the model's targets must be those of the checkpoint")
    for name, layout in layouts.items():
        entry = state["modules"][name]
        _check_layout(name, layout, entry, min(config.limit(name), layout.max_rank))
        shapes = zip(("lora_A", "lora_B"), layout.rows(entry["ranks"]), (layout.a_width, layout.b_width), strict=True)
        for factor, rows, width in shapes:
            value = tensors.get(f"{name}.{factor}")
            if value is None or value.shape != (rows, width):
                got = "none" if value is None else list(value.shape)
                raise ValueError(f"load_pretrained: {factor} of '{name}' must be [{rows}, {width}], got {got}")
    own = model.state_dict()
    for key, value in tensors.items():
        name = key.removeprefix("saved.")
        if not key.startswith("saved."):
            continue
        if name not in own or own[name].shape != value.shape:
            raise ValueError(f"load_pretrained: model must have '{name}' of shape {list(value.shape)}")
        if own[name].is_floating_point() != value.is_floating_point():
            raise ValueError(f"load_pretrained: '{name}' must be {own[name].dtype} as in the model, got {value.dtype}")


def _check_rest(layers: dict[str, LoraLinear], state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Check what only an adapter can tell: its gates, and what its kind keeps besides the factors."""
    for name, layer in layers.items():
        wanted = {key: tuple(value.shape) for key, value in layer.extras.items()}
        if layer.gate is not None:
            wanted["gate"] = (sum(state["modules"][name]["ranks"]), *layer.gate.shape[1:])
        for key, shape in wanted.items():
            value = tensors.get(f"{name}.{key}")
            if value is None or tuple(value.shape) != shape:
                got = "none" if value is None else list(value.shape)
                raise ValueError(f"load_pretrained: {key} of '{name}' must be {list(shape)}, got {got}")


def _check_tokens(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that the checkpoint has the rows of embeddings that its config trains."""
    for name, rows in own_rows(injection(model).tokens).items():
        value, shape = tensors.get(f"{name}.token_rows"), list(rows.token_rows.shape)
        if value is None or list(value.shape) != shape:
            got = "none" if value is None else list(value.shape)
            raise ValueError(f"load_pretrained: token_rows of '{name}' must be {shape}, got {got}")


def _check_features(model: nn.Module, state: dict[str, Any]) -> None:
    modules, stacks = dict(model.named_modules()), expert_stacks(model)
    for name, entry in state["modules"].items():
        if entry["kind"] == "experts" and name in stacks:
            continue  # its layout is compared
        weight = getattr(modules.get(name), "weight", None)
        sizes = sorted((entry["in_features"], entry["out_features"]))
        if not isinstance(weight, torch.Tensor) or (weight.dim() == 2 and sorted(weight.shape) != sizes):
            got = "no such layer" if weight is None else f"shape {list(weight.shape)}"
            raise ValueError(f"load_pretrained: model must have '{name}' with features {sizes}, got {got}")


def _check_layout(name: str, layout: UnitLayout, entry: dict[str, Any], limit: int) -> None:
    found = (layout.kind, layout.factoring, layout.units, layout.in_features, layout.out_features)
    sizes = (entry["in_features"], entry["out_features"])
    saved = (entry.get("kind"), entry.get("factoring"), len(entry["ranks"]), *sizes)
    if found != saved:
        raise ValueError(f"load_pretrained: units of '{name}' must be {saved} as in the checkpoint, got {found}")
    if max(entry["ranks"]) > limit:
        raise ValueError(f"load_pretrained: ranks of '{name}' must be at most {limit}, got {entry['ranks']}")
