"""What a wrapped model knows of its adapters.

A model has the adapters of one name in it, or none. Those of other names rest outside the module tree, around the same
base layers, so that all other code sees one adapter per layer and a model at rest is the plain base.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ardlora_ext.config import AdapterConfig
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.layers.tokens import TokenRows

Model = TypeVar("Model", bound=nn.Module)

ATTRIBUTE = "_ardlora"
_COMPILED = "_orig_mod."  # in the names of modules that torch.compile has wrapped


@dataclass
class Injection:
    """What `wrap` remembers of one adapter; the model refers to the one that is in it."""

    config: AdapterConfig
    requires_grad: dict[str, bool]  # of the base, before it was frozen
    trains: dict[str, bool]  # of the base, while this adapter was last in it: `modules_to_save`, and what the user said
    modules_to_save: tuple[str, ...]
    layers: list[LoraLinear]  # also while they rest
    tokens: dict[str, TokenRows]  # by the name of the layer they take the place of; also while they rest
    values: dict[str, torch.Tensor]  # of modules_to_save: the base's own while active, the adapter's while at rest
    named: dict[str, Injection] = field(default_factory=dict)  # all adapters of the model, this one included
    controller_state: dict[str, Any] = field(default_factory=dict)  # from a checkpoint, for attach
    resumed: bool = False  # whether that state belongs to an optimizer that is resumed with it
    controller: Any = None  # set by attach
    optimizer: Any = None  # weak reference to the one it follows, set by attach
    sync: Any = None  # averages gradients over processes, set by replicate
    started: bool = False  # whether init="gradient" has its directions

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model is neither attached nor replicated: hooks are on the original's parameters."""
        return {**self.__dict__, "controller": None, "optimizer": None, "sync": None}


def check_module(op: str, model: object) -> None:
    """Check that a model is one.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")


def uncompiled(model: Model) -> Model:
    """Return the module that `torch.compile(model)` stands for: its names are those of the eager model."""
    found = getattr(model, "_orig_mod", model)
    return cast(Model, found)


def home(model: Model) -> Model:
    """Return the module that holds the adapters: the model, what `torch.compile` made it of, or the one wrapped part.

    Names of adapters are relative to it. A model that is not wrapped is its own home.
    """
    check_module("ardlora_ext", model)
    if _held(model) is not None:
        return model
    model = uncompiled(model)
    parts = [part for part in model.modules() if _held(part) is not None]
    return cast(Model, parts[0]) if len(parts) == 1 else model


def _held(module: nn.Module) -> Injection | None:
    found = vars(module).get(ATTRIBUTE)
    return found if isinstance(found, Injection) else None


def injection(model: nn.Module) -> Injection:
    """Return what `wrap` left on the model, or on the part of it that is wrapped.

    Raises:
        ValueError: the model is not wrapped.
        TypeError: it is no model.
    """
    part, inner = home(model), getattr(model, "module", None)
    if _held(model) is None and isinstance(inner, nn.Module) and hasattr(inner, ATTRIBUTE):
        raise ValueError(f"model must be given without {type(model).__name__} around it: use its .module")
    found = _held(part)
    if found is None:
        raise ValueError(f"{type(model).__name__} must be wrapped: call ardlora_ext.wrap(model, config) first")
    return found


def is_active(model: nn.Module, record: Injection) -> bool:
    """Tell whether the adapter of `record` is the one in the model."""
    return _held(home(model)) is record


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the active adapters by the name of the module they replaced, in the model's order."""
    found = dict[str, LoraLinear]()
    _collect(home(model), "", found, set())
    return found


def _collect(module: nn.Module, name: str, found: dict[str, LoraLinear], seen: set[nn.Module]) -> None:
    """Do what `named_modules` does, in a third of its time: a decision about ranks asks several times."""
    seen.add(module)
    if isinstance(module, LoraLinear):
        found[name.replace(_COMPILED, "")] = module
    for part, child in module._modules.items():
        if child is not None and child not in seen:
            _collect(child, f"{name}.{part}" if name else part, found, seen)


def check_unmerged(op: str, name: str, layer: LoraLinear) -> None:
    """Check that an update is not in its base weight now.

    Raises:
        ValueError: it is.
    """
    if layer.undo_merge is not None:
        raise ValueError(f"{op}: '{name}' must not be merged; call ardlora_ext.unmerge_adapter(model) first")
