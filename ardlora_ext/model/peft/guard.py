"""Adapters on adapters: ours on PEFT's, and PEFT's on ours, are refused with the way that works."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

from ardlora_ext.layers.linear import LoraLinear

_TUNERS = "peft.tuners.tuners_utils"


def check_foreign(model: nn.Module) -> None:
    """Refuse adapters on PEFT's: they would adapt its factors, and freeze them.

    Raises:
        ValueError: there are such.
    """
    if any(type(module).__module__.startswith("peft.tuners.") for module in model.modules()):
        raise ValueError(
            f"wrap: model must not have PEFT adapters, got {type(model).__name__}; continue a saved one with "
            "ardlora_ext.load_peft(base_model, directory), or call model.merge_and_unload() first; with TRL, leave out "
            "peft_config"
        )


def guard_from_peft() -> None:
    """Let PEFT, where it is loaded, refuse a model of ours by a sentence instead of by the print of its first layer.

    TRL's trainers, transformers' `add_adapter` and `get_peft_model` all come to this one method.
    """
    tuner = getattr(sys.modules.get(_TUNERS), "BaseTuner", None)
    inject = getattr(tuner, "inject_adapter", None)
    if tuner is None or inject is None or hasattr(inject, "__wrapped__"):
        return

    @functools.wraps(inject)
    def checked(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, LoraLinear) for module in model.modules()):
            raise ValueError(
                "get_peft_model: model must not have adapters of ardlora_ext already; with TRL, leave out peft_config "
                "and pass callbacks=[ardlora_ext.RankCallback()]; else call ardlora_ext.unwrap(model) first"
            )
        return inject(self, model, *args, **kwargs)

    tuner.inject_adapter = checked
