"""Small tables of integers that kernels read: copied to a device once, and kept there by content.

A copy is made in its stream's turn, and another stream waits for it once; the host never does. It is given back only
where no kernel and no captured graph can still read it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from numpy.typing import NDArray

from ardlora_ext.native.transfers import sent

__all__ = ["DeviceTables", "is_capturing"]


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
