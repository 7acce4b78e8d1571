"""Bed (a): linear units whose best update is planted, so that the best allocation is known in closed form.

Unit u is a frozen matrix W_u whose wanted update D_u has rank rho_u and singular values falling from 2 to 1; data are
y = (W_u + D_u) x + noise with Gaussian x, so the expected loss above the noise is exactly |D_u - dW_u|_F^2.

Variants: `ranks` plants 0, 1, 2, 4, 8 over whole matrices; `heads` plants 0, 1, 3, 8 over the four heads of every
matrix, in common input directions, so that only a rank per head can tell them apart; `equal` plants the same rank
everywhere, where an allocation can only lose; `inputs` is `ranks` with inputs whose standard deviations fall from 3 to
0.1, so that how large an update is does not say what it is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import ardlora_ext as ard
from ardlora_ext.bench.quality.methods import Ranks
from ardlora_ext.bench.quality.trial import Measure, Row
from ardlora_ext.bench.stats import spearman

Floats = NDArray[np.float64]
Variant = Literal["ranks", "heads", "equal", "inputs"]

VARIANTS: tuple[Variant, ...] = ("ranks", "heads", "equal", "inputs")
_PLANTED: dict[Variant, tuple[int, ...]] = {"ranks": (0, 1, 2, 4, 8), "heads": (0, 1, 3, 8), "equal": (3,)}
_PLANTED["inputs"] = _PLANTED["ranks"]
_VALID_ROWS = 256


def oracle_loss(singular_values: Floats, components: int) -> float:
    """Return the least loss of any allocation: all but the `components` largest squares of [units, k], per unit."""
    squares = np.sort(singular_values.ravel() ** 2)[::-1]
    return float(squares[components:].sum() / len(singular_values))


def oracle_ranks(singular_values: Floats, components: int) -> list[int]:
    """Return the ranks of that allocation; components that are worth nothing are not given to anyone."""
    flat = singular_values.ravel()
    chosen = np.argsort(-flat, kind="stable")[:components]
    owners = chosen[flat[chosen] > 0] // singular_values.shape[1]
    return [int(n) for n in np.bincount(owners, minlength=len(singular_values))]


def nested_oracle(singular_values: Floats, common: int, own: int, budget: int) -> tuple[float, list[list[int]]]:
    """Return the best prefix ranks of heads that share input directions, and their loss per head.

    A matrix whose largest head rank is R pays R * common + sum_h r_h * own. Exact: the best k components below each R
    are the k largest, and matrices are combined by dynamic programming over the budget.

    Args:
        singular_values: [matrices, heads, k], falling along k.
        common: parameters of a direction that the heads of a matrix share.
        own: parameters of one head's component; divides `common` and is the unit of the budget.
        budget: parameters in total.
    """
    slots = budget // own
    best = np.zeros(slots + 1)  # energy kept, by slots spent
    picks: list[list[tuple[int, tuple[int, ...]]]] = []
    for sigma in singular_values:
        gained = np.full(slots + 1, -1.0)
        pick: list[tuple[int, tuple[int, ...]]] = [(0, ())] * (slots + 1)
        for cost, energy, ranks in _matrix_options(sigma, common // own):
            if cost > slots:
                continue
            total = best[: slots + 1 - cost] + energy
            better = total > gained[cost:] + 1e-12
            gained[cost:][better] = total[better]
            for at in np.flatnonzero(better):
                pick[at + cost] = (cost, ranks)
        best = gained
        picks.append(pick)
    chosen: list[list[int]] = []
    slot = int(np.argmax(best))
    for pick in reversed(picks):
        cost, ranks = pick[slot]
        chosen.insert(0, list(ranks))
        slot -= cost
    heads = singular_values.shape[0] * singular_values.shape[1]
    return float((singular_values**2).sum() - best.max()) / heads, chosen


def _matrix_options(sigma: Floats, row_slots: int) -> list[tuple[int, float, tuple[int, ...]]]:
    """Return (slots, energy, ranks) of all sensible rank choices for one matrix [heads, k]."""
    options = [(0, 0.0, (0,) * len(sigma))]
    for largest in range(1, sigma.shape[1] + 1):
        below = sigma[:, :largest].ravel() ** 2
        order = np.argsort(-below, kind="stable")
        order = order[below[order] > 0]
        for count in range(1, len(order) + 1):
            owners = order[:count] // largest
            ranks = np.bincount(owners, minlength=len(sigma))
            energy = float(below[order[:count]].sum())
            options.append((int(ranks.max()) * row_slots + count, energy, tuple(int(r) for r in ranks)))
    return options


@dataclass(frozen=True)
class Truth:
    """What is planted.

    Attributes:
        updates: [matrices, width, width], the wanted update of each.
        singular_values: [matrices, heads, k] of the updates on inputs as they are; one head where matrices are whole.
        inputs: [width] standard deviations.
    """

    updates: torch.Tensor
    singular_values: Floats
    inputs: torch.Tensor

    @property
    def ranks(self) -> list[int]:
        """Planted rank of each unit."""
        return [int(n) for n in (self.singular_values > 1e-9).sum(axis=2).ravel()]


def plant(variant: Variant, matrices: int, width: int, seed: int) -> Truth:
    """Draw the wanted updates."""
    generator = torch.Generator().manual_seed(seed)
    kinds = _PLANTED[variant]
    heads = len(kinds) if variant == "heads" else 1
    k = max(kinds)
    sigma = np.zeros((matrices, heads, k))
    updates = torch.zeros(matrices, width, width)
    shuffled = [kinds[int(i) % len(kinds)] for i in torch.randperm(matrices, generator=generator)]
    for m in range(matrices):
        ranks = [kinds[int(i)] for i in torch.randperm(heads, generator=generator)] if heads > 1 else [shuffled[m]]
        right = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        rows = width // heads
        for h, r in enumerate(ranks):
            left = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q
            sigma[m, h, :r] = np.linspace(2.0, 1.0, r)
            values = torch.tensor(sigma[m, h, :r], dtype=torch.float32)
            updates[m, h * rows : (h + 1) * rows] = (left[:, :r] * values) @ right[:, :r].T
    inputs = torch.ones(width)
    if variant == "inputs":
        inputs = torch.logspace(np.log10(3.0), -1.0, width)
        found = torch.linalg.svdvals((updates * inputs).double())[:, None, :k].numpy()
        sigma = np.where(sigma > 0, found, 0.0)
    return Truth(updates, sigma, inputs)


class PlantedTask:
    """One seed of the bed."""

    clip: float | None = None

    def __init__(self, bed: PlantedBed, seed: int) -> None:
        self.bed = bed
        self.truth = plant(bed.variant, bed.matrices, bed.width, seed)
        self.heads = self.truth.singular_values.shape[1]
        self.base: Mapping[str, Any] = {"head_dim": {"unit": bed.width // self.heads}} if self.heads > 1 else {}
        self.layers = nn.ModuleList(nn.ModuleDict({"unit": _linear(bed.width)}) for _ in range(bed.matrices))
        self.model: nn.Module = nn.ModuleDict({"layers": self.layers})
        self.frozen = torch.stack([unit.get_parameter("weight").detach().clone() for unit in self._units()])
        self.target = self.frozen + self.truth.updates
        self.data = torch.Generator().manual_seed(seed + 1)
        self.held_out = self._batch(_VALID_ROWS)

    def _units(self) -> list[nn.Module]:
        """Return the matrices, or the adapters that took their place."""
        return [block.get_submodule("unit") for block in self.layers]

    def _batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.truth.inputs * torch.randn(self.bed.matrices, rows, self.bed.width, generator=self.data)
        noise = self.bed.noise * torch.randn(x.shape, generator=self.data)
        return x, torch.baddbmm(noise, x, self.target.mT)

    def _error(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = torch.stack([unit(rows) for unit, rows in zip(self._units(), x, strict=True)])
        return (out - y).square().sum(-1).mean()

    def oracle(self, budget: int) -> Ranks:
        """Best ranks: in closed form for whole matrices, by dynamic programming for heads."""
        return dict(zip((f"layers.{m}.unit" for m in range(self.bed.matrices)), self._best(budget)[1], strict=True))

    def _best(self, budget: int) -> tuple[float, list[list[int]]]:
        sigma, width = self.truth.singular_values, self.bed.width
        if self.heads > 1:
            return nested_oracle(sigma, width, width // self.heads, budget)
        components = budget // (2 * width)
        return oracle_loss(sigma[:, 0], components), [[r] for r in oracle_ranks(sigma[:, 0], components)]

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": lr}]

    def loss(self) -> torch.Tensor:
        return self._error(*self._batch(self.bed.batch))

    def valid(self) -> float:
        return float(self._error(*self.held_out))

    def test(self) -> Row:
        """The expected loss above the noise, exactly: what each layer adds to an identity matrix."""
        eye = torch.eye(self.bed.width)
        updates = torch.stack([unit(eye).T for unit in self._units()]) - self.frozen
        units = self.bed.matrices * self.heads
        loss = float(((self.truth.updates - updates) * self.truth.inputs).square().sum()) / units
        layers = list(ard.adapters(self.model).values())
        learned = [r for layer in layers for r in _per_head(layer.ranks, self.heads)]
        best = self._best(sum(layer.layout.parameters(layer.ranks) for layer in layers))[0]
        found = {"loss": loss, "regret": loss - best, "oracle": best, "spearman": spearman(learned, self.truth.ranks)}
        return found | {"planted": self.truth.ranks, "learned": learned}


def _linear(width: int) -> nn.Linear:
    return nn.Linear(width, width, bias=False)


def _per_head(ranks: Sequence[int], heads: int) -> list[int]:
    return list(ranks) if len(ranks) == heads else [ranks[0]] * heads


@dataclass(frozen=True)
class PlantedBed:
    """Settings of the bed; see the module."""

    variant: Variant = "ranks"
    matrices: int = 15
    width: int = 32
    rank: int = 3
    steps: int = 300
    batch: int = 32
    noise: float = 0.5
    lrs: tuple[float, ...] = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)

    measure = Measure("regret", "lower", "regret to the oracle")

    @property
    def name(self) -> str:
        """What tables call it."""
        return "planted" if self.variant == "ranks" else f"planted-{self.variant}"

    def task(self, seed: int) -> PlantedTask:
        return PlantedTask(self, seed)
