"""Put adapters into a model, let them rest, and take them out again."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import nn

from ardlora_ext import processes
from ardlora_ext.config import AdapterConfig, ArdConfig, DoraConfig, SvdConfig
from ardlora_ext.layers.dora import DoraLinear
from ardlora_ext.layers.linear import Capacity, LoraLinear
from ardlora_ext.layers.orthogonal_start import start_orthogonal
from ardlora_ext.layers.pissa import PissaLinear
from ardlora_ext.layers.svd_start import start_svd
from ardlora_ext.model.record import ATTRIBUTE, Injection, Model, adapters, check_unmerged, injection
from ardlora_ext.model.targets import inside, plan_targets
from ardlora_ext.native.packing import Readers
from ardlora_ext.native.units import UnitLayout

SAVE = "save_pretrained"  # of a transformers model; `wrap` gives the model one of its own


def inject(model: Model, config: AdapterConfig, adapter_name: str = "default") -> Model:
    """Freeze the model and put an adapter on every target, in place: `wrap` but for the model's own `save_pretrained`.

    Raises:
        ValueError: as `wrap` does. The model is unchanged then.
    """
    chosen, layouts, saved = plan_targets(model, config)
    capacity = _capacity(config)
    generator = torch.Generator().manual_seed(config.seed)
    layers = [_adapter(module, layouts[name], config, capacity, generator) for name, module in chosen.items()]
    if config.packed:
        _pack(dict(zip(chosen, layers, strict=True)))
    record = Injection(config, {}, saved, layers, {})
    record.values = _saved_values(model, record)
    record.named[adapter_name] = record
    activate(model, record)
    return model


def _pack(layers: Mapping[str, LoraLinear]) -> None:
    """Tell layers with the same parent and input size of each other: they may read the same tensor."""
    groups: dict[tuple[str, int], Readers] = {}
    for name, layer in layers.items():
        layer.readers = groups.setdefault((name.rpartition(".")[0], layer.layout.in_features), Readers())


def activate(model: nn.Module, record: Injection) -> None:
    """Put the adapter of `record` into a model that has none in it."""
    record.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(inside(name.rpartition(".")[0], record.modules_to_save))
    _exchange_values(model, record)
    for layer in record.layers:
        layer.train(layer.base_layer.training)
    _replace(model, {id(layer.base_layer): layer for layer in record.layers})
    setattr(model, ATTRIBUTE, record)


def rest(model: nn.Module) -> Injection:
    """Take the active adapter out: the model is the plain base, until `activate` puts one in again."""
    record = injection(model)
    for name, layer in adapters(model).items():
        check_unmerged("adapter", name, layer)
    _take_out(model)
    _exchange_values(model, record)
    return record


def _saved_values(model: nn.Module, record: Injection) -> dict[str, torch.Tensor]:
    """Return copies of what is in `modules_to_save` now."""
    state = {f"{n}.{k}": v for n in record.modules_to_save for k, v in model.get_submodule(n).state_dict().items()}
    return {name: value.detach().clone() for name, value in state.items()}


@torch.no_grad()
def _exchange_values(model: nn.Module, record: Injection) -> None:
    """Exchange what is in `modules_to_save` with what the record keeps; parameters stay the same objects."""
    kept, record.values = record.values, _saved_values(model, record)
    for name in record.modules_to_save:
        for key, value in model.get_submodule(name).state_dict(keep_vars=True).items():
            value.copy_(kept[f"{name}.{key}"])


def _replace(model: nn.Module, replacement: Mapping[int, nn.Module]) -> None:
    """Put new modules where the old ones stand, by id; every place of a module used twice."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if id(child) in replacement:
                setattr(parent, key, replacement[id(child)])


def _capacity(config: AdapterConfig) -> Capacity:
    """Decide `auto`.

    Raises:
        ValueError: it would be `fixed` and ranks have no bound.
    """
    if config.capacity != "auto":
        return config.capacity
    count = processes.size()
    if count == 1:
        return "elastic"
    if config.max_rank == sys.maxsize:
        raise ValueError(
            f"wrap: r_max of {type(config).__name__} must be given with {count} processes, where factors have "
            "room for the largest rank from the start (capacity='auto' is 'fixed'), got None"
        )
    return "fixed"


def _adapter(
    module: nn.Module, layout: UnitLayout, config: AdapterConfig, capacity: Capacity, generator: torch.Generator
) -> LoraLinear:
    weight = getattr(module, "weight", None)
    auto = config.adapter_dtype == "auto" and isinstance(weight, torch.Tensor) and weight.is_floating_point()
    kind = DoraLinear if isinstance(config, DoraConfig) else PissaLinear if config.init == "pissa" else LoraLinear
    layer = kind(
        module,
        layout,
        config.initial_rank,
        config.scaling,
        max_rank=config.max_rank,
        capacity=capacity,
        lora_dropout=config.lora_dropout,
        gate="controlled" if isinstance(config, ArdConfig) else "trained" if isinstance(config, SvdConfig) else "none",
        dtype=weight.dtype if auto and isinstance(weight, torch.Tensor) else torch.float32,
        generator=generator,
    )
    if isinstance(config, SvdConfig):
        start_svd(layer, config.start == "orthonormal", generator)
    if config.init == "orthogonal":
        start_orthogonal(layer, generator)
    home = next((t.device for t in module.parameters()), torch.device("cpu"))
    return layer if home.type == "cpu" else layer.to(home)


def _take_out(model: nn.Module) -> None:
    record = injection(model)
    _replace(model, {id(layer): layer.base_layer for layer in record.layers})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.requires_grad.get(name, True))
    delattr(model, ATTRIBUTE)


def detach(record: Injection) -> None:
    """Take the hooks of one adapter off its optimizer and its parameters."""
    for hooked in (record.controller, record.sync):
        if hooked is not None:
            hooked.detach()


def remove(model: Model) -> Model:
    """Take the adapters of all names out for good."""
    for record in injection(model).named.values():
        detach(record)
    _take_out(model)
    vars(model).pop(SAVE, None)
    return model


def unwrap(model: Model) -> Model:
    """Take the adapters out, in place: the base layers and their `requires_grad` flags are back as before `wrap`.

    `modules_to_save` keep what they learned under the active adapter.
    """
    injection(model)
    for name, layer in adapters(model).items():
        check_unmerged("unwrap", name, layer)
    return remove(model)
