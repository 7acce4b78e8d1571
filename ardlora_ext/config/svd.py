"""What ElaLoRA and AdaLoRA share: the P Lambda Q form, scored components, three phases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ardlora_ext.config.adapter import AdapterConfig
from ardlora_ext.config.checks import choice, require


@dataclass(frozen=True, kw_only=True)
class SvdConfig(AdapterConfig):
    """What ElaLoRA and AdaLoRA share: W' = W + scaling * P diag(lambda) Q, scored components, three phases.

    A component is scored, kept or dropped with its own row of P and of Q, so a unit must own rows of both:
    `granularity` is `matrix`, or `head` with `factoring="independent"`. Heads that share a factor have no such form:
    its rows serve them all, and can be neither orthonormal for each nor dropped with one. Names are those of PEFT's
    AdaLoraConfig where it has them.

    Attributes:
        total_steps: optimizer steps of the run. `None`: `attach(..., total_steps=...)` tells.
        tinit: first optimizer steps, with constant ranks. `None`: a tenth of the run.
        tfinal: last optimizer steps, with constant ranks. `None`: three tenths of the run.
        deltaT: optimizer steps between decisions.
        beta1: decay of the smoothed sensitivity. 0.85 in all published scripts.
        beta2: decay of the smoothed uncertainty. 0.85 in all published scripts.
        orth_reg_weight: strength gamma of the soft orthogonality of P and Q; 0 turns it off.
        orth: `squared`, sum of ||P^T P - I||_F^2 + ||Q Q^T - I||_F^2 (papers), scaled so that its first gradient is as
            large as that of `norm`, the mean of the unsquared norms (released code, PEFT). `None`: the method's own.
        orth_interval: optimizer steps between additions of its gradient, then as many times as strong.
        start: P and Q `gaussian` with std 0.02 (as in the code and in PEFT) or with `orthonormal` rows; lambda is 0.
        task_scores: score by the gradient of the task alone, with the weights before the step. Off, as in the code:
            by the whole gradient, with the weights after it.
    """

    inits: ClassVar[tuple[str, ...]] = ("default",)  # `start` says how

    total_steps: int | None = None
    tinit: int | None = None
    tfinal: int | None = None
    deltaT: int = 1  # noqa: N815 - PEFT's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.1
    orth: Literal["squared", "norm"] | None = None
    orth_interval: int = 1
    start: Literal["gaussian", "orthonormal"] = "gaussian"
    task_scores: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        own_rows = self.granularity == "matrix" or (self.granularity, self.factoring) == ("head", "independent")
        require(
            own_rows,
            f"{owner}: granularity must be 'matrix', or 'head' with factoring='independent' (a unit must own rows), "
            f"got {self.granularity!r} with {self.factoring!r}",
        )
        require(
            not self.rank_pattern,
            f"{owner}: rank_pattern must be empty, because ranks are shared out from one start, got "
            f"{self.rank_pattern}; exclude_modules leaves layers out",
        )
        choice(owner, "orth", self.orth, (None, "squared", "norm"))
        choice(owner, "start", self.start, ("gaussian", "orthonormal"))
        for name in ("deltaT", "orth_interval"):
            require(getattr(self, name) >= 1, f"{owner}: {name} must be >= 1, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            require(0 < getattr(self, name) < 1, f"{owner}: {name} must be in (0, 1), got {getattr(self, name)}")
        for name in ("tinit", "tfinal"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{owner}: {name} must be >= 0, got {value}")
        require(
            math.isfinite(self.orth_reg_weight) and self.orth_reg_weight >= 0,
            f"{owner}: orth_reg_weight must be >= 0, got {self.orth_reg_weight}",
        )
        if self.total_steps is not None:
            self.phases(self.total_steps)

    @property
    def shortest(self) -> int:
        """Steps the middle phase needs for a decision."""
        return 1

    def phases(self, total_steps: int) -> tuple[int, int]:
        """Return (tinit, tfinal) in optimizer steps for a run of this length.

        Raises:
            ValueError: they leave no room for a decision.
        """
        tinit = round(0.1 * total_steps) if self.tinit is None else self.tinit
        tfinal = round(0.3 * total_steps) if self.tfinal is None else self.tfinal
        require(
            total_steps - tinit - tfinal >= self.shortest,
            f"{type(self).__name__}: total_steps must be >= tinit + tfinal + {self.shortest} = "
            f"{tinit + tfinal + self.shortest}, got {total_steps}; lower tinit, tfinal or deltaT, or train longer",
        )
        return tinit, tfinal

    @property
    def orth_form(self) -> Literal["squared", "norm"]:
        """Form of the regulariser in use."""
        return "norm" if self.orth is None else self.orth
