"""What to adapt and how ranks are learned: one frozen dataclass per method, checked on construction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Granularity = Literal["head", "matrix", "layer"]

__all__ = ["AdapterConfig", "ArdConfig", "LoraConfig", "config_from_dict", "config_to_dict"]


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
        granularity: what gets a rank of its own: an attention `head`, a whole `matrix`, or a transformer `layer` (its
            matrices move together). Matrices without heads (MLP) are always whole.
        factoring: for heads, `shared` (one full-width factor per matrix, head h uses its first r_h components) or
            `independent` (each head owns both its factors: the paper read literally, many more parameters).
        head_dim: head width for models without a transformers config, one number or one per name pattern (suffix).
            A value `("in", d)` cuts input columns (attention output), `d` or `("out", d)` output columns.
        capacity: `elastic` re-allocates when a rank leaves its size class, so memory follows the ranks; `fixed` keeps
            room for `r_max` and never moves.
        adapter_dtype: `float32`, or `auto` for the dtype of the layer.
        seed: for the initial values of new components.
    """

    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    modules_to_save: Sequence[str] | None = None
    lora_alpha: float = 8.0
    use_rslora: bool = False
    granularity: Granularity = "matrix"
    factoring: Literal["shared", "independent"] = "shared"
    head_dim: int | Mapping[str, int | tuple[str, int]] | None = None
    capacity: Literal["elastic", "fixed"] = "elastic"
    adapter_dtype: Literal["float32", "auto"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        _choice(owner, "granularity", self.granularity, ("head", "matrix", "layer"))
        _choice(owner, "factoring", self.factoring, ("shared", "independent"))
        _choice(owner, "capacity", self.capacity, ("elastic", "fixed"))
        _choice(owner, "adapter_dtype", self.adapter_dtype, ("float32", "auto"))
        _require(
            math.isfinite(self.lora_alpha) and self.lora_alpha > 0,
            f"{owner}: lora_alpha must be > 0, got {self.lora_alpha}",
        )
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

    r: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.r >= 1, f"LoraConfig: r must be >= 1, got {self.r}")

    @property
    def initial_rank(self) -> int:
        return self.r


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
        tv: beta, strength of the temporal total variation (proximal form: a damper).
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
        _choice("ArdConfig", "slope", self.slope, ("secant", "tangent"))
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


_METHODS: dict[str, type[AdapterConfig]] = {"lora": LoraConfig, "ard": ArdConfig}


def config_to_dict(config: AdapterConfig) -> dict[str, Any]:
    """Return the JSON form of a config: its fields and `method`."""
    method = next(name for name, cls in _METHODS.items() if cls is type(config))
    return {"method": method, **dataclasses.asdict(config)}


def config_from_dict(values: Mapping[str, Any]) -> AdapterConfig:
    """Rebuild a config from `config_to_dict`; raises ValueError on an unknown method or field."""
    fields = dict(values)
    method = fields.pop("method", None)
    if method not in _METHODS:
        raise ValueError(f"config: method must be one of {', '.join(_METHODS)}, got {method!r}")
    try:
        return _METHODS[method](**fields)
    except TypeError as cause:
        raise ValueError(f"config: fields must be those of {_METHODS[method].__name__} ({cause})") from cause
