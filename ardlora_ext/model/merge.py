"""Add adapters to their base weights: for good (`merge`), or for a while (`merge_adapter` and `unmerge_adapter`).

All of them or none: what may fail does so before the first weight changes. A weight cannot be brought back from its sum
bit for bit, and a copy of all would be a second model, so sums are formed one by one, in memory that is there from the
start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ardlora_ext.layers.experts import ExpertStack
from ardlora_ext.layers.linear import LoraLinear, is_dense
from ardlora_ext.model.inject import remove
from ardlora_ext.model.record import Model, adapters, check_unmerged, injection
from ardlora_ext.model.targets import is_sharded
from ardlora_ext.unbroken import unbroken

_Terms = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@torch.no_grad()
def merge(model: Model) -> Model:
    """Add every update of the active adapter to its base weight (float32 sum, cast back); take all adapters out.

    Ctrl-C is heard before the first weight changes or after the last.

    Raises:
        ValueError: a merged weight is not finite or a base has no floating-point weight; nothing is merged then.
    """
    injection(model)
    layers = adapters(model)
    terms, sums = _prepare(model, layers, finite=True)
    rows = [part.ready_to_merge() for part in injection(model).tokens.values()]
    with unbroken():
        for name, layer in layers.items():
            _weight(layer).copy_(sums.of(layer, terms[name]))
        for merge_rows in rows:
            merge_rows()
        return remove(model)


def _prepare(model: nn.Module, layers: Mapping[str, LoraLinear], finite: bool) -> tuple[dict[str, _Terms], _Sums]:
    """Check that layers can be merged, and make all that it takes."""
    for name, layer in layers.items():
        _check_merge(model, name, layer, finite)
    _check_tokens(model)
    terms = {name: layer.merge_terms() for name, layer in layers.items()}
    sums = _Sums(layers.values())
    for name, layer in layers.items() if finite else ():
        if not torch.isfinite(sums.of(layer, terms[name]).to(_weight(layer).dtype)).all():
            raise ValueError(f"merge: merged weight must be finite, got NaN or Inf in '{name}'")
    return terms, sums


class _Sums:
    """Merged weights, one at a time, in memory for the largest: once made, it allocates nothing."""

    def __init__(self, layers: Iterable[LoraLinear]) -> None:
        sizes: dict[torch.device, int] = {}
        for weight in map(_weight, layers):
            sizes[weight.device] = max(sizes.get(weight.device, 0), weight.numel())
        self._memory = {
            device: torch.empty(2, size, dtype=torch.float32, device=device) for device, size in sizes.items()
        }

    def update(self, layer: LoraLinear, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return B A [out_features, in_features] float32, of experts each its own, until the next call."""
        weight = _weight(layer)
        return torch.matmul(b, a, out=self._memory[weight.device][0, : weight.numel()].view(weight.shape))

    def of(self, layer: LoraLinear, terms: _Terms) -> torch.Tensor:
        """Return the merged weight [out_features, in_features] float32, until the next call."""
        a, b, scale = terms
        weight, total = _weight(layer), self.update(layer, a, b)
        total += self._memory[weight.device][1, : weight.numel()].view(weight.shape).copy_(weight)
        return total if scale is None else total.mul_(scale[:, None])


def _check_merge(model: nn.Module, name: str, layer: LoraLinear, finite: bool) -> None:
    """Check that an update can be added to its base weight, and (`finite`) that it is a number.

    Raises:
        ValueError: it cannot.
    """
    check_unmerged("merge", name, layer)
    weight = getattr(layer, "weight", None)
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
    for other, parameter in model.named_parameters(remove_duplicate=False):
        owner = other.rpartition(".")[0]
        if parameter is weight and model.get_submodule(owner) is not layer.base_layer:
            adapted = owner.removesuffix(".base_layer")
            has = "has no adapter" if adapted == owner else "has an adapter of its own"
            raise ValueError(
                f"merge: '{name}' must not share its weight with '{adapted}', which {has}; give one of them a weight "
                "of its own (layer.weight = nn.Parameter(layer.weight.detach().clone())) and merge then"
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
    `unmerge_adapter`. Layers merged already stay as they are. Ctrl-C is heard before the first weight changes or after
    the last.

    Args:
        model: a wrapped model.
        safe_merge: check first that every merged weight is finite. PEFT's default is not to.

    Raises:
        ValueError: a base has no floating-point weight, or shares it with a module without adapter, or (checked) a
            merged weight is not finite. Nothing is merged then.
    """
    injection(model)
    waiting = {name: layer for name, layer in adapters(model).items() if layer.undo_merge is None}
    terms, sums = _prepare(model, waiting, safe_merge)
    undo: dict[str, tuple[torch.Tensor, ...]] = {}
    for name, layer in waiting.items():
        exact = _weight(layer).dtype == torch.float32 and type(layer) in (LoraLinear, ExpertStack)
        undo[name] = terms[name][:2] if exact else (_weight(layer).clone(),)
    rows = [part.ready_to_merge() for part in injection(model).tokens.values()]
    with unbroken():
        for name, layer in waiting.items():
            _weight(layer).copy_(sums.of(layer, terms[name]))
            layer.undo_merge = undo[name]
        for merge_rows in rows:
            merge_rows()


@torch.no_grad()
def unmerge_adapter(model: nn.Module) -> None:
    """Bring back the base weights that `merge_adapter` changed, in place; layers that are not merged stay.

    Float32 weights come back by subtracting what was added, to rounding. Those of lower precision, and of adapters that
    change more than a sum (DoRA), come back bit for bit from a copy that was kept. All do, or none.
    """
    injection(model)
    merged = [layer for layer in adapters(model).values() if layer.undo_merge is not None]
    rows = [part.ready_to_unmerge() for part in injection(model).tokens.values()]
    sums = _Sums(layer for layer in merged if layer.undo_merge is not None and len(layer.undo_merge) > 1)
    with unbroken():
        for layer in merged:
            undo: tuple[torch.Tensor, ...] = layer.undo_merge  # type: ignore[assignment]
            if len(undo) == 1:
                _weight(layer).copy_(undo[0])
            else:
                _weight(layer).sub_(sums.update(layer, *undo))
            layer.undo_merge = None
        for unmerge_rows in rows:
            unmerge_rows()


def _weight(layer: LoraLinear) -> torch.Tensor:
    """Return the base weight as [out_features, in_features], with a leading axis of experts if there is one."""
    return layer.placed(layer.weight.detach())
