"""Which wrappers, and which arrangements of several processes, ranks can move in."""

from __future__ import annotations

from torch import nn

from ardlora_ext import processes
from ardlora_ext.config import LoraConfig
from ardlora_ext.model.record import adapters, injection
from ardlora_ext.model.targets import is_sharded

_SHARD = "keep adapters whole with ardlora_ext.fully_shard(model) (FSDP2)"
_DDP = "use DistributedDataParallel, or ardlora_ext.fully_shard(model) (FSDP2)"
_REFUSED = {
    "FullyShardedDataParallel": f"it flattens parameters (FSDP1); {_SHARD}",
    "DeepSpeedEngine": f"it flattens and partitions parameters or optimizer state; {_DDP}",
    "DataParallel": f"its replicas do not see rank changes; {_DDP}",
}


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, or the model itself.

    Raises:
        ValueError: the model is inside, or holds, a wrapper in which ranks cannot move.
    """
    for module in model.modules():
        for name in (kind.__name__ for kind in type(module).__mro__):
            if name in _REFUSED:
                raise ValueError(f"attach: model must not be inside {name}: {_REFUSED[name]}")
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    assert isinstance(inner, nn.Module)
    return inner


def check_placement(wrapper: nn.Module, model: nn.Module) -> None:
    """Check that the ranks of the active adapter of a model can move in this run.

    Args:
        wrapper: DistributedDataParallel around the model, or the model itself.
        model: the bare model.

    Raises:
        ValueError: adapters are sharded or the base is tensor-parallel, sizes would change under DDP, or another
            adapter was active when gradients were arranged to be averaged.
    """
    record, layers = injection(model), adapters(model)
    if wrapper is not model:
        known = {id(p) for p in getattr(wrapper, "_module_parameters", wrapper.parameters())}
        if any(id(p) not in known for layer in layers.values() for p in layer.trained.values()):
            raise ValueError(
                "attach: model must be inside DistributedDataParallel that was made while this adapter was active, got "
                "one that does not know its parameters; wrap the model anew after set_adapter"
            )
    elif record.sync is None and any(other.sync is not None for other in record.named.values()):
        raise ValueError(
            "attach: adapter must be replicated as the others are; call ardlora_ext.replicate(model) once more"
        )
    for name, layer in layers.items():
        if any(map(is_sharded, layer.trained.values())):
            raise ValueError(f"attach: adapters must not be sharded (FSDP2), got '{name}' sharded; {_SHARD}")
        if any(map(is_sharded, layer.base_layer.parameters())) and record.sync is None:
            raise ValueError(
                f"attach: base layers must be whole or sharded by FSDP2, got '{name}' as a DTensor of another kind "
                f"(tensor parallelism); {_SHARD}"
            )
    moves, count = not isinstance(record.config, LoraConfig), processes.size()
    if moves and count > 1 and record.sync is None and any(g.capacity == "elastic" for g in layers.values()):
        raise ValueError(
            f"attach: capacity must be 'fixed' with {count} processes, because DistributedDataParallel keeps "
            "the sizes it has seen, got 'elastic'; leave capacity at 'auto' and wrap in the launched process, or use "
            "ardlora_ext.replicate(model) in place of DistributedDataParallel"
        )


def check_running(model: nn.Module) -> None:
    """Check that no process will skip optimizer steps of this DDP model.

    Raises:
        ValueError: it is inside `join()`, which lets processes without data do so.
    """
    join = getattr(model, "_join_config", None)
    if join is not None and join.enable and not join.throw_on_early_termination:
        raise ValueError(
            "attach: model must not be inside join() without throw_on_early_termination=True, because a process that "
            "has run out of data takes no optimizer steps and its ranks stay behind; give every process as many "
            "batches (drop_last=True, DistributedSampler)"
        )
