"""The processes that train together: how many, which one is this, and whether they decide the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist

Group = Any  # a torch.distributed process group; None for all processes


def initialised() -> bool:
    """Tell whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def size() -> int:
    """Return the processes of the run: of its process group, else what a launcher announces in WORLD_SIZE."""
    return dist.get_world_size() if initialised() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, 0 without a process group."""
    return dist.get_rank() if initialised() else 0


def launched_rank() -> int:
    """Return the number of this process, before there is a process group what its launcher says in RANK."""
    return rank() if initialised() else int(os.environ.get("RANK", "0"))


@torch.no_grad()
def average(tensors: Sequence[torch.Tensor], group: Group = None) -> None:
    """Replace tensors by their means over the processes, in place: one all-reduce of one flat float32 buffer.

    Every process gives the same shapes in the same order, and gets the same bits.
    """
    if not initialised() or not tensors:
        return
    flat = torch.cat([t.reshape(-1).float() for t in tensors])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for t, mean in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        t.copy_(mean.view(t.shape))


def gather(value: Any) -> list[Any]:
    """Return the value of each process, in their order; with one process, its own."""
    if not initialised():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Return when every process has come here."""
    if initialised():
        dist.barrier()


def agree(what: str, plan: str, device: torch.device, group: Group = None) -> None:
    """Check that all processes hold the same `plan`, at the price of an all-reduce of 16 bytes.

    Raises:
        RuntimeError: they do not, on every process, with all the plans.
    """
    if not initialised() or dist.get_world_size(group) == 1:
        return
    digest = int.from_bytes(hashlib.sha256(plan.encode()).digest()[:7], "little")
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    if int(extremes[0]) == -int(extremes[1]):
        return
    plans: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(plans, plan, group)
    listed = "\n".join(f"process {i}: {text}" for i, text in enumerate(plans))
    raise RuntimeError(
        f"{what} must be the same on every process; are gradients reduced before the step? Got\n{listed}"
    )
