"""Rank patterns of benches: uniform ranks, ragged ones of heads or experts at the same parameters, and real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ardlora_ext.layers.rows import capacity_of, initial_rows
from ardlora_ext.native.units import Factoring, UnitLayout

HEAD_DIM = 64
EXPERTS = 16
UNIFORM = 8  # whose parameters the ragged patterns get

# From a published AdaLoRA run on a 3B model: q and v of 28 layers.
_ADALORA_Q = (0, 29, 28, 0, 17, 1, 22, 4, 10, 27, 4, 19, 12, 34, 30, 40, 35, 52, 41, 44, 16, 36, 25, 50, 48, 14, 32, 31)
_ADALORA_V = (
    60, 59, 32, 20, 36, 35, 43, 46, 38, 51, 42, 41, 45, 44, 37, 46, 40, 44, 54, 30, 28, 34, 37, 45, 35, 16, 16, 37,
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One adapted matrix of a bench: its units, their ranks, and values to start from.

    Attributes:
        weight: [N, K], of experts [experts, N, K], frozen.
        lora_A: float32, rank-major, with the rows that a layer would allocate.
        lora_B: as lora_A; random, so that every gradient is at work.
        counts: the rows of x that each expert sees.
    """

    layout: UnitLayout
    ranks: tuple[int, ...]
    weight: torch.Tensor
    lora_A: torch.Tensor  # noqa: N815
    lora_B: torch.Tensor  # noqa: N815
    counts: tuple[int, ...] = ()

    @property
    def experts(self) -> bool:
        """Whether it is a stack of experts."""
        return self.layout.kind == "experts"


Ranks = list[tuple[UnitLayout, tuple[int, ...]]]


def _uniform(features: int, rank: int) -> Ranks:
    return [(UnitLayout("matrix", "shared", 1, features, features), (rank,))]


def ragged(features: int, factoring: Factoring) -> Ranks:
    """Return heads with ranks that fall linearly to none, at the most parameters up to those of uniform rank 8."""
    heads = features // HEAD_DIM
    layout = UnitLayout("out_heads", factoring, heads, features, features)
    budget = UNIFORM * 2 * features
    best: tuple[int, ...] = (0,) * heads
    for step in range(1, 1000):
        mean = 0.05 * step
        ranks = tuple(round(2.0 * mean * (1.0 - u / heads)) for u in range(heads))
        if layout.parameters(ranks) > budget:
            return [(layout, best)]
        best = ranks
    raise AssertionError("a mean rank of 50 must cost more than rank 8")


def _adalora(features: int) -> Ranks:
    return [entry for rank in (*_ADALORA_Q, *_ADALORA_V) for entry in _uniform(features, rank)]


def _experts(features: int, ranks: Sequence[int]) -> Ranks:
    return [(UnitLayout("experts", "independent", len(ranks), features, features), tuple(ranks))]


def _rising() -> list[int]:
    """Ranks of experts from none to twice the uniform one, as many components in all."""
    return [round(2 * UNIFORM * e / (EXPERTS - 1)) for e in range(EXPERTS)]


PATTERNS: dict[str, Callable[[int], Ranks]] = {
    "uniform-8": lambda features: _uniform(features, 8),
    "uniform-16": lambda features: _uniform(features, 16),
    "uniform-64": lambda features: _uniform(features, 64),
    "heads-shared": lambda features: ragged(features, "shared"),
    "heads-independent": lambda features: ragged(features, "independent"),
    "adalora-56": _adalora,
    "experts": lambda features: _experts(features, [UNIFORM] * EXPERTS),
    "experts-ragged": lambda features: _experts(features, _rising()),
    "experts-skewed": lambda features: _experts(features, [UNIFORM] * EXPERTS),
    "experts-ragged-skewed": lambda features: _experts(features, _rising()),
}


def _counts(pattern: str, experts: int, rows: int, generator: torch.Generator) -> tuple[int, ...]:
    """Deal rows out to experts at random; where they are skewed, one gets half of them."""
    counts = torch.zeros(experts, dtype=torch.int64)
    if pattern.endswith("skewed"):
        counts[experts // 2] = rows // 2
    left = rows - int(counts.sum())
    counts += torch.randint(experts, (left,), generator=generator).bincount(minlength=experts)
    return tuple(counts.tolist())


def sites(pattern: str, features: int, dtype: torch.dtype, rows: int, seed: int = 0) -> list[Site]:
    """Return the matrices of a pattern, all [features, features], with weights of their own; experts share `rows`."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for layout, ranks in PATTERNS[pattern](features):
        experts = layout.kind == "experts"
        shape = (layout.units, features, features) if experts else (features, features)
        weight = torch.randn(shape, generator=generator) / features**0.5
        counts = _counts(pattern, layout.units, rows, generator) if experts else ()
        a_rows, b_rows = layout.rows(ranks)
        lora_A = torch.zeros(capacity_of(a_rows), layout.a_width)
        lora_A[:a_rows] = initial_rows(a_rows, layout.a_width, generator)
        lora_B = torch.zeros(capacity_of(b_rows), layout.b_width)
        lora_B[:b_rows] = torch.randn(b_rows, layout.b_width, generator=generator) * 0.1
        found.append(Site(layout, ranks, weight.to(dtype), lora_A, lora_B, counts))
    return found
