"""ElaLoRA (arXiv:2504.00254): ranks move between units at a constant total."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from ardlora_ext.config.checks import choice, require
from ardlora_ext.config.svd import SvdConfig


@dataclass(frozen=True, kw_only=True)
class ElaConfig(SvdConfig):
    """ElaLoRA (arXiv:2504.00254): every `deltaT` steps the b least useful components make room where more is needed.

    The total rank never changes. Step t moves round(b (1 - p^3)) components, p the progress of the middle phase.

    Attributes:
        r: rank every unit starts with.
        r_max: largest rank of a unit. `None`, as in the paper: what the matrix allows.
        k: components a unit offers per round, at most r - 1. 2 in the published scripts.
        b: components moved per round. 4 in the published scripts. The pool must hold 2 b candidates.
        scheduler: let b fall with the progress; off, it is constant.
        mode: `paper`, or `code`: what the released code does besides. Each round it forgets the optimizer's state and
            from the first round on the learning rate stays at its peak; new vectors are projected once, lambda starts
            at 1e-13, all candidates that tie at the threshold are pruned, the regulariser is not squared.
        new_norm: norm of new rows of P and Q: the `mean` of the unit's, so that lambda acts alike on all, or `unit`
            (paper; with the Gaussian start a new component acts stronger).
        grace: optimizer steps in which a new component is no candidate. `None`: until its averages have filled,
            3 / (1 - beta1); 0 in code mode.
        rank1_candidate: let units of rank 1 grow; the paper's never can again.
        allocation: `importance`, or a control: `random_grow` (random units grow), `random` (random ones shrink too),
            `none` (nothing moves: the same form, scores and, in code mode, restarts at a fixed rank).
        target_r: a control: mean rank at the end, other than r. Below r rounds only prune, above it they only grow.
    """

    r: int = 8
    r_max: int | None = None
    k: int = 2
    b: int = 4
    deltaT: int = 10  # noqa: N815
    scheduler: bool = True
    mode: Literal["paper", "code"] = "paper"
    new_norm: Literal["mean", "unit"] = "mean"
    grace: int | None = None
    rank1_candidate: bool = False
    allocation: Literal["importance", "random_grow", "random", "none"] = "importance"
    target_r: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("ElaConfig", "mode", self.mode, ("paper", "code"))
        choice("ElaConfig", "new_norm", self.new_norm, ("mean", "unit"))
        choice("ElaConfig", "allocation", self.allocation, ("importance", "random_grow", "random", "none"))
        require(self.target_r is None or self.target_r >= 1, f"ElaConfig: target_r must be >= 1, got {self.target_r}")
        for name in ("r", "k", "b"):
            require(getattr(self, name) >= 1, f"ElaConfig: {name} must be >= 1, got {getattr(self, name)}")
        require(self.r_max is None or self.r_max >= self.r, f"ElaConfig: r_max must be >= r, got {self.r_max}")
        require(
            self.capacity != "fixed" or self.r_max is not None,
            "ElaConfig: r_max must be given with capacity='fixed', got None",
        )
        require(self.grace is None or self.grace >= 0, f"ElaConfig: grace must be >= 0, got {self.grace}")

    @property
    def initial_rank(self) -> int:
        return self.r

    @property
    def max_rank(self) -> int:
        return sys.maxsize if self.r_max is None else self.r_max

    @property
    def shortest(self) -> int:
        return self.deltaT + 1

    @property
    def orth_form(self) -> Literal["squared", "norm"]:
        if self.orth is None:
            return "squared" if self.mode == "paper" else "norm"
        return self.orth

    @property
    def grace_steps(self) -> int:
        """Optimizer steps in which a new component is no candidate."""
        if self.grace is None:
            return round(3 / (1 - self.beta1)) if self.mode == "paper" else 0
        return self.grace
