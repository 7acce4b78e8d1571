"""Put adapters into a model and take them out again.

A model has the adapters of one name in it, or none. Those of other names rest outside the module tree, around the same
base layers, so that all other code sees one adapter per layer and a model at rest is the plain base.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from ardlora_ext import world
from ardlora_ext.config import AdapterConfig, ArdConfig, DoraConfig, SvdConfig
from ardlora_ext.dora import DoraLinear
from ardlora_ext.layers import Capacity, LoraLinear
from ardlora_ext.packing import Readers
from ardlora_ext.pissa import PissaLinear, start_orthogonal
from ardlora_ext.start import start_svd
from ardlora_ext.targets import inside, plan_targets
from ardlora_ext.units import UnitLayout

Model = TypeVar("Model", bound=nn.Module)

_ATTRIBUTE = "_ardlora"
_SAVE = "save_pretrained"  # of a transformers model


@dataclass
class Injection:
    """What `wrap` remembers of one adapter; the model refers to the one that is in it."""

    config: AdapterConfig
    requires_grad: dict[str, bool]  # of the base, before it was frozen
    modules_to_save: tuple[str, ...]
    layers: list[LoraLinear]  # also while they rest
    values: dict[str, torch.Tensor]  # of modules_to_save: the base's own while active, the adapter's while at rest
    named: dict[str, Injection] = field(default_factory=dict)  # all adapters of the model, this one included
    controller_state: dict[str, Any] = field(default_factory=dict)  # from a checkpoint, for attach
    controller: Any = None  # set by attach
    sync: Any = None  # averages gradients over processes, set by replicate
    started: bool = False  # whether init="gradient" has its directions

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model is neither attached nor replicated: hooks are on the original's parameters."""
        return {**self.__dict__, "controller": None, "sync": None}


@dataclass(frozen=True)
class ParametersReport:
    """Parameter counts of a wrapped model.

    Attributes:
        live: adapter parameters in use: factors, trained gates (lambda of ElaLoRA and AdaLoRA), DoRA's magnitudes.
        allocated: adapter parameters held, with the slack of their capacity.
        trainable: everything that gets a gradient: live adapters and `modules_to_save`.
        total: the whole model with its live adapters.
    """

    live: int
    allocated: int
    trainable: int
    total: int

    def __str__(self) -> str:
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {100 * self.trainable / max(self.total, 1):.4f} || adapters: {self.live:,}"
        )


def injection(model: nn.Module) -> Injection:
    """Return what `wrap` left on the model.

    Raises:
        ValueError: the model is not wrapped.
    """
    found = getattr(model, _ATTRIBUTE, None)
    if not isinstance(found, Injection):
        if hasattr(getattr(model, "module", None), _ATTRIBUTE):
            raise ValueError(f"model must be given without {type(model).__name__} around it: use its .module")
        raise ValueError(f"{type(model).__name__} must be wrapped: call ardlora_ext.wrap(model, config) first")
    return found


def is_active(model: nn.Module, record: Injection) -> bool:
    """Tell whether the adapter of `record` is the one in the model."""
    return getattr(model, _ATTRIBUTE, None) is record


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the active adapters by the name of the module they replaced, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def wrap(model: Model, config: AdapterConfig, adapter_name: str = "default") -> Model:
    """Freeze the model and put an adapter on every target, in place.

    Args:
        model: any module with linear layers; a transformers model tells its heads itself. On the CPU or, where the
            build has CUDA kernels, on a CUDA device: adapters are put where their layer is.
        config: `LoraConfig` or `ArdConfig`.
        adapter_name: for models that get several, see `add_adapter`.

    Returns:
        The same model. Its `save_pretrained`, if it has one as transformers models do, writes the adapter from now on,
        as PEFT's does.

    Raises:
        ValueError: nothing matches (near misses are listed), the model is already wrapped, heads do not divide,
            `head_dim` matches no layer, a budget is out of range, the build has no kernels for the parameters' device.
            The model is unchanged then.
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
    if hasattr(model, _SAVE):
        from ardlora_ext.saving import save_adapters  # it stands on what this module makes

        save_adapters(model)
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
    setattr(model, _ATTRIBUTE, record)


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
    if world.size() == 1:
        return "elastic"
    if config.max_rank == sys.maxsize:
        raise ValueError(
            f"wrap: r_max of {type(config).__name__} must be given with {world.size()} processes, where factors have "
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
    delattr(model, _ATTRIBUTE)


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
    vars(model).pop(_SAVE, None)
    return model


def unwrap(model: Model) -> Model:
    """Take the adapters out, in place: the base layers and their `requires_grad` flags are back as before `wrap`.

    `modules_to_save` keep what they learned under the active adapter.
    """
    injection(model)
    for name, layer in adapters(model).items():
        check_unmerged("unwrap", name, layer)
    return remove(model)


def check_unmerged(op: str, name: str, layer: LoraLinear) -> None:
    """Check that an update is not in its base weight now.

    Raises:
        ValueError: it is.
    """
    if layer.undo_merge is not None:
        raise ValueError(f"{op}: '{name}' must not be merged; call ardlora_ext.unmerge_adapter(model) first")


def parameters_report(model: nn.Module) -> ParametersReport:
    """Count the parameters of a wrapped model; `print` it for PEFT's one-line form.

    All that the optimizer trains counts: lora_E (lambda, one number a component) and DoRA's magnitudes too. ARD-LoRA's
    gates follow from its ranks and are no parameters. The budgets of ElaLoRA and AdaLoRA are in components, as in their
    papers; those of ARD-LoRA and `compress` in parameters as counted here.
    """
    injection(model)
    layers = list(adapters(model).values())
    own = {id(p) for layer in layers for p in layer.trained.values()}
    live = sum(layer.live_parameters for layer in layers)
    others = [p for p in model.parameters() if id(p) not in own]
    return ParametersReport(
        live=live,
        allocated=sum(p.numel() for layer in layers for p in layer.trained.values()),
        trainable=live + sum(p.numel() for p in others if p.requires_grad),
        total=live + sum(p.numel() for p in others),
    )
