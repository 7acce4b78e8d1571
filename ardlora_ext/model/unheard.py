"""Adapters that the model does not use: what computes with a layer's weight by itself never calls the layer."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from typing import Any

from torch import nn

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.record import adapters

_NESTED = "_ardlora_use_nested_tensor"


def _called(_module: nn.Module, _args: Any) -> None:
    """Do nothing: a hook on a part of nn.TransformerEncoderLayer is what keeps it from its fused kernel."""


def close_fast_paths(model: nn.Module) -> None:
    """Let nn.TransformerEncoder call its layers in eval mode as in training, where adapters are in them.

    Its fused kernel reads `linear1.weight` itself, which is the base's, and would leave the adapter out without a word.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            continue
        layers = [part for part in module.modules() if isinstance(part, LoraLinear)]
        for layer in layers:
            if _called not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(_called)
        if layers and getattr(module, "use_nested_tensor", False):  # the encoder's half of that path
            setattr(module, _NESTED, True)
            module.use_nested_tensor = False


def open_fast_paths(model: nn.Module) -> None:
    """Undo `close_fast_paths` once no adapter is in the model; the hooks left with the adapters."""
    for module in model.modules():
        if vars(module).pop(_NESTED, False):
            module.use_nested_tensor = True  # type: ignore[assignment]


def unheard(model: nn.Module) -> list[str]:
    """Return the adapters without a gradient after a backward pass that reached others.

    One of several numbered alike (an expert no token went to, a layer that was dropped) is heard when another was.
    """
    got: dict[str, bool] = {}
    layers = adapters(model)
    kinds = {name: re.sub(r"\d+", "*", name) for name in layers}
    for name, layer in layers.items():
        has = any(p.grad is not None for p in layer.trained.values())
        got[kinds[name]] = got.get(kinds[name], False) or has
    return [name for name in layers if not got[kinds[name]]] if any(got.values()) else []


def warn_unheard(model: nn.Module) -> None:
    """Name the adapters that the first step does not train; for a pre-step hook, where gradients are whole."""
    if names := unheard(model):
        warnings.warn(
            f"attach: no gradient reached {_parts(names, list(adapters(model)))}: the model did not call these layers "
            "(no image in the batch?), or reads their weight itself (as a fused loss does with lm_head); what is never "
            "trained, name in exclude_modules",
            stacklevel=3,
        )


def _parts(names: list[str], all_names: list[str]) -> str:
    """Return names in few words: a part of the model of which no adapter is heard, then layers numbered alike."""
    missed, counts = set(names), Counter[str]()
    for name in names:
        path = name.split(".")
        prefixes = [".".join(path[:n]) for n in range(1, len(path))]
        whole = next((p for p in prefixes if all(n in missed for n in all_names if n.startswith(p + "."))), None)
        counts[re.sub(r"\d+", "*", name) if whole is None else re.sub(r"\d+", "*", whole)] += 1
    said = [kind if count == 1 else f"{kind}' ({count} of them)" for kind, count in counts.items()]
    shown = ", ".join(f"'{text}" if text.endswith(")") else f"'{text}'" for text in said[:4])
    return f"the adapters of {shown}" + (f" and {len(said) - 4} more kinds" if len(said) > 4 else "")
