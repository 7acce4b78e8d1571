"""Rows that join factors: drawn and made orthogonal on the host, all of a change in one native call.

What lies elsewhere is fetched, and new rows are sent, in one copy per device, however many factors grow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ardlora_ext.layers.rows import HOST
from ardlora_ext.native.compiled import core, threads
from ardlora_ext.native.units import UnitLayout


class Fresh(NamedTuple):
    """Rows that have just joined a factor, with random values in them; float32 on the host, contiguous."""

    others: torch.Tensor  # what the factor held, [any, width]
    kept: list[int]  # rows of it that stay
    rows: torch.Tensor  # the new ones, [count, width]
    norm: float  # what they get


@torch.no_grad()
def orthogonal_rows(factors: Sequence[Fresh]) -> None:
    """Make new rows orthogonal to those kept and to each other, in place: Gram-Schmidt, `reference.orthogonal_rows`.

    A row that is a sum of the others is drawn anew; where there are more rows than columns it stays as it is.
    """
    if not factors:
        return
    table = [(f.others.data_ptr(), *f.others.shape, f.rows.data_ptr(), f.rows.shape[0]) for f in factors]
    norms = [f.norm for f in factors]
    core.orthogonal_rows(np.array(table, dtype=np.int64), [f.kept for f in factors], norms, threads())


def random_rows(count: int, seed: int) -> torch.Tensor:
    """Return `count` numbers between -1 and 1, float32 on the host; a function of the seed alone."""
    drawn = torch.empty(count, **HOST)
    core.draw_uniform(drawn.data_ptr(), count, seed % 2**64, threads())
    return drawn


def rows_to_start(layout: UnitLayout, ranks: Sequence[int], plan_a: Sequence[int], plan_b: Sequence[int]) -> list[int]:
    """Return the rows of lora_A that get values where new components leave the function as it is.

    lora_B's new rows stay zero. Where an existing row of a shared lora_B meets a new row of lora_A, that one stays zero
    instead and lora_B carries the gradient.

    Args:
        layout: of the matrix.
        ranks: of its units, the new ones.
        plan_a: where the rows of lora_A come from, negative for new ones and past the live ones.
        plan_b: the same of lora_B.
    """
    fresh = [row for row, source in enumerate(plan_a[: layout.rows(ranks)[0]]) if source < 0]
    if layout.gate_on_a and fresh:
        component = [j for rank in ranks for j in range(rank)]
        fresh = [row for row in fresh if plan_b[component[row]] < 0]
    return fresh


def runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Return (begin, end) of each part of an ascending sequence that has no gap."""
    begin = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield begin, end
            begin = end


def gathered(old: torch.Tensor, plan: Sequence[int]) -> torch.Tensor:
    """Return a copy of the rows of `old` that a plan names, zeros for new ones; all on the host."""
    source = torch.tensor(plan, dtype=torch.int64, device="cpu")
    return torch.where(source[:, None] < 0, 0.0, old[source.clamp(min=0)])


def _by_place(tensors: Sequence[torch.Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Return which tensors are not float32 on the host, by what they are instead."""
    found: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if not (tensor.is_cpu and tensor.dtype == torch.float32):
            found.setdefault((tensor.device, tensor.dtype), []).append(i)
    return found


def on_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors in float32 on the host: themselves where they are, else copies."""
    found = list(tensors)
    for numbers in _by_place(tensors).values():
        flat = torch.cat([tensors[i].reshape(-1) for i in numbers]).to(**HOST)
        for i, part in zip(numbers, torch.split(flat, [tensors[i].numel() for i in numbers]), strict=True):
            found[i] = part.view(tensors[i].shape)
    return found


def from_host(rows: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return rows, float32 on the host, as the tensors `like` are: themselves where that is so, else copies."""
    found = list(rows)
    for (device, dtype), numbers in _by_place(like).items():
        flat = torch.cat([rows[i].reshape(-1) for i in numbers]).to(device, dtype)
        for i, part in zip(numbers, torch.split(flat, [rows[i].numel() for i in numbers]), strict=True):
            found[i] = part.view(rows[i].shape)
    return found
