"""Singular values of the updates of many layers at once, from rank-sized matrices: no update is ever formed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import torch

from ardlora_ext.native.units import UnitLayout

_ENTRIES = 1 << 22  # of a factor's rows that are taken together, in float64: 32 MiB


class Factored(Protocol):
    """What is read of a `LoraLinear`."""

    layout: UnitLayout
    ranks: list[int]
    scaling: float

    @property
    def gate(self) -> torch.Tensor | None: ...

    @property
    def gated(self) -> torch.Tensor: ...

    @property
    def ungated(self) -> torch.Tensor: ...


@torch.no_grad()
def singular_values(layers: Sequence[Factored]) -> torch.Tensor:
    """Return the singular values of each unit's update, [units, largest rank] float64, descending, 0-padded.

    Args:
        layers: their units follow each other. Layers of one shape are taken together.
    """
    counts = [layer.layout.units for layer in layers]
    first = [0, *accumulate(counts)]
    out = torch.zeros(sum(counts), max(max(layer.ranks) for layer in layers), dtype=torch.float64, device="cpu")
    for chunk in _alike(layers):
        values = _together([layers[i] for i in chunk])
        for i, found in zip(chunk, torch.split(values, counts[chunk[0]]), strict=True):
            out[first[i] : first[i] + counts[i], : found.shape[1]] = found
    return out


def _alike(layers: Sequence[Factored]) -> Iterator[list[int]]:
    """Yield the indices of layers that share shape and device, as many as fit the memory for them."""
    groups: dict[object, list[int]] = {}
    for i, layer in enumerate(layers):
        kind = layer.layout, layer.gated.device, layer.gated.dtype, layer.gate is None
        groups.setdefault(kind, []).append(i)
    for group in groups.values():
        layout = layers[group[0]].layout
        widest = max(max(layers[i].ranks) for i in group)
        most = _ENTRIES // max(layout.units * widest * max(layout.a_width, layout.b_width), 1)
        step = max(most, 1)
        yield from (group[i : i + step] for i in range(0, len(group), step))


def _together(layers: Sequence[Factored]) -> torch.Tensor:
    """Return the values [units of all, largest rank] of layers with one layout on one device."""
    layout = layers[0].layout
    ranks = torch.tensor([layer.ranks for layer in layers], device="cpu")  # [layers, units]
    live = torch.arange(int(ranks.max()), device="cpu") < ranks[..., None]  # [layers, units, widest]
    gated, begins = _rows([layer.gated for layer in layers], ranks.sum(1)), ranks.flatten().cumsum(0) - ranks.flatten()
    others = [layer.ungated for layer in layers]
    weight = live * torch.tensor([layer.scaling for layer in layers], dtype=torch.float64, device="cpu")[:, None, None]
    own = _places(begins.view_as(ranks), live)
    if layers[0].gate is not None:
        gates = _rows([layer.gate for layer in layers if layer.gate is not None], ranks.sum(1))
        weight = weight * gates.double().cpu()[own]
    if layout.shared:
        widest = ranks.amax(dim=1)
        common = live.any(dim=1, keepdim=True)
        left = _gram(_rows(others, widest), _places((widest.cumsum(0) - widest)[:, None], common), common.double())
    else:
        left = _gram(_rows(others, ranks.sum(1)), own, live.double())
    # sigma^2 are the eigenvalues of A A^T B B^T, symmetric as C^T (gated) C with C C^T the other factor's.
    values, vectors = torch.linalg.eigh(left)
    root = vectors * values.clamp(min=0.0).sqrt()[..., None, :]
    squares: torch.Tensor = torch.linalg.eigvalsh(root.mT @ _gram(gated, own, weight) @ root)
    return (squares.clamp(min=0.0).sqrt().flip(-1) * live).flatten(0, 1)


def _rows(factors: Sequence[torch.Tensor], live: torch.Tensor) -> torch.Tensor:
    """Return the live rows of all factors, one after the other."""
    return torch.cat([factor.detach()[:n] for factor, n in zip(factors, live.tolist(), strict=True)])


def _places(begins: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Return where each component's row is, [..., widest]; row 0 for components that do not live."""
    return torch.where(live, begins[..., None] + torch.arange(live.shape[-1], device="cpu"), 0)


def _gram(rows: torch.Tensor, places: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return weight_i weight_j <row i, row j> of each unit on the CPU, [..., widest, widest]."""
    if not len(rows):
        return weight[..., :, None] * weight[..., None, :]
    taken = rows[places.to(rows.device)].double()
    return (taken @ taken.mT).cpu() * weight[..., :, None] * weight[..., None, :]
