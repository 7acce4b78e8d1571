"""What a cut costs, in shares of what training has gained so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ardlora_ext import processes

DEEPEST = 64.0  # of the start, the smallest budget that is tried
PARTS = 5  # cuts that are tried, by a half, its root and so on


@dataclass(frozen=True)
class Cut:
    """What a change of ranks saves and costs.

    Attributes:
        before: what of the budget ranks take.
        after: what they take then, less.
        predicted: share of all that components are worth, of those that go.
        measured: rise of the loss on held-out batches over its fall since the start; None where there are none.
    """

    before: float
    after: float
    predicted: float
    measured: float | None = None

    @property
    def halvings(self) -> float:
        """How many times the parameters are halved; 0 where nothing would be left."""
        return math.log2(self.before / self.after) if self.after > 0.0 else 0.0

    @property
    def cost(self) -> float:
        """The higher of what was predicted and measured; NaN is above all."""
        costs = [c for c in (self.predicted, self.measured) if c is not None]
        return math.inf if any(map(math.isnan, costs)) else max(costs)

    def within(self, tolerance: float) -> bool:
        """Tell whether each halving costs at most `tolerance`."""
        return self.cost <= tolerance * self.halvings

    def costs(self) -> dict[str, float | None]:
        """Return what it costs, for records."""
        return {"predicted": self.predicted, "measured": self.measured}

    def told(self) -> str:
        """Say what it costs."""
        measured = "" if self.measured is None else f", measured {self.measured:.2%}"
        return f"{self.before:,.0f} to {self.after:,.0f} costs {self.predicted:.2%} of the gain{measured}"


class Holdout:
    """The loss on held-out batches, the same on all processes.

    Attributes:
        first: before the first step; None until then.
    """

    def __init__(self, loss: Callable[[], float]) -> None:
        self.loss = loss
        self.first: float | None = None

    def now(self, device: torch.device, group: processes.Group = None) -> float:
        """Return the loss, averaged over the processes."""
        found = torch.tensor([self.loss()], dtype=torch.float32, device=device)
        processes.average([found], group)
        return float(found)

    def judged(self, cut: Cut, before: float, after: float) -> Cut:
        """Return the cut with what it costs here; where nothing is gained yet, all of a rise is too much."""
        gain = (before if self.first is None else self.first) - before
        rise = after - before
        return replace(cut, measured=rise / gain if gain > 0.0 else 0.0 if rise <= 0.0 else math.inf)
