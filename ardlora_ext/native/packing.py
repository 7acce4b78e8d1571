"""Layers that read the same tensor (q, k and v; gate and up) add up its gradient in one buffer.

Autograd would have each of them return a dx [M, K] and add these up. Here all of them read one alias of x, and in
backward each accumulates its dy W and its adapter's part into the alias's sum, in place. Outputs are the same bits;
dx is summed in another order. Nothing is decided ahead: whoever is called with the same tensor shares it. On the CPU
this pays in float32 alone (docs/performance.md).
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import torch

_NO_PASS = -1  # the number of a graph task that does not exist


class GradientSum:
    """The gradient of one alias in one backward pass. A sum that another pass left behind counts as nothing."""

    def __init__(self) -> None:
        self._pass = _NO_PASS
        self._sum: torch.Tensor | None = None

    @property
    def value(self) -> torch.Tensor | None:
        """What this pass has added so far; nodes may add to it in place."""
        return self._sum if self._pass == torch._C._current_graph_task_id() else None

    def add(self, gradient: torch.Tensor) -> None:
        """Add a gradient, which is kept and changed later."""
        so_far = self.value
        self._sum = gradient if so_far is None else so_far.add_(gradient)
        self._pass = torch._C._current_graph_task_id()

    def take(self) -> torch.Tensor | None:
        """Return the sum and forget it."""
        found, self._sum, self._pass = self.value, None, _NO_PASS
        return found


class _Alias(torch.autograd.Function):
    """x itself, as a tensor whose readers leave its gradient in a `GradientSum`, or give it to autograd, or both."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, total: GradientSum) -> torch.Tensor:
        ctx.total = total
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        total, given = ctx.total.take(), grad[0]
        return (total if given is None else given if total is None else total + given), None


class Reader(Protocol):
    """A layer that may share what it reads."""

    readers: Readers | None


class _Last(threading.local):
    """What one thread has read last: threads that share a model share no sums."""

    x: weakref.ref[torch.Tensor] | None = None
    alias: weakref.ref[torch.Tensor] | None = None
    key: tuple[Any, ...] = ()
    total: GradientSum | None = None
    alone: Reader | None = None  # who read it, while nobody else has


class Readers:
    """What layers with the same parent and input size share: the last tensor that one of them has read.

    It holds no tensor alive: the alias lives as long as the graph of a layer that saved it. Where nothing is saved
    (activation checkpointing, offloading) each layer has an alias of its own. A layer whose tensor nobody else has
    read leaves: by itself it computes the same bits without an alias.
    """

    def __init__(self) -> None:
        self._last = _Last()

    def __reduce__(self) -> tuple[type[Readers], tuple[()]]:
        """A copy has read nothing yet."""
        return Readers, ()

    def read(self, x: torch.Tensor, reader: Reader) -> tuple[torch.Tensor, GradientSum | None]:
        """Return the alias of x and where its gradient is summed, or x itself and None where no gradient is due."""
        if not x.requires_grad or not _can_share(x):
            return x, None
        if x.is_cpu and x.dtype != torch.float32:  # their products in place cost more there than the sums they save
            return x, None
        # In-place changes make x another tensor; streams order backward passes that share memory.
        key = x._version, torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0
        alias, last = self._known(x, key, reader), self._last
        if alias is None:
            last.total = GradientSum()
            alias = _Alias.apply(x, last.total)  # type: ignore[no-untyped-call]
            last.alias = weakref.ref(alias)
        return alias, last.total

    def cast(self, x: torch.Tensor, dtype: torch.dtype, reader: Reader) -> torch.Tensor:
        """Return x in another dtype; layers that read the same x share one copy, which is kept for backward once."""
        if not _can_share(x) or x.is_inference():
            return x.to(dtype)
        copy = self._known(x, (x._version, dtype), reader)
        if copy is None:
            copy = x.to(dtype)
            self._last.alias = weakref.ref(copy)
        return copy

    def _known(self, x: torch.Tensor, key: tuple[Any, ...], reader: Reader) -> torch.Tensor | None:
        """Return what stands for x, if it is what was read last and still alive; take note of x."""
        last = self._last
        if last.x is not None and last.x() is x and key == last.key:
            if last.alone is not reader:
                last.alone = None
            return None if last.alias is None else last.alias()
        if last.alone is not None:
            last.alone.readers = None
        last.x, last.alias, last.key, last.alone = weakref.ref(x), None, key, reader
        return None


def _can_share(x: torch.Tensor) -> bool:
    """Tell whether a graph is being built of x, and nobody but us looks at the operations."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return type(x) in (torch.Tensor, torch.nn.Parameter) and not torch._C._len_torch_dispatch_stack()
