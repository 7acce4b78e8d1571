"""ARD-LoRA (arXiv:2506.18267): ranks from a learned factor per unit, under a price or a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from ardlora_ext.config.adapter import AdapterConfig
from ardlora_ext.config.checks import choice, require
from ardlora_ext.config.patterns import pattern_key

_ONLY_IN = {
    "anneal": ("start", "shape", "step_power", "metric", "allocation", "budget_counts", "serve_rank", "tolerance"),
    "paper": (
        *("l1", "tv", "variation", "lr_alpha", "slope", "gate", "variation_form", "normalize"),
        *("cost_weighted", "lr_price", "harden_ratio", "reorder", "gate_floor", "gate_width", "hysteresis"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class ArdConfig(AdapterConfig):
    """ARD-LoRA (arXiv:2506.18267): a learned factor alpha per unit, rank r = round(r0 * alpha).

    In `mode="anneal"` units start at `start` times their share and the budget falls from there to its target. At each
    decision the ranks alpha r0 are those of most worth for the budget of that time, one price for all units, and
    updates are recompressed to them (`svd_prune`), optimizer state included.

    In `mode="paper"` alpha minimises

        L_task + price * sum_u w_u |alpha_u| + price * tv/2 * sum_u (alpha_u(t) - alpha_u(t-1))^2

    by proximal steps on the gradient of a fractional ("ramp") gate. The paper gives no values: defaults are ours,
    measured on the bench of this project.

    `budget="auto"` needs no size: the budget falls as long as a cut is worth it, see `tolerance`.

    What a user sets comes first, then what the paper names, then what only we tune.

    Attributes:
        r0: base rank, alpha = 1: a unit's share of the budget. At least 1. `scaling = lora_alpha / r0`.
        r_max: largest rank of a unit; `None`: 4 * r0, in `anneal` start * r0.
        r_min: smallest rank of a unit; `None`: 0 in `anneal`, and 1, the paper's floor and the only one, in `paper`.
        mode: `anneal` (fat start, thin end) or `paper`; the options of one are refused in the other.
        granularity: as in `AdapterConfig`; the paper's unit is a `head` of a layer.
        budget: adapter parameters allowed at the end; the price is then found by dual ascent. `None` with `l1=None`:
            the parameters of plain LoRA at rank r0, so ranks move but never cost more in total. `auto` (`anneal`): cut
            while that costs no more than `tolerance`, at most to a 64th of the start.
        tolerance: `budget="auto"`: the share of the gain so far that halving the parameters may cost, in (0, 1). A cut
            is judged by what the metric says it costs, and by the loss on `holdout` before and after it where `attach`
            has one; where it is too dear a smaller one is tried.
        budget_counts: `anneal`: what the budget counts: `live` parameters, or those of the portable PEFT file
            (`exported`), which pads every module that is left to one rank; there a module is a unit.
        serve_rank: `anneal`: largest rank of a unit at the end, so that a server need not hold more for any module.
        total_steps: optimizer steps of the run; needed to freeze. `None`: ranks adapt until `controller.finalize()`, in
            `anneal` that makes the whole cut at once.
        start: `anneal`: every unit starts at the rank start * r0. At least 1.
        shape: `anneal`: how the budget falls, `geometric`, `linear`, or `cubic` (AdaLoRA's).
        step_power: `anneal`: while the mean rank r is above the units' share, lora_B takes (r0 / r)^step_power of the
            optimizer's step, so that the fat start learns at LoRA's rate: as LoRA's `lora_alpha / r` does with 1, as
            rsLoRA's `lora_alpha / sqrt(r)` with 1/2. From 0 (all of the step) to 1.
        metric: `anneal`: what a component is worth and a cut keeps: the `loss` to second order, from rank-sized
            statistics of the backward pass, or the size of the `update`.
        allocation: `anneal`: `learned`, or a control on the same path of the budget: `uniform` (ranks as equal
            as it lets them be), `random`.
        l1: lambda, a fixed price instead of a budget, in units of the typical (RMS) gradient of alpha.
        tv: beta, strength of the total variation within the regulariser.
        variation: `temporal_sq` (the reading that fits the paper's theorem; its proximal form is a damper),
            `temporal_abs`, `layer_sq`, `layer_abs` (over neighbouring layers), or `none`.
        lr_alpha: step of alpha, the paper's second step size.
        slope: what stands for dL/drho. `secant`: minus the loss that the unit's next component is worth as a whole,
            estimated from its singular value and the unit's Fisher information. `tangent`: the derivative by the gate
            of the boundary component, the literal reading; blind to a component whose factors are already fitted.
        gate: how a soft rank gates components: `ramp` (fractional boundary component), `ste` (whole ranks forward, the
            ramp's slope backward), `sigmoid` (every component has a slope), `scale` (alpha multiplies the update).
        variation_form: `prox` solves each step exactly, `explicit` follows the gradient.
        normalize: divide alpha's gradient by its running RMS over all units, so that `lr_alpha` and `l1` mean the same
            for every model. Off: the raw gradient, as the paper's step-size theorem reads.
        cost_weighted: weight the l1 term by what a component of the unit costs in parameters (mean 1).
        lr_price: dual step on the price per relative budget excess.
        warmup_ratio: first part of the run with constant ranks (B starts at zero and says nothing yet).
        harden_ratio: part before the freeze in which gates move smoothly to 0 or 1.
        freeze_ratio: last part of the run with constant, whole ranks; `None`: 0.5 in `anneal`, 0.3 in `paper`. What is
            too small for its task learns more at its final ranks than on the way there.
        update_interval: optimizer steps between changes of the allocated ranks; at most 20 of them in `anneal`.
        reorder: before each change of ranks, bring fully open components into the order of ||a_j|| ||b_j||, so that the
            least useful is the next to close.
        gate_floor: smallest gate of the boundary component, so that it is trained and a unit can grow.
        gate_width: width of the sigmoid, in ranks.
        hysteresis: ranks a unit must fall below before a component with a closed gate is given back.
    """

    # What a user sets.
    r0: int = 8
    r_max: int | None = None
    r_min: int | None = None
    mode: Literal["anneal", "paper"] = "anneal"
    budget: int | Literal["auto"] | None = None
    tolerance: float = 0.02
    budget_counts: Literal["live", "exported"] = "live"
    serve_rank: int | None = None
    total_steps: int | None = None

    # Fat start, thin end.
    start: float = 4.0
    shape: Literal["geometric", "linear", "cubic"] = "geometric"
    step_power: float = 1.0
    metric: Literal["loss", "update"] = "loss"
    allocation: Literal["learned", "uniform", "random"] = "learned"

    # What the paper names.
    l1: float | None = None
    tv: float = 1.0
    variation: Literal["temporal_sq", "temporal_abs", "layer_sq", "layer_abs", "none"] = "temporal_sq"
    lr_alpha: float = 0.02

    # How it is read where the paper is silent, and what only we tune.
    slope: Literal["secant", "tangent"] = "secant"
    gate: Literal["ramp", "ste", "sigmoid", "scale"] = "ramp"
    variation_form: Literal["prox", "explicit"] = "prox"
    normalize: bool = True
    cost_weighted: bool = True
    lr_price: float = 0.5
    warmup_ratio: float = 0.1
    harden_ratio: float = 0.05
    freeze_ratio: float | None = None
    update_interval: int = 10
    reorder: bool = True
    gate_floor: float = 0.1
    gate_width: float = 0.5
    hysteresis: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("mode", ("anneal", "paper")),
            ("budget_counts", ("live", "exported")),
            ("shape", ("geometric", "linear", "cubic")),
            ("metric", ("loss", "update")),
            ("allocation", ("learned", "uniform", "random")),
            ("slope", ("secant", "tangent")),
            ("gate", ("ramp", "ste", "sigmoid", "scale")),
            ("variation", ("temporal_sq", "temporal_abs", "layer_sq", "layer_abs", "none")),
            ("variation_form", ("prox", "explicit")),
        ):
            choice("ArdConfig", name, getattr(self, name), allowed)
        require(self.gate_width > 0, f"ArdConfig: gate_width must be > 0, got {self.gate_width}")
        require(self.r0 >= 1, f"ArdConfig: r0 must be >= 1, got {self.r0}")
        require(self.r_max is None or self.r_max >= self.r0, f"ArdConfig: r_max must be >= r0, got {self.r_max}")
        for pattern, r in (self.rank_pattern or {}).items():
            require(
                r <= self.max_rank,
                f"ArdConfig: rank_pattern must be at most r_max = {self.max_rank}, got {r} for {pattern!r}",
            )
        require(self.budget is None or self.l1 is None, "ArdConfig: budget and l1 must not both be given")
        require(
            self.budget is None or self.budget == "auto" or self.budget >= 1,
            f"ArdConfig: budget must be >= 1 or 'auto', got {self.budget}",
        )
        require(0.0 < self.tolerance < 1.0, f"ArdConfig: tolerance must be in (0, 1), got {self.tolerance}")
        require(self.l1 is None or self.l1 >= 0, f"ArdConfig: l1 must be >= 0, got {self.l1}")
        require(self.tv >= 0, f"ArdConfig: tv must be >= 0, got {self.tv}")
        for name in ("lr_alpha", "lr_price"):
            require(getattr(self, name) > 0, f"ArdConfig: {name} must be > 0, got {getattr(self, name)}")
        ratios = (self.warmup_ratio, self.final_ratio, self.harden_ratio)
        require(
            all(v >= 0 for v in ratios) and sum(ratios) < 1,
            f"ArdConfig: warmup_ratio + harden_ratio + freeze_ratio must be < 1 and none negative, got {ratios}",
        )
        require(
            self.total_steps is None or self.total_steps >= 1,
            f"ArdConfig: total_steps must be >= 1, got {self.total_steps}",
        )
        require(self.update_interval >= 1, f"ArdConfig: update_interval must be >= 1, got {self.update_interval}")
        require(0 < self.gate_floor < 1, f"ArdConfig: gate_floor must be in (0, 1), got {self.gate_floor}")
        require(self.hysteresis >= 0, f"ArdConfig: hysteresis must be >= 0, got {self.hysteresis}")

        self._check_mode()

    def _check_mode(self) -> None:
        other = "paper" if self.mode == "anneal" else "anneal"
        default = {entry.name: entry.default for entry in fields(self)}
        for name in _ONLY_IN[other]:
            value = getattr(self, name)
            require(value == default[name], f"ArdConfig: {name} must come with mode='{other}', got {value!r} in "
                                            f"mode='{self.mode}'")  # fmt: skip
        require(self.budget == "auto" or self.tolerance == default["tolerance"],
                f"ArdConfig: tolerance must come with budget='auto', got budget={self.budget}")  # fmt: skip
        require(self.budget != "auto" or self.mode == "anneal",
                f"ArdConfig: budget='auto' must come with mode='anneal', got mode={self.mode!r}")  # fmt: skip
        require(self.budget != "auto" or self.allocation == "learned",
                f"ArdConfig: budget='auto' must come with allocation='learned', got {self.allocation!r}")  # fmt: skip
        require(math.isfinite(self.start) and self.start >= 1, f"ArdConfig: start must be >= 1, got {self.start}")
        require(0 <= self.step_power <= 1, f"ArdConfig: step_power must be in [0, 1], got {self.step_power}")
        require(self.serve_rank is None or self.serve_rank >= max(1, self.min_rank),
                f"ArdConfig: serve_rank must be at least r_min and 1, got {self.serve_rank}")  # fmt: skip
        require(
            self.budget_counts == "live" or self.granularity == "matrix",
            f"ArdConfig: granularity must be 'matrix' with budget_counts='exported', got {self.granularity!r}",
        )
        least = 0 if self.mode == "anneal" else 1
        require(
            self.r_min is None or least <= self.r_min <= self.r0,
            f"ArdConfig: r_min must be between {least} and r0 ({self.r0}) in mode='{self.mode}', got {self.r_min}",
        )
        require(self.mode == "anneal" or self.r_min in (None, 1), f"ArdConfig: r_min must be 1 in mode='paper', got "
                                                                  f"{self.r_min}")  # fmt: skip

    @property
    def min_rank(self) -> int:
        """Smallest rank of a unit."""
        if self.r_min is None:
            return 0 if self.mode == "anneal" else 1
        return self.r_min

    @property
    def final_ratio(self) -> float:
        """Last part of the run with constant ranks."""
        if self.freeze_ratio is None:
            return 0.5 if self.mode == "anneal" else 0.3
        return self.freeze_ratio

    @property
    def allowance(self) -> int | None:
        """The budget where it is a number."""
        return self.budget if isinstance(self.budget, int) else None

    @property
    def initial_rank(self) -> int:
        return self.max_rank if self.mode == "anneal" else self.r0

    @property
    def max_rank(self) -> int:
        if self.mode == "paper":
            return 4 * self.r0 if self.r_max is None else self.r_max
        fat = round(self.start * self.r0)
        return fat if self.r_max is None else min(fat, self.r_max)

    def share(self, name: str) -> int:
        """Return r0 of a module's units, its share of the budget."""
        key = pattern_key(self.rank_pattern, name)
        return self.r0 if key is None or self.rank_pattern is None else self.rank_pattern[key]

    def start_rank(self, name: str) -> int:
        if self.mode == "paper":
            return self.share(name)
        fat = round(self.start * self.share(name))
        return fat if self.r_max is None else min(fat, self.r_max)

    def limit(self, name: str) -> int:
        return self.max_rank if self.mode == "paper" else self.start_rank(name)

    def scaling(self, name: str) -> float:
        """Return lora_alpha / r0, or lora_alpha / sqrt(r0) with `use_rslora`, of a module, wherever ranks start."""
        key, r = pattern_key(self.alpha_pattern, name), self.share(name)
        alpha = self.lora_alpha if key is None or self.alpha_pattern is None else self.alpha_pattern[key]
        return alpha / (math.sqrt(r) if self.use_rslora else r)
