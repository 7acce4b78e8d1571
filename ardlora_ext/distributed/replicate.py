"""Data parallelism: which wrappers ranks can move in, and FSDP2 with whole adapters.

DDP reduces gradients itself. Where the base is sharded, what trains stays whole on every process: its gradients are
averaged after each backward pass, live rows only, in one all-reduce, before anything (clipping, scaler, controller)
reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from ardlora_ext import world
from ardlora_ext.config import LoraConfig
from ardlora_ext.inject import Injection, activate, adapters, injection, rest
from ardlora_ext.layers import LoraLinear
from ardlora_ext.targets import is_sharded

Model = TypeVar("Model", bound=nn.Module)

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
    moves = not isinstance(record.config, LoraConfig)
    if moves and world.size() > 1 and record.sync is None and any(g.capacity == "elastic" for g in layers.values()):
        raise ValueError(
            f"attach: capacity must be 'fixed' with {world.size()} processes, because DistributedDataParallel keeps "
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


class GradientSync:
    """Averages the gradients of what trains over the processes, after every backward pass outside `no_sync`.

    Attributes:
        group: the processes that hold the same adapters.
    """

    def __init__(self, model: nn.Module, group: world.Group = None) -> None:
        self.group = group
        self.layers = list(adapters(model).values())
        factors = {id(p) for layer in self.layers for p in layer.factors.values()}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.others = [p for p in self.parameters if id(p) not in factors]
        self._active = True
        self._backward = -1  # the one whose end will average
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            for p in self.parameters
        ]

    def __deepcopy__(self, _memo: dict[int, object]) -> GradientSync:
        """A copied model has parameters without hooks: nothing to copy."""
        return copy.copy(self)

    def detach(self) -> None:
        """Average no more."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backward passes inside only accumulate, as DDP's context of this name does."""
        before, self._active = self._active, False
        try:
            yield
        finally:
            self._active = before

    def _arrived(self, _parameter: torch.Tensor) -> None:
        task = torch._C._current_graph_task_id()  # not a flag: a pass that fails never comes to its end
        if self._active and self._backward != task:
            self._backward = task
            torch.autograd.Variable._execution_engine.queue_callback(self._reduce)

    def _rows(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Yield every trained parameter with its live rows; gradients of the others are zero."""
        for layer in self.layers:
            a_rows, b_rows = layer.layout.rows(layer.ranks)
            live = {"lora_A": a_rows, "lora_B": b_rows, "lora_E": sum(layer.ranks)}
            for name, parameter in layer.factors.items():
                if parameter.requires_grad:
                    yield parameter, live[name]
        for parameter in self.others:
            yield parameter, len(parameter) if parameter.dim() else 1

    @torch.no_grad()
    def _reduce(self) -> None:
        pairs = list(self._rows())
        seen = torch.tensor([float(p.grad is not None) for p, _ in pairs], device=pairs[0][0].device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p, _ in pairs]
        live = [g[:rows] if g.dim() else g for g, (_, rows) in zip(gradients, pairs, strict=True)]
        world.average([seen, *live], self.group)
        for (parameter, _), gradient, anywhere in zip(pairs, gradients, seen.tolist(), strict=True):
            parameter.grad = gradient if anywhere else None


def replicate(model: Model, group: world.Group = None) -> Model:
    """Train the same adapters on every process: start from those of the first, average gradients in each backward.

    All adapters that the model has by name; for those added later, call it again.

    Does for a wrapped model what DistributedDataParallel does, in one all-reduce of the live rows per backward pass, so
    that what is sent follows the ranks. Parameters may change their sizes: `capacity="elastic"` works. Accumulate
    inside `model.no_sync()`.

    Args:
        model: a wrapped model, on every process.
        group: the processes; None for all of them.

    Returns:
        The same model, with `no_sync`.

    Raises:
        ValueError: the model is not wrapped, already replicated, or there is no process group.
    """
    active = injection(model)
    if not world.initialised():
        raise ValueError("replicate: a process group must be there; call torch.distributed.init_process_group() first")
    missing = [record for record in active.named.values() if record.sync is None]
    if not missing:
        raise ValueError("replicate: model must not be replicated already")
    first = 0 if group is None else dist.get_global_rank(group, 0)
    for record in missing:
        _exchange(model, record)
        with torch.no_grad():
            for tensor in [*(p for p in model.parameters() if p.requires_grad), *model.buffers()]:
                dist.broadcast(tensor.detach(), first, group)
        record.sync = GradientSync(model, group)
    _exchange(model, active)
    setattr(model, "no_sync", _NoSync(model))  # noqa: B010 - where Accelerate looks for it, too
    return model


def _exchange(model: nn.Module, record: Injection) -> None:
    """Make the adapter of `record` the active one."""
    if injection(model) is not record:
        rest(model)
        activate(model, record)


class _NoSync:
    """`model.no_sync`: that of the active adapter."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes only accumulate."""
        sync: GradientSync | None = injection(self.model).sync
        return nullcontext() if sync is None else sync.no_sync()


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
    return model


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
