"""Several adapters on one model, by name: one is active, the others rest. Names and habits are PEFT's.

Every other function of the package means the active adapter: `attach`, `save_pretrained`, `save_state`, `merge` ...
Each adapter has its own layers, controller and `modules_to_save`; an optimizer made from `model.parameters()` holds
those of the adapter that is active then, and its ranks move only while that one is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from ardlora_ext.config import AdapterConfig
from ardlora_ext.model.inject import activate, detach, inject, rest
from ardlora_ext.model.peft.convert import PeftLoraConfig
from ardlora_ext.model.record import home, injection

_DISABLED = "_ardlora_disabled"  # marks a model whose adapter rests for a while


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters, in the order they were added."""
    return list(injection(model).named)


def active_adapter(model: nn.Module) -> str:
    """Return the name of the adapter that is in the model."""
    record = injection(model)
    return next(name for name, other in record.named.items() if other is record)


def add_adapter(model: nn.Module, adapter_name: str, config: AdapterConfig | PeftLoraConfig) -> None:
    """Add an adapter that rests until `set_adapter`, in place.

    Args:
        model: a wrapped model.
        adapter_name: not in use yet.
        config: of any method; its targets may differ from those of the others.

    Raises:
        ValueError: the name is in use, adapters are merged, or `wrap` refuses the config; nothing has changed then.
    """
    add_resting(model, "add_adapter", adapter_name, lambda: inject(model, config, adapter_name))


def add_resting(model: nn.Module, op: str, adapter_name: str, make: Callable[[], object]) -> None:
    """Let `make` put a new adapter into the model and keep it at rest; the active one is back in any case."""
    named = injection(model).named
    if not adapter_name or adapter_name in named:
        raise ValueError(f"{op}: adapter_name must be new, got {adapter_name!r} beside {list(named)}")
    part = home(model)
    before = rest(part)
    try:
        make()
        new = rest(part)
    finally:
        activate(part, before)
    new.named = named
    named[adapter_name] = new


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Make another adapter the active one, in place. Values, ranks and optimizer states stay bit for bit.

    Raises:
        ValueError: there is no such adapter, or the active one is merged.
    """
    record = injection(model)
    if not isinstance(adapter_name, str):
        raise ValueError(
            f"set_adapter: adapter_name must be one name, got {adapter_name!r}; add_weighted_adapter(model, names, "
            'weights, new_name, "cat") makes one adapter that computes the sum of several'
        )
    if adapter_name not in record.named:
        raise ValueError(f"set_adapter: adapter_name must be one of {list(record.named)}, got {adapter_name!r}")
    if record.named[adapter_name] is not record:
        part = home(model)
        rest(part)
        activate(part, record.named[adapter_name])


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Forget an adapter. If it is active, the first of the others becomes active, with a warning as in PEFT.

    Raises:
        ValueError: there is no such adapter, it is merged, or it is the only one (`unwrap` takes that out).
    """
    record = injection(model)
    others = [name for name in record.named if name != adapter_name]
    if len(others) == len(record.named):
        raise ValueError(f"delete_adapter: adapter_name must be one of {others}, got {adapter_name!r}")
    if not others:
        raise ValueError(
            f"delete_adapter: '{adapter_name}' must not be the only adapter; use ardlora_ext.unwrap(model)"
        )
    if record.named[adapter_name] is record:
        set_adapter(model, others[0])
        warnings.warn(f"delete_adapter: '{adapter_name}' was active; '{others[0]}' is now", stacklevel=2)
    detach(record.named.pop(adapter_name))


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Compute with the plain base, frozen, and its own `modules_to_save`, inside a `with` block; blocks may nest.

    Raises:
        ValueError: the model is not wrapped, or is merged.

    Example:
        with torch.no_grad(), ard.disable_adapter(model):
            reference = model(**batch).logits
    """
    if any(_DISABLED in vars(module) for module in model.modules()):  # inside another block
        yield
        return
    part = home(model)
    record = rest(part)
    setattr(part, _DISABLED, True)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        delattr(part, _DISABLED)
        activate(part, record)
