"""What to adapt and how ranks are learned: one frozen dataclass per method, checked on construction."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

Granularity = Literal["head", "matrix", "layer"]

__all__ = [
    "AdaConfig",
    "AdapterConfig",
    "ArdConfig",
    "DoraConfig",
    "ElaConfig",
    "LoraConfig",
    "SvdConfig",
]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _choice(owner: str, name: str, value: object, allowed: Sequence[object]) -> None:
    _require(value in allowed, f"{owner}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What every method shares: where adapters go and how they are stored.

    Attributes:
        target_modules: as in PEFT: names or dotted suffixes, one regular expression matched against the full name, or
            `"all-linear"` (every linear layer but the output head). Default of QLoRA's recipe.
        exclude_modules: names, suffixes or a regular expression to leave out again.
        modules_to_save: modules (names or suffixes) that stay trainable and are saved whole, e.g. a classification
            head. `None`: the head of a transformers classification model, as PEFT does for its `task_type`.
        lora_alpha: the update is multiplied by `scaling = lora_alpha / r` with the initial rank, and that constant
            never changes when ranks do. Default as in PEFT.
        use_rslora: `scaling = lora_alpha / sqrt(r)` (arXiv:2312.03732).
        lora_dropout: probability of dropping an element of the adapter's input, in training mode. Default as in PEFT.
        granularity: what gets a rank of its own: an attention `head`, a whole `matrix`, or a transformer `layer` (its
            matrices move together). Matrices without heads (MLP) are always whole.
        factoring: for heads, `shared` (one full-width factor per matrix, head h uses its first r_h components) or
            `independent` (each head owns both its factors: the paper read literally, many more parameters).
        head_dim: head width for models without a transformers config, one number or one per name pattern (suffix).
            A value `("in", d)` cuts input columns (attention output), `d` or `("out", d)` output columns.
        capacity: `elastic` re-allocates when a rank leaves its size class, so memory follows the ranks; `fixed` keeps
            room for `r_max` and never moves, as DistributedDataParallel needs. `auto`: `fixed` in a run of several
            processes, else `elastic`.
        adapter_dtype: `float32`, or `auto` for the dtype of the layer.
        seed: for the initial values of new components.
        init: where lora_A starts, with lora_B = 0: `default` (Kaiming uniform), `orthogonal` rows, or `gradient`, the
            top directions of the gradient that `init_from_gradients` finds. `pissa` (fixed-rank LoRA only): both
            factors start as the principal components of the weight.
        packed: layers that read the same tensor (q, k, v; gate, up) add up its gradient in one buffer where that is
            faster; outputs are the same, gradients but for the last bits.
    """

    inits: ClassVar[tuple[str, ...]] = ("default", "orthogonal", "gradient")

    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    modules_to_save: Sequence[str] | None = None
    lora_alpha: float = 8.0
    use_rslora: bool = False
    lora_dropout: float = 0.0
    granularity: Granularity = "matrix"
    factoring: Literal["shared", "independent"] = "shared"
    head_dim: int | Mapping[str, int | tuple[str, int]] | None = None
    capacity: Literal["auto", "elastic", "fixed"] = "auto"
    adapter_dtype: Literal["float32", "auto"] = "float32"
    seed: int = 0
    init: Literal["default", "orthogonal", "pissa", "gradient"] = "default"
    packed: bool = True

    def __post_init__(self) -> None:
        owner = type(self).__name__
        _choice(owner, "init", self.init, self.inits)
        _choice(owner, "granularity", self.granularity, ("head", "matrix", "layer"))
        _choice(owner, "factoring", self.factoring, ("shared", "independent"))
        _choice(owner, "capacity", self.capacity, ("auto", "elastic", "fixed"))
        _choice(owner, "adapter_dtype", self.adapter_dtype, ("float32", "auto"))
        _require(
            math.isfinite(self.lora_alpha) and self.lora_alpha > 0,
            f"{owner}: lora_alpha must be > 0, got {self.lora_alpha}",
        )
        _require(0 <= self.lora_dropout < 1, f"{owner}: lora_dropout must be in [0, 1), got {self.lora_dropout}")
        _require(len(self.target_modules) > 0, f"{owner}: target_modules must name something, got nothing")

    @property
    def initial_rank(self) -> int:
        """Rank every unit starts with."""
        raise NotImplementedError

    @property
    def max_rank(self) -> int:
        """Largest rank a unit may reach."""
        return self.initial_rank

    @property
    def scaling(self) -> float:
        """Constant in front of the update: lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`."""
        r = self.initial_rank
        return self.lora_alpha / (math.sqrt(r) if self.use_rslora else r)


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """Plain LoRA (arXiv:2106.09685): one fixed rank, W' = W + (lora_alpha / r) B A.

    Attributes:
        r: rank. Default as in PEFT.
    """

    inits: ClassVar[tuple[str, ...]] = (*AdapterConfig.inits, "pissa")

    r: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.r >= 1, f"LoraConfig: r must be >= 1, got {self.r}")

    @property
    def initial_rank(self) -> int:
        return self.r


