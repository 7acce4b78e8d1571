"""What every method shares: where adapters go and how they are stored."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ardlora_ext.config.checks import choice, normalise, require
from ardlora_ext.config.patterns import check_expression, pattern_key

if TYPE_CHECKING:
    from typing_extensions import Self

Granularity = Literal["head", "matrix", "layer"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What every method shares: where adapters go and how they are stored.

    Attributes:
        target_modules: as in PEFT: names or dotted suffixes, one regular expression matched against the full name, or
            `"all-linear"` (every linear layer but the output head). Default of QLoRA's recipe.
        exclude_modules: names, suffixes or a regular expression to leave out again.
        modules_to_save: modules (names or suffixes) that stay trainable and are saved whole, e.g. a classification
            head. `None`: the head of a transformers classification model, as PEFT does for its `task_type`.
        trainable_token_indices: as in PEFT: rows of the input embeddings that train alone, or by the name of an
            embedding; the output head goes along where it is tied. For new tokens, at a fraction of `modules_to_save`.
        layers_to_transform: as in PEFT: adapt only layers of these numbers, among those that `target_modules` names; a
            full name is taken whatever its number. Not with a regular expression; `"all-linear"` may be narrowed so.
        layers_pattern: as in PEFT: what the lists of these layers are called, where a model has several.
        rank_pattern: as in PEFT: ranks to start with, by regular expression for the end of a name; the first that fits
            counts. Not for ElaLoRA and AdaLoRA, which share out ranks from one start.
        alpha_pattern: as in PEFT: the same for `lora_alpha`.
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
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
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

    def __new__(cls, *values: Any, **options: Any) -> Self:
        """Name what was meant by an option that is not there: methods call the rank what their papers call it."""
        known = [entry.name for entry in fields(cls)]
        for name in options:
            if name not in known:
                near = [*difflib.get_close_matches(name, known), *(n for n in known if name in n.split("_"))]
                hint = f"near misses: {', '.join(dict.fromkeys(near))}" if near else f"see help({cls.__name__})"
                raise TypeError(f"{cls.__name__}: options must be those of the method, got {name!r}; {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        owner = type(self).__name__
        normalise(self)
        choice(owner, "init", self.init, self.inits)
        choice(owner, "granularity", self.granularity, ("head", "matrix", "layer"))
        choice(owner, "factoring", self.factoring, ("shared", "independent"))
        choice(owner, "capacity", self.capacity, ("auto", "elastic", "fixed"))
        choice(owner, "adapter_dtype", self.adapter_dtype, ("float32", "auto"))
        require(
            math.isfinite(self.lora_alpha) and self.lora_alpha > 0,
            f"{owner}: lora_alpha must be > 0, got {self.lora_alpha}",
        )
        require(0 <= self.lora_dropout < 1, f"{owner}: lora_dropout must be in [0, 1), got {self.lora_dropout}")
        require(len(self.target_modules) > 0, f"{owner}: target_modules must name something, got nothing")
        for option in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, option) or ():
                check_expression(f"{owner}: {option}", pattern)
        require(
            self.layers_to_transform is not None or not self.layers_pattern,
            f"{owner}: layers_pattern must come with layers_to_transform",
        )
        expression = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        require(
            self.layers_to_transform is None or not expression,
            f"{owner}: layers_to_transform must come with names as target_modules, got the regular expression "
            f"{self.target_modules!r}, which can say numbers itself",
        )

    @property
    def initial_rank(self) -> int:
        """Rank every unit starts with."""
        raise NotImplementedError

    @property
    def max_rank(self) -> int:
        """Largest rank a unit may reach."""
        return self.initial_rank

    def start_rank(self, name: str) -> int:
        """Return the rank that the units of a module start with."""
        key = pattern_key(self.rank_pattern, name)
        return self.initial_rank if key is None or self.rank_pattern is None else self.rank_pattern[key]

    def limit(self, name: str) -> int:
        """Return the largest rank that a unit of a module may reach."""
        return self.max_rank

    def scaling(self, name: str) -> float:
        """Return the constant in front of a module's update: lora_alpha / r, lora_alpha / sqrt(r) with `use_rslora`."""
        key, r = pattern_key(self.alpha_pattern, name), self.start_rank(name)
        alpha = self.lora_alpha if key is None or self.alpha_pattern is None else self.alpha_pattern[key]
        return alpha / (math.sqrt(r) if self.use_rslora else r)
