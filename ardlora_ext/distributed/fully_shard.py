"""FSDP2 with whole adapters: the frozen base is sharded, what trains is replicated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ardlora_ext.distributed.replicate import replicate
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.record import Model, injection


def fully_shard(model: Model, modules: Sequence[nn.Module] | None = None, **options: Any) -> Model:
    """Shard the frozen weights over the processes with FSDP2 and `replicate` what trains.

    Memory for the base falls with the number of processes; adapters, `modules_to_save` and their optimizer state stay
    whole, so ranks move, checkpoints are written and read as on one process, whatever their number. Add adapters of
    other names before.

    Args:
        model: a wrapped model, on every process.
        modules: what is gathered and freed together, one after the other; None: the blocks (entries of a ModuleList)
            that hold adapters. The rest is sharded with the model itself.
        options: of `torch.distributed.fsdp.fully_shard`, e.g. `mesh`, `reshard_after_forward`, `mp_policy`.

    Returns:
        The same model, an `FSDPModule` now, with `no_sync`.

    Raises:
        ValueError: as `replicate`.

    Example:
        model = ard.fully_shard(ard.wrap(model, config))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        ard.attach(model, optimizer, total_steps=1000)
    """
    from torch.distributed.fsdp import fully_shard as shard

    mesh = options.get("mesh")
    replicate(model, None if mesh is None else mesh.get_group() if mesh.ndim == 1 else None)
    saved = {name for record in injection(model).named.values() for name in record.modules_to_save}
    whole = {p for p in model.parameters() if p.requires_grad}
    whole |= {p for name in saved for p in model.get_submodule(name).parameters()}
    parts: list[nn.Module] = [*(_blocks(model) if modules is None else modules), model]
    for module in parts:
        shard(module, ignored_params=whole, **options)
    model.register_forward_hook(_reshard_after_evaluation)
    return model


def _reshard_after_evaluation(model: Any, *_: object) -> None:
    """Free what FSDP2 keeps gathered for a backward pass that does not come.

    A state_dict frees it, too: one that the first process alone asks for, to save, would leave the processes apart.
    """
    if not torch.is_grad_enabled():
        model.reshard()


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the entries of ModuleLists that hold adapters, the outermost ones."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():  # parents first
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            blocks = [b for b in module if any(isinstance(m, LoraLinear) for m in b.modules())]
            found += blocks
            inside |= {id(m) for b in blocks for m in b.modules()}
    return found