@dataclass(frozen=True, kw_only=True)
class DoraConfig(LoraConfig):
    """DoRA (arXiv:2402.09353): W' = m (W + (lora_alpha / r) B A) / ||W + (lora_alpha / r) B A||_row, m trained.

    Fixed rank as plain LoRA; a layer costs `out_features` parameters more, its magnitudes. Base layers need a dense
    floating-point weight.
    """

    inits: ClassVar[tuple[str, ...]] = AdapterConfig.inits


@dataclass(frozen=True, kw_only=True)
class ArdConfig(AdapterConfig):
    """ARD-LoRA (arXiv:2506.18267): a learned factor alpha per unit, rank r = max(1, round(r0 * alpha)).

    alpha minimises  L_task + price * sum_u w_u |alpha_u| + price * tv/2 * sum_u (alpha_u(t) - alpha_u(t-1))^2  by
    proximal steps on the gradient of a fractional ("ramp") gate. The paper gives no values: defaults are ours, measured
    on the bench of this project.

    Attributes:
        r0: base rank; every unit starts there (alpha = 1). At least 1.
        r_max: largest rank of a unit; `None`: 4 * r0.
        budget: adapter parameters allowed at the end; the price is then found by dual ascent. `None` with `l1=None`:
            the parameters of plain LoRA at rank r0, so ranks move but never cost more in total.
        l1: a fixed price instead of a budget, in units of the typical (RMS) gradient of alpha.
        tv: beta, strength of the total variation within the regulariser.
        variation: `temporal_sq` (the reading that fits the paper's theorem; its proximal form is a damper),
            `temporal_abs`, `layer_sq`, `layer_abs` (over neighbouring layers), or `none`.
        variation_form: `prox` solves each step exactly, `explicit` follows the gradient.
        gate: how a soft rank gates components: `ramp` (fractional boundary component), `ste` (whole ranks forward, the
            ramp's slope backward), `sigmoid` (every component has a slope), `scale` (alpha multiplies the update).
        gate_width: width of the sigmoid, in ranks.
        reorder: before each change of ranks, bring fully open components into the order of ||a_j|| ||b_j||, so that the
            least useful is the next to close.
        slope: what stands for dL/drho. `secant`: minus the loss that the unit's next component is worth as a whole,
            estimated from its singular value and the unit's Fisher information. `tangent`: the derivative by the gate
            of the boundary component, the literal reading; blind to a component whose factors are already fitted.
        lr_alpha: step of alpha.
        lr_price: dual step on the price per relative budget excess.
        cost_weighted: weight the l1 term by what a component of the unit costs in parameters (mean 1).
        normalize: divide alpha's gradient by its running RMS over all units, so that `lr_alpha` and `l1` mean the same
            for every model. Off: the raw gradient, as the paper's step-size theorem reads.
        total_steps: optimizer steps of the run; needed to freeze. `None`: ranks adapt until `controller.finalize()`.
        warmup_ratio: first part of the run with constant ranks (B starts at zero and says nothing yet).
        freeze_ratio: last part of the run with constant, whole ranks.
        harden_ratio: part before the freeze in which gates move smoothly to 0 or 1.
        update_interval: optimizer steps between changes of the allocated ranks.
        gate_floor: smallest gate of the boundary component, so that it is trained and a unit can grow.
        hysteresis: ranks a unit must fall below before a component with a closed gate is given back.
    """

    r0: int = 8
    r_max: int | None = None
    granularity: Granularity = "head"
    budget: int | None = None
    l1: float | None = None
    tv: float = 1.0
    variation: Literal["temporal_sq", "temporal_abs", "layer_sq", "layer_abs", "none"] = "temporal_sq"
    variation_form: Literal["prox", "explicit"] = "prox"
    gate: Literal["ramp", "ste", "sigmoid", "scale"] = "ramp"
    gate_width: float = 0.5
    reorder: bool = True
    slope: Literal["secant", "tangent"] = "secant"
    lr_alpha: float = 0.02
    lr_price: float = 0.5
    cost_weighted: bool = True
    normalize: bool = True
    total_steps: int | None = None
    warmup_ratio: float = 0.1
    freeze_ratio: float = 0.3
    harden_ratio: float = 0.05
    update_interval: int = 10
    gate_floor: float = 0.1
    hysteresis: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("slope", ("secant", "tangent")),
            ("gate", ("ramp", "ste", "sigmoid", "scale")),
            ("variation", ("temporal_sq", "temporal_abs", "layer_sq", "layer_abs", "none")),
            ("variation_form", ("prox", "explicit")),
        ):
            _choice("ArdConfig", name, getattr(self, name), allowed)
        _require(self.gate_width > 0, f"ArdConfig: gate_width must be > 0, got {self.gate_width}")
        _require(self.r0 >= 1, f"ArdConfig: r0 must be >= 1, got {self.r0}")
        _require(self.r_max is None or self.r_max >= self.r0, f"ArdConfig: r_max must be >= r0, got {self.r_max}")
        _require(self.budget is None or self.l1 is None, "ArdConfig: budget and l1 must not both be given")
        _require(self.budget is None or self.budget >= 1, f"ArdConfig: budget must be >= 1, got {self.budget}")
        _require(self.l1 is None or self.l1 >= 0, f"ArdConfig: l1 must be >= 0, got {self.l1}")
        _require(self.tv >= 0, f"ArdConfig: tv must be >= 0, got {self.tv}")
        for name in ("lr_alpha", "lr_price"):
            _require(getattr(self, name) > 0, f"ArdConfig: {name} must be > 0, got {getattr(self, name)}")
        ratios = (self.warmup_ratio, self.freeze_ratio, self.harden_ratio)
        _require(
            all(v >= 0 for v in ratios) and sum(ratios) < 1,
            f"ArdConfig: warmup_ratio + harden_ratio + freeze_ratio must be < 1 and none negative, got {ratios}",
        )
        _require(
            self.total_steps is None or self.total_steps >= 1,
            f"ArdConfig: total_steps must be >= 1, got {self.total_steps}",
        )
        _require(self.update_interval >= 1, f"ArdConfig: update_interval must be >= 1, got {self.update_interval}")
        _require(0 < self.gate_floor < 1, f"ArdConfig: gate_floor must be in (0, 1), got {self.gate_floor}")
        _require(self.hysteresis >= 0, f"ArdConfig: hysteresis must be >= 0, got {self.hysteresis}")

    @property
    def initial_rank(self) -> int:
        return self.r0

    @property
    def max_rank(self) -> int:
        return 4 * self.r0 if self.r_max is None else self.r_max


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
        _require(
            own_rows,
            f"{owner}: granularity must be 'matrix', or 'head' with factoring='independent' (a unit must own rows), "
            f"got {self.granularity!r} with {self.factoring!r}",
        )
        _choice(owner, "orth", self.orth, (None, "squared", "norm"))
        _choice(owner, "start", self.start, ("gaussian", "orthonormal"))
        for name in ("deltaT", "orth_interval"):
            _require(getattr(self, name) >= 1, f"{owner}: {name} must be >= 1, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            _require(0 < getattr(self, name) < 1, f"{owner}: {name} must be in (0, 1), got {getattr(self, name)}")
        for name in ("tinit", "tfinal"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"{owner}: {name} must be >= 0, got {value}")
        _require(
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
        _require(
            total_steps - tinit - tfinal >= self.shortest,
            f"{type(self).__name__}: total_steps must be >= tinit + tfinal + {self.shortest} = "
            f"{tinit + tfinal + self.shortest}, got {total_steps}; lower tinit, tfinal or deltaT, or train longer",
        )
        return tinit, tfinal

    @property
    def orth_form(self) -> Literal["squared", "norm"]:
        """Form of the regulariser in use."""
        return "norm" if self.orth is None else self.orth


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
        _choice("ElaConfig", "mode", self.mode, ("paper", "code"))
        _choice("ElaConfig", "new_norm", self.new_norm, ("mean", "unit"))
        _choice("ElaConfig", "allocation", self.allocation, ("importance", "random_grow", "random", "none"))
        _require(self.target_r is None or self.target_r >= 1, f"ElaConfig: target_r must be >= 1, got {self.target_r}")
        for name in ("r", "k", "b"):
            _require(getattr(self, name) >= 1, f"ElaConfig: {name} must be >= 1, got {getattr(self, name)}")
        _require(self.r_max is None or self.r_max >= self.r, f"ElaConfig: r_max must be >= r, got {self.r_max}")
        _require(
            self.capacity != "fixed" or self.r_max is not None,
            "ElaConfig: r_max must be given with capacity='fixed', got None",
        )
        _require(self.grace is None or self.grace >= 0, f"ElaConfig: grace must be >= 0, got {self.grace}")

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


@dataclass(frozen=True, kw_only=True)
class AdaConfig(SvdConfig):
    """AdaLoRA (arXiv:2303.10512): from `init_r` components per unit down to the best `target_r` on average.

    The budget falls as a cubic of the progress. `ranks()` are the components not masked; a unit may end with none.

    Attributes:
        init_r: rank every unit starts with; it sets `scaling`. Default as in PEFT.
        target_r: mean rank at the end. Default as in PEFT.
        removal: take components out instead of masking them: memory falls with the budget, none comes back. Masked
            ones are taken out after the last step.
        orth_reg_weight: as in PEFT.
    """

    init_r: int = 12
    target_r: int = 8
    removal: bool = False
    orth_reg_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.target_r >= 1, f"AdaConfig: target_r must be >= 1, got {self.target_r}")
        _require(
            self.init_r >= self.target_r,
            f"AdaConfig: init_r must be >= target_r = {self.target_r}, got {self.init_r}",
        )

    @property
    def initial_rank(self) -> int:
        return self.init_r
