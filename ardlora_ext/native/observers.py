"""Who looks on while the backward pass of an adapter runs: x, H, dy and dH exist there anyway.

An adapter is known by its rank table, which is one tensor in eager and in compiled code. Observers are held weakly, so
that nobody has to end what they began. Without one a backward pass pays the test of an empty dict.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

# Called with its owner and x [M, K], H [M, hidden], dy [M, N], dH [M, hidden] of one pass, and of experts the offsets
# [experts + 1] of their rows; to be read now, not kept.
Note = Callable[..., None]

watched: dict[int, list[tuple[weakref.ref[Any], Note]]] = {}  # by address of the rank table
_held: dict[int, torch.Tensor] = {}  # those tables, so that no address is given to another tensor


def watch(rank_table: torch.Tensor, owner: object, note: Note) -> Callable[[], None]:
    """Call `note(owner, ...)` in every backward pass of the adapter with this rank table, until `owner` dies.

    Returns:
        What ends it before.
    """
    address = rank_table.data_ptr()

    def end(gone: Any = None) -> None:
        left = [entry for entry in watched.get(address, []) if entry[0] is not (gone or mine)]
        if left:
            watched[address] = left
        else:
            watched.pop(address, None)
            _held.pop(address, None)

    mine = weakref.ref(owner, end)
    _held[address] = rank_table
    watched.setdefault(address, []).append((mine, note))
    return end


def tell(rank_table: torch.Tensor, *tensors: torch.Tensor) -> None:
    """Show (x, h, dy, d_h) or (x, h, dy, d_h, offsets) to the observers of an adapter."""
    for mine, note in tuple(watched.get(rank_table.data_ptr(), ())):
        owner = mine()
        if owner is not None:
            note(owner, *tensors)
