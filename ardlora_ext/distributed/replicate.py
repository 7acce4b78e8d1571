"""Data parallelism without DistributedDataParallel: gradients of what trains, averaged by live rows.

Adapters stay whole on every process: their gradients are averaged after each backward pass, live rows only, in one
all-reduce, before anything (clipping, scaler, controller) reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from ardlora_ext import processes
from ardlora_ext.model.inject import activate, rest
from ardlora_ext.model.record import Injection, Model, adapters, injection


class GradientSync:
    """Averages the gradients of what trains over the processes, after every backward pass outside `no_sync`.

    Attributes:
        group: the processes that hold the same adapters.
    """

    def __init__(self, model: nn.Module, group: processes.Group = None) -> None:
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
        seen = torch.tensor(
            [float(p.grad is not None) for p, _ in pairs], dtype=torch.float32, device=pairs[0][0].device
        )
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p, _ in pairs]
        live = [g[:rows] if g.dim() else g for g, (_, rows) in zip(gradients, pairs, strict=True)]
        processes.average([seen, *live], self.group)
        for (parameter, _), gradient, anywhere in zip(pairs, gradients, seen.tolist(), strict=True):
            parameter.grad = gradient if anywhere else None


def replicate(model: Model, group: processes.Group = None) -> Model:
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
    if not processes.initialised():
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
        rest("replicate", model)
        activate(model, record)


class _NoSync:
    """`model.no_sync`: that of the active adapter."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes only accumulate."""
        sync: GradientSync | None = injection(self.model).sync
        return nullcontext() if sync is None else sync.no_sync()
