"""Copies between the host and a device that nothing waits for: the stream makes them in its turn, in pinned memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Fetched", "sent"]


def sent(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return a copy on the device, complete for what is queued on the current stream from now on."""
    held = torch.from_numpy(np.ascontiguousarray(values))
    return (held.pin_memory() if device.type == "cuda" else held).to(device, non_blocking=True)


class Fetched:
    """What tensors hold now, on its way to the host.

    Attributes:
        there: whether all of them were on the host, where they stay what they are: not to be changed until read.
    """

    __slots__ = ("_copies", "_tensors", "there")

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, tensor in enumerate(tensors):
            if not tensor.is_cpu:
                places.setdefault((tensor.device, tensor.dtype), []).append(i)
        self.there = not places
        self._copies = [(i, _queued(torch.cat([tensors[k].reshape(-1) for k in i]))) for i in places.values()]

    def values(self) -> list[torch.Tensor]:
        """Return them on the host; waits until the device has come to where they were asked for."""
        for numbers, (flat, copied) in self._copies:
            if copied is not None:
                copied.synchronize()
            parts = torch.split(flat, [self._tensors[i].numel() for i in numbers])
            for i, part in zip(numbers, parts, strict=True):
                self._tensors[i] = part.view(self._tensors[i].shape)
        self._copies = []
        return self._tensors


def _queued(flat: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return a copy on the host, and the event after which it is complete."""
    if flat.device.type != "cuda":
        return flat.cpu(), None
    copy = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=True)
    copy.copy_(flat, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(flat.device))
    return copy, done
