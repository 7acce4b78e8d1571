"""`trainable_token_indices`: which layers of a model get trained rows, and what is tied to them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ardlora_ext.config import AdapterConfig
from ardlora_ext.layers.tokens import TokenRows, has_rows, start_rows
from ardlora_ext.model.saved_modules import inside, new_modules


class TokenPlan(NamedTuple):
    """Rows of one matrix that train: its name first, then what is tied to it, and the rows."""

    names: tuple[str, ...]
    indices: tuple[int, ...]


def plan_tokens(
    model: nn.Module, config: AdapterConfig, adapted: Iterable[str], saved: Iterable[str]
) -> list[TokenPlan]:
    """Return the matrices of which rows will train; nothing changes.

    Args:
        model: the base.
        config: its `trainable_token_indices` by name, or for the input embeddings.
        adapted: names of the layers that get adapters.
        saved: `modules_to_save`.

    Raises:
        ValueError: no such layer, an index out of range, tied layers with different rows, or a layer that trains
            otherwise already.
    """
    asked, op = config.trainable_token_indices, "wrap: trainable_token_indices"
    if not asked:
        return []
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    wanted: dict[str, tuple[int, ...]] = {}
    for key, indices in (asked if isinstance(asked, Mapping) else {_input_embeddings(model, op): asked}).items():
        found = [name for name in modules if name == key or name.endswith(f".{key}")]
        if not found:
            kinds = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
            raise ValueError(f"{op} must name an embedding of the model, got {key!r}; there are {kinds}")
        wanted |= dict.fromkeys(found, tuple(indices))
    plans: dict[int, TokenPlan] = {}
    for name, indices in wanted.items():
        layer = modules[name]
        if not has_rows(layer):
            raise ValueError(f"{op} must name embeddings of plain numbers, got '{name}', a {type(layer).__name__}")
        weight: torch.Tensor = getattr(layer, "weight")  # noqa: B009 - typed as Tensor | Module
        if max(indices) >= len(weight):
            raise ValueError(f"{op} of '{name}' must be below {len(weight)}, got {max(indices)}")
        tied = [n for n, m in modules.items() if n != name and getattr(m, "weight", None) is weight]
        plan = plans.setdefault(id(weight), TokenPlan((name, *tied), indices))
        if plan.indices != indices:
            raise ValueError(
                f"{op} must be the same for '{plan.names[0]}' and '{name}', which share their weight, got "
                f"{list(plan.indices)} and {list(indices)}"
            )
        for other in plan.names:
            if inside(other, list(saved)):
                raise ValueError(
                    f"{op} must not name '{other}', which modules_to_save keeps whole; leave one of them out"
                )
            if other in set(adapted):
                raise ValueError(f"{op} must not name '{other}', which target_modules adapts; exclude it there")
    return list(plans.values())


def _input_embeddings(model: nn.Module, op: str) -> str:
    """Return the name of the input embeddings, as PEFT does where rows are given without a name."""
    getter = getattr(model, "get_input_embeddings", None)
    layer = getter() if callable(getter) else None
    found = next((name for name, module in model.named_modules() if module is layer), None)
    if found is None and layer is None:
        embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        raise ValueError(f"{op} must name the embeddings of a model that does not tell them, e.g. {embeddings[:3]}")
    return found or "embed_tokens"


def say_new_rows(model: nn.Module, plans: Iterable[TokenPlan], saved: Iterable[str]) -> None:
    """Warn of rows that the embeddings were given after the model was loaded, and that would never train."""
    getter = getattr(model, "get_input_embeddings", None)
    config: Any = getattr(model, "config", None)
    loaded = bool(getattr(config, "_name_or_path", None))
    layer = getter() if loaded and callable(getter) else None
    name = next((n for n, m in model.named_modules() if m is layer), "")
    if name in new_modules(model):  # said already: the whole of it is not as in the checkpoint
        return
    then = _checkpoint_rows(config) if name else None
    weight: Any = getattr(layer, "weight", None)
    if then is None or not isinstance(weight, torch.Tensor) or len(weight) <= then or inside(name, list(saved)):
        return
    left = set(range(then, len(weight))) - {i for plan in plans if name in plan.names for i in plan.indices}
    if left:
        first, last = min(left), max(left)
        warnings.warn(
            f"wrap: rows {first} to {last} of '{name}' are not in the checkpoint and stay frozen as they were drawn; "
            f"train them by trainable_token_indices=range({first}, {last + 1}), or the whole by "
            f"modules_to_save=['{name.rpartition('.')[2]}']",
            stacklevel=4,
        )


def _checkpoint_rows(config: Any) -> int | None:
    """Return how many tokens the checkpoint knew that a model was loaded from, as far as it is on this machine."""
    try:
        found, _ = type(config).get_config_dict(config._name_or_path, local_files_only=True)
    except Exception:  # no such folder, or nothing of it in the cache
        return None
    part = found if "vocab_size" in found else found.get("text_config")
    rows = part.get("vocab_size") if isinstance(part, dict) else None
    return rows if isinstance(rows, int) else None


def token_layers(model: nn.Module, plans: Iterable[TokenPlan], config: AdapterConfig) -> dict[str, TokenRows]:
    """Return the layers to put into the model, by the name of what they take the place of."""
    found: dict[str, TokenRows] = {}
    dtype = torch.float32 if config.adapter_dtype == "float32" else None
    for plan in plans:
        rows = start_rows(model.get_submodule(plan.names[0]), plan.indices, dtype)
        made: dict[int, TokenRows] = {}  # a module with two names gets one layer
        for name in plan.names:
            layer = model.get_submodule(name)
            found[name] = made.setdefault(id(layer), TokenRows(layer, plan.indices, rows))
    return found


def own_rows(tokens: Mapping[str, TokenRows]) -> dict[str, TokenRows]:
    """Return one layer for each matrix, the first by name: those that are tied to it hold the same rows."""
    found: dict[int, tuple[str, TokenRows]] = {}
    for name, layer in tokens.items():
        found.setdefault(id(layer.token_rows), (name, layer))
    return dict(found.values())
