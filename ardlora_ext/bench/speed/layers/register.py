"""Which ways there are to compute a site: `EXPERTS` for a stack of experts, `LINEARS` for all else."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn import functional as F

from ardlora_ext.bench.speed.layers.compositions import LINEARS, Composition
from ardlora_ext.bench.speed.layers.experts import EXPERTS
from ardlora_ext.bench.speed.layers.patterns import Site

COMPOSITIONS = tuple(LINEARS)  # the names of all: experts have no others


def compose(name: str, site: Site, dropout: float) -> Composition:
    """Return a composition of a site by its name."""
    return (EXPERTS if site.experts else LINEARS)[name](site, dropout)


def fitting(names: Sequence[str], site: Site, dropout: float) -> list[str]:
    """Return the compositions that are different programs on this site, and that this torch and PEFT have."""
    return [name for name in names if _fits(name, site, dropout)]


def _fits(name: str, site: Site, dropout: float) -> bool:
    if site.experts:
        return name in EXPERTS and hasattr(F, "grouped_mm") and not (name == "peft" and dropout > 0.0)
    if name == "torch-grouped_mm":
        return site.layout.kind == "out_heads" and not site.layout.shared and hasattr(F, "grouped_mm")
    return name not in ("torch-loop", "torch-bmm") or site.layout.units > 1
