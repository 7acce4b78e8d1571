"""What adapters do not reach: large parameters without one, and layers whose weight the model reads by itself."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ardlora_ext.config import AdapterConfig, DoraConfig
from ardlora_ext.layers.expert_stacks import Stack, expert_stacks
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.record import adapters
from ardlora_ext.model.saved_modules import inside

_NESTED = "_ardlora_use_nested_tensor"
_PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' 4-bit layers
_PACKED = "_ardlora_packs"
_SHARE = 0.01  # of the model, from which on a parameter without adapter is worth a word


def _called(_module: nn.Module, _args: Any) -> None:
    """Do nothing: a hook on a part of nn.TransformerEncoderLayer is what keeps it from its fused kernel."""


def close_fast_paths(model: nn.Module) -> None:
    """Let nn.TransformerEncoder call its layers in eval mode as in training, where adapters are in them.

    Its fused kernel reads `linear1.weight` itself, which is the base's, and would leave the adapter out without a word.
    bitsandbytes' 4-bit layers may not pack their weight for the CPU at the first evaluation: the product with packed
    weights has no gradient, so that what lies below would no longer be trained.
    """
    for module in model.modules():
        if getattr(module, _PACKS, False):
            vars(module).update({_PACKS: False, _PACKED: True})
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
        if vars(module).pop(_PACKED, False):
            vars(module)[_PACKS] = True


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


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Tell whether PEFT's rule for target_modules takes `name`: full name, dotted suffix, or one regex on all of it."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith("." + p) for p in patterns)


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output head that a model tells of."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def is_router(name: str, module: nn.Module, stacks: Mapping[str, Stack]) -> bool:
    """Tell whether a module chooses among experts: it says so, or its weight has a row for each, beside them."""
    if not stacks:
        return False
    if "router" in f"{name}.{type(module).__name__}".lower():
        return True
    block, weight = name.rpartition(".")[0], getattr(module, "weight", None)
    rows = None if weight is None else len(weight)
    return any(full.startswith(f"{block}.") and rows == stack.experts for full, stack in stacks.items())


def no_stacks(config: AdapterConfig) -> str | None:
    """Return what of a config has no form for stacks of experts, or None."""
    if isinstance(config, DoraConfig):
        return "DoRA"
    return f"init='{config.init}'" if config.init in ("pissa", "gradient") else None


def adaptable(stacks: Mapping[str, Stack], config: AdapterConfig) -> dict[str, nn.Module]:
    """Return the modules of the stacks that can have adapters, by the name of the parameter."""
    if no_stacks(config):
        return {}
    return {name: stack.module for name, stack in stacks.items() if not stack.quantised}


def say_uncovered(
    model: nn.Module, config: AdapterConfig, chosen: Mapping[str, nn.Module], saved: Sequence[str]
) -> None:
    """Warn of large parameters that no adapter covers; embeddings and output heads are left out by custom.

    Whoever named layers meant those: then of experts alone, which are no layers that could be named by their class.
    """
    stacks, modules = expert_stacks(model), dict(model.named_modules())
    covered = {id(stack.module._parameters[stack.parameter]) for name, stack in stacks.items() if name in chosen}
    covered |= {id(p) for name, m in chosen.items() if name not in stacks for p in m.parameters()}
    customary = [m for m in model.modules() if isinstance(m, nn.Embedding) or m is output_head(model)]
    kept = {id(p) for m in customary for p in m.parameters()}
    total = sum(p.numel() for p in model.parameters())
    excluded, everything = config.exclude_modules, config.target_modules == "all-linear"
    left = {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.numel() > _SHARE * total
        and p.ndim > 1
        and "embed" not in name.lower()
        and id(p) not in covered | kept
        and (name in stacks or (everything and not is_router(owner := name.rpartition(".")[0], modules[owner], stacks)))
        and not inside(name, saved)
        and not (excluded and any(matches(n, excluded) for n in (name, name.rpartition(".")[0])))
    }
    if not left:
        return
    why = "; train some whole by modules_to_save, or leave them out by exclude_modules"
    if quantised := [name for name in left if name in stacks and stacks[name].quantised]:
        why = f"; {listed(quantised)} hold codes, load the model without quantisation to adapt them"
    elif any(name in stacks for name in left):
        option = no_stacks(config)
        leaves = sorted({name.rpartition(".")[2] for name in left if name in stacks})
        why = f"; {option} has no form for experts" if option else f"; add {leaves} to target_modules to adapt them"
    warnings.warn(
        f"wrap: no adapter covers {100 * sum(left.values()) / total:.0f} % of the model's weights: "
        f"{listed(list(left))}{why}",
        stacklevel=4,
    )


def why_no_stacks(stacks: Mapping[str, Stack], config: AdapterConfig) -> str:
    """Return why stacks of experts are not among the layers that can be named, or nothing."""
    if not stacks:
        return ""
    if option := no_stacks(config):
        return f"; {option} has no form for experts"
    quantised = [name for name, stack in stacks.items() if stack.quantised]
    return f"; {listed(quantised)} hold codes: experts must not be quantised" if quantised else ""


def listed(names: Sequence[str]) -> str:
    """Return the first names and how many more there are."""
    return ", ".join(f"'{n}'" for n in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
