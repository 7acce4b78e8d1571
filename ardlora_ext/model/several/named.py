"""Several adapters on one model, by name: one is active, the others rest. Names and habits are PEFT's.

Every other function of the package means the active adapter: `attach`, `save_pretrained`, `save_state`, `merge` ...
Each adapter has its own layers, controller and `modules_to_save`; an optimizer made from `model.parameters()` holds
those of the adapter that is active then, and its ranks move only while that one is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import nn

from ardlora_ext.config import AdapterConfig
from ardlora_ext.model.inject import activate, as_before, detach, inject, rest
from ardlora_ext.model.peft.convert import PeftLoraConfig
from ardlora_ext.model.record import Injection, home, injection
from ardlora_ext.unbroken import nothing, unbroken, undone_by

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
    """Let `make` put a new adapter into the model and keep it at rest; the active one is back in any case.

    Whatever is raised, Ctrl-C included, nothing has changed then.
    """
    named = injection(model).named
    if not adapter_name or adapter_name in named:
        raise ValueError(f"{op}: adapter_name must be new, got {adapter_name!r} beside {list(named)}")
    part = home(model)
    with as_before(part) as keep:
        before = rest("add_adapter", part)
        make()
        new = rest("add_adapter", part)

        def added() -> None:
            new.named = named
            named[adapter_name] = new
            keep()

        activate(part, before, added)


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
        _switch("set_adapter", model, adapter_name)


def _switch(op: str, model: nn.Module, adapter_name: str, then: Callable[[], None] = nothing) -> None:
    """Make a resting adapter the active one; call `then` in the same piece."""
    part, other = home(model), injection(model).named[adapter_name]
    with as_before(part) as keep:

        def switched() -> None:
            then()
            keep()

        rest(op, part)
        activate(part, other, switched)


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

    def forget() -> None:
        detach(record.named.pop(adapter_name))

    if record.named[adapter_name] is not record:
        with unbroken():
            forget()
        return
    _switch("delete_adapter", model, others[0], forget)
    warnings.warn(f"delete_adapter: '{adapter_name}' was active; '{others[0]}' is now", stacklevel=2)


class disable_adapter:  # noqa: N801 - used as a function, as in PEFT
    """Compute with the plain base, frozen, and its own `modules_to_save`, inside a `with` block; blocks may nest.

    Raises:
        ValueError: the model is not wrapped, or is merged.

    Example:
        with torch.no_grad(), ard.disable_adapter(model):
            reference = model(**batch).logits
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._part = model, home(model)
        self._nested = any(_DISABLED in vars(module) for module in model.modules())
        self._flags: dict[nn.Parameter, bool] = {}
        self._way_back = undone_by(nothing) if self._nested else as_before(self._part, self._thaw)
        self._record: Injection | None = None

    def __enter__(self) -> None:
        if not self._nested:
            with self._way_back:
                self._record = rest("disable_adapter", self._part, self._freeze)

    def __exit__(self, *error: object) -> None:
        if self._record is not None:
            with self._way_back:
                with unbroken():
                    self._thaw()
                activate(self._part, self._record)

    def _freeze(self) -> None:
        setattr(self._part, _DISABLED, True)
        self._flags = {parameter: parameter.requires_grad for parameter in self._model.parameters()}
        self._model.requires_grad_(False)

    def _thaw(self) -> None:
        if vars(self._part).pop(_DISABLED, False):
            for parameter, flag in self._flags.items():
                parameter.requires_grad_(flag)
