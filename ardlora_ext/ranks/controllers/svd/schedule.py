"""When ranks move and by how much: the phases of ElaLoRA and AdaLoRA, and their cubic schedules. Pure functions.

Steps are counted from 0; a decision at step t comes after the t-th optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phases:
    """The three phases of a run.

    Attributes:
        tinit: steps of the first phase: ranks are constant.
        tfinal: steps of the last phase: ranks are constant again.
        total: steps of the run.
    """

    tinit: int
    tfinal: int
    total: int

    @property
    def end(self) -> int:
        """First step of the last phase."""
        return self.total - self.tfinal

    def name(self, step: int) -> str:
        """Return `warmup`, `adapt` or `frozen`."""
        return "warmup" if step <= self.tinit else "adapt" if step < self.end else "frozen"

    def progress(self, step: int) -> float:
        """Return how much of the middle phase is over, in [0, 1] (ElaLoRA, arXiv:2504.00254: p)."""
        return min(max((step - self.tinit) / (self.end - self.tinit), 0.0), 1.0)


def rank_budget(step: int, phases: Phases, start: int, target: int) -> int:
    """Return the components AdaLoRA (arXiv:2303.10512) may keep: start, then a cubic fall, then target.

    The form of its code and of PEFT; it falls fastest at the beginning.
    """
    if step <= phases.tinit:
        return start
    left = 1.0 - phases.progress(step)
    return int((start - target) * left**3 + target)


def exchange_count(step: int, phases: Phases, interval: int, b: int, scheduler: bool) -> int:
    """Return the components ElaLoRA (arXiv:2504.00254) moves after this step: b (1 - p^3) every `interval` steps, or 0.

    Rounded to the nearest, halves to even. Without the scheduler b is constant.
    """
    since = step - phases.tinit
    if since <= 0 or step >= phases.end or since % interval:
        return 0
    return round(b * (1.0 - phases.progress(step) ** 3)) if scheduler else b
