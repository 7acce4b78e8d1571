"""Add adapters to their base weights: for good (`merge`), or for a while (`merge_adapter` and `unmerge_adapter`)."""

from __future__ import annotations

import torch
from torch import nn

from ardlora_ext.layers.linear import Conv1D, LoraLinear, is_dense
from ardlora_ext.model.inject import remove
from ardlora_ext.model.record import Model, adapters, check_unmerged, injection
from ardlora_ext.model.targets import is_sharded


def merge(model: Model) -> Model:
    """Add every update of the active adapter to its base weight (float32 sum, cast back); take all adapters out.

    Raises:
        ValueError: a merged weight is not finite or a base has no floating-point weight; nothing is merged then.
    """
    injection(model)
    layers = adapters(model)
    for name, layer in layers.items():  # before anything changes
        _check_merge(model, name, layer)
    _check_tokens(model)
    for layer in layers.values():
        layer.merge()
    for rows in injection(model).tokens.values():
        rows.merge()
    return remove(model)


def _check_merge(model: nn.Module, name: str, layer: LoraLinear, finite: bool = True) -> None:
    """Check that an update can be added to its base weight, and (`finite`) that the sum will be a number.

    Raises:
        ValueError: it cannot.
    """
    check_unmerged("merge", name, layer)
    weight = getattr(layer.base_layer, "weight", None)
    if isinstance(weight, torch.Tensor) and is_sharded(weight):
        raise ValueError(
            f"merge: '{name}' must have a whole weight, got a shard of it (FSDP2); call "
            "ardlora_ext.save_pretrained(model, ...) and merge in one process"
        )
    if not is_dense(weight):
        kinds = [type(layer.base_layer).__name__, type(weight).__name__]
        raise ValueError(
            f"merge: '{name}' must have a plain floating-point weight, got {' with '.join(kinds)}; save the adapter "
            "and merge it into the model that was quantised"
        )
    if finite and not all(torch.isfinite(p).all() for p in layer.trained.values()):
        raise ValueError(f"merge: adapters must be finite, got NaN or Inf in '{name}'")
    if finite:
        layer.merged_weight()
    for other, parameter in model.named_parameters(remove_duplicate=False):
        owner = other.rpartition(".")[0]
        if parameter is weight and model.get_submodule(owner) is not layer.base_layer:
            raise ValueError(
                f"merge: '{name}' must not share its weight with '{owner}', which has no adapter; untie them"
            )


def _check_tokens(model: nn.Module) -> None:
    """Check that trained rows can be written into their embeddings; ValueError otherwise."""
    for name, rows in injection(model).tokens.items():
        if is_sharded(getattr(rows.base_layer, "weight")):  # noqa: B009
            raise ValueError(f"merge: '{name}' must have a whole weight, got a shard of it (FSDP2)")
        if not torch.isfinite(rows.token_rows).all():
            raise ValueError(f"merge: adapters must be finite, got NaN or Inf in '{name}'")


@torch.no_grad()
def merge_adapter(model: nn.Module, safe_merge: bool = True) -> None:
    """Add every update to its base weight (summed in float32, cast back once), in place and reversibly.

    Layers then compute what their base layer does, in `train` and `eval` alike, and their ranks and factors rest until
    `unmerge_adapter`. Layers merged already stay as they are.

    Args:
        model: a wrapped model.
        safe_merge: check first that every merged weight is finite. PEFT's default is not to.

    Raises:
        ValueError: a base has no floating-point weight, or shares it with a module without adapter, or (checked) a
            merged weight is not finite. Nothing is merged then.
    """
    injection(model)
    waiting = {name: layer for name, layer in adapters(model).items() if layer.undo_merge is None}
    for name, layer in waiting.items():
        _check_merge(model, name, layer, finite=safe_merge)
    _check_tokens(model)
    for layer in waiting.values():
        weight = _weight(layer)
        exact = weight.dtype == torch.float32 and type(layer) is LoraLinear
        undo = layer.fold() if exact else (weight.clone(),)
        weight.copy_(weight + (_update(layer, *undo) if exact else _placed(layer, layer.get_delta_weight())))
        layer.undo_merge = undo
    for rows in injection(model).tokens.values():
        rows.merge()


@torch.no_grad()
def unmerge_adapter(model: nn.Module) -> None:
    """Bring back the base weights that `merge_adapter` changed, in place; layers that are not merged stay.

    Float32 weights come back by subtracting what was added, to rounding. Those of lower precision, and of adapters that
    change more than a sum (DoRA), come back bit for bit from a copy that was kept.
    """
    injection(model)
    for layer in adapters(model).values():
        if layer.undo_merge is None:
            continue
        weight, undo = _weight(layer), layer.undo_merge
        weight.copy_(undo[0] if len(undo) == 1 else weight - _update(layer, *undo))
        layer.undo_merge = None
    for rows in reversed(injection(model).tokens.values()):  # of tied layers the first knows what was there
        rows.unmerge()


def _weight(layer: LoraLinear) -> torch.Tensor:
    weight: torch.Tensor = getattr(layer.base_layer, "weight").detach()  # noqa: B009 - mypy reads Tensor | Module
    return weight


def _update(layer: LoraLinear, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return B A in the layout of the base weight, float32."""
    return _placed(layer, b @ a)


def _placed(layer: LoraLinear, update: torch.Tensor) -> torch.Tensor:
    return update.T if isinstance(layer.base_layer, Conv1D) else update
