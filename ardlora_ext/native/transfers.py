"""Between the host and a device, without waiting: copies that the stream makes in its turn, in pinned memory.

Small tables of integers that kernels read are copied once and kept by content; another stream waits for a table once.
A table is given back only where no kernel and no captured graph can still read it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["DeviceTables", "Fetched", "is_capturing", "sent"]


def sent(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return a copy on the device, there for all that is queued on the current stream; on the host the array itself."""
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


def is_capturing() -> bool:
    """Tell whether the current CUDA stream is being captured in a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _copied(words: NDArray[Any], device: torch.device) -> tuple[torch.Tensor, Any]:
    """Return a copy and the event after which other streams may read it."""
    copy = sent(words, device)
    return copy, torch.cuda.current_stream(device).record_event() if copy.is_cuda else None


class _Copy:
    __slots__ = ("complete", "streams", "words")

    def __init__(self, words: torch.Tensor, complete: Any, stream: int) -> None:
        self.words, self.complete, self.streams = words, complete, {stream}


class DeviceTables:
    """The copies of one kind of table, at most `limit` of them beside those that captured graphs read."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[Hashable, _Copy] = OrderedDict()
        self._captured: dict[Hashable, _Copy] = {}

    def get(
        self, op: str, key: Hashable, words: Callable[[], NDArray[Any]], device: torch.device, stream: int
    ) -> torch.Tensor:
        """Return the device's copy of the table `words()`, which `key` stands for, to be read on `stream`.

        Raises:
            RuntimeError: there is none yet while a graph is captured, which allows no copy.
        """
        capturing, place = is_capturing(), (key, device)
        copy = self._kept.get(place) or self._captured.get(place)
        if copy is None:
            if capturing:
                raise RuntimeError(
                    f"{op}: a graph must be captured after a warm-up with these ranks (torch.cuda.graph's own recipe); "
                    "capture again after a rank change"
                )
            copy = self._kept[place] = _Copy(*_copied(words(), device), stream)
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        elif place in self._kept:
            self._kept.move_to_end(place)
        if stream not in copy.streams:  # torch's allocator waits for this stream, too, before it gives the memory away
            copy.streams.add(stream)
            here = torch.cuda.current_stream(device)
            copy.words.record_stream(here)
            if copy.complete is not None and not capturing:  # torch.cuda.graph has waited for the device
                here.wait_event(copy.complete)
        if capturing:
            self._captured[place] = copy
        return copy.words
