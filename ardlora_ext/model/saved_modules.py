"""`modules_to_save`: what of a model trains and is kept whole beside the adapters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from ardlora_ext.layers.linear import is_dense

HEADS = ("classifier", "score")  # transformers' names of classification heads, as in PEFT

# Ends of the names of transformers' classes whose head belongs to a task, not to the pretrained model.
_TASKS = (
    "Classification",
    "QuestionAnswering",
    "MultipleChoice",
    "XVector",
    "Segmentation",
    "ObjectDetection",
    "DepthEstimation",
)
_LOADED = "_is_hf_initialized"  # what transformers leaves on a parameter that a checkpoint had


def inside(name: str, parents: Sequence[str]) -> bool:
    """Tell whether a module or parameter is one of `parents` or in one."""
    return any(name == p or name.startswith(p + ".") for p in parents)


def heads(model: nn.Module) -> list[str]:
    """Return the head of a transformers model for a task, and what `from_pretrained` found in no checkpoint.

    Warns of what is random and cannot be one of `modules_to_save` by itself.
    """
    base = getattr(model, "base_model", None)
    found = []
    if type(model).__name__.endswith(_TASKS):
        found = [name for name, module in model.named_modules() if name in HEADS and _has_own(module)]
        if isinstance(base, nn.Module) and base is not model and _asked(model, "get_output_embeddings") is None:
            found += [name for name, child in model.named_children() if child is not base and _has_own(child)]
    embeddings = {id(_asked(model, f"get_{end}_embeddings")) for end in ("input", "output")}
    for name in new_modules(model):
        if inside(name, found):
            continue
        if id(model.get_submodule(name)) in embeddings:
            _warn(
                f"'{name}' is not as in the checkpoint and stays frozen, so its random values "
                f"are in no adapter; train and keep it by modules_to_save=['{name.rpartition('.')[2]}']"
            )
        elif name:
            found.append(name)
        else:
            _warn(f"{type(model).__name__} has parameters of its own that its checkpoint lacks; they stay random")
    return found


def new_modules(model: nn.Module) -> list[str]:
    """Return the modules that own a parameter which is random because the checkpoint lacked it.

    None where that is not known: for a model made from a config, and for transformers before 5.
    """
    flags = {id(p): bool(getattr(p, _LOADED, False)) for p in model.parameters()}
    if not any(flags.values()):
        return []
    return [
        name
        for name, module in model.named_modules()
        if any(not flags[id(p)] and is_dense(p) for p in module.parameters(recurse=False))
    ]


def _warn(message: str) -> None:
    warnings.warn(f"wrap: {message}", stacklevel=6)  # of whoever called `wrap`


def with_tied(model: nn.Module, saved: Sequence[str]) -> tuple[str, ...]:
    """Add what shares a parameter with a saved module (a tied head): it trains with it, and loaders untie them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    ids = {id(p) for name in saved for p in modules[name].parameters()}
    tied = [
        name
        for name, module in modules.items()
        if name and not inside(name, saved) and any(id(p) in ids for p in module.parameters(recurse=False))
    ]
    return tuple(dict.fromkeys([*saved, *tied]))


def _has_own(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _asked(model: nn.Module, name: str) -> nn.Module | None:
    """Return what a transformers model says of itself; some raise where they have none."""
    getter = getattr(model, name, None)
    try:
        found = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
