"""Parameters and bytes of adapters at given ranks, beside PEFT's: exact formulas over the units of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ardlora_ext.config import AdaConfig, AdapterConfig, ArdConfig, DoraConfig, SvdConfig
from ardlora_ext.layers.rows import capacity_of
from ardlora_ext.model.targets import plan_targets
from ardlora_ext.native.dispatch import whole_chunks
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.plan.trace import Trace, trace

Layouts = Mapping[str, UnitLayout]
Ranks = Mapping[str, Sequence[int]]
Json = dict[str, Any]

CURVE = (1, 2, 4, 8, 16, 32, 64)
_ARRAYS = 12  # float64 or int64 numbers that ARD's controller keeps of each unit, besides its spectrum


@dataclass(frozen=True)
class Bytes:
    """What one training process holds, in bytes.

    Attributes:
        base: frozen weights.
        weights: of adapters, with the slack of their capacity, and gates.
        gradients: of adapters.
        moments: Adam's two.
        scores: what the controller keeps.
        head: weights, gradients and moments of `modules_to_save`.
        activations: saved for backward.
    """

    base: int
    weights: int
    gradients: int
    moments: int
    scores: int
    head: int
    activations: int

    @property
    def state(self) -> int:
        """All that belongs to adapters but activations."""
        return self.weights + self.gradients + self.moments + self.scores

    @property
    def total(self) -> int:
        """Everything."""
        return self.base + self.state + self.head + self.activations


@dataclass(frozen=True)
class Point:
    """A point of the budget curve: all units at one rank (or at the most they can use).

    Attributes:
        rank: of every unit.
        parameters: live adapter parameters.
        share: of the base model's parameters.
        state: bytes of weights, gradients, moments and scores.
        activations: bytes saved for backward.
        peft_parameters: of PEFT's LoRA at this rank.
        peft_state: bytes of it.
        peft_activations: bytes saved for backward with it.
    """

    rank: int
    parameters: int
    share: float
    state: int
    activations: int
    peft_parameters: int
    peft_state: int
    peft_activations: int


@dataclass(frozen=True)
class Kind:
    """Matched modules of one shape and cut."""

    name: str
    modules: int
    units: int
    in_features: int
    out_features: int
    cut: str
    parameters_per_rank: int


@dataclass(frozen=True)
class Plan:
    """What `plan` found; `as_json` for machines, `ardlora_ext.plan.show` for people.

    Attributes:
        model: its name.
        dtype: of the base weights.
        batch: sequences (or images) of a step.
        length: tokens of each.
        config: of the adapters.
        parameters: of the base model.
        trained_whole: parameters of `modules_to_save`.
        layouts: units by module.
        kinds: what was matched.
        training: bytes while ranks move.
        final: bytes at the end, at the mean rank of the budget.
        peft_mean: bytes of PEFT's LoRA at that rank.
        peft_max: bytes of PEFT's LoRA at the largest rank a unit may reach.
        curve: parameters and bytes over the mean rank.
        budget: adapter parameters at the end.
        checkpointed: activations with every layer checkpointed, of `training` (an estimate).
        rows: of activations by module.
        problem: why activations are not known (then they are 0), or "".
    """

    model: str
    dtype: str
    batch: int
    length: int
    config: AdapterConfig
    parameters: int
    trained_whole: int
    layouts: Layouts
    kinds: list[Kind]
    training: Bytes
    final: Bytes
    peft_mean: Bytes
    peft_max: Bytes
    curve: list[Point]
    budget: int
    checkpointed: int
    rows: Mapping[str, int]
    problem: str

    @property
    def units(self) -> int:
        """Number of units."""
        return sum(layout.units for layout in self.layouts.values())

    @property
    def full_bytes(self) -> int:
        """Weights, gradients and Adam's moments of full fine-tuning, all in the dtype of the weights, as in torch."""
        return 4 * self.training.base

    def as_json(self) -> Json:
        """Return numbers and strings only."""
        names = ("training", "final", "peft_mean", "peft_max")
        sizes: Json = {n: {**asdict(getattr(self, n)), "total": getattr(self, n).total} for n in names}
        plain = (
            "model",
            "dtype",
            "batch",
            "length",
            "parameters",
            "trained_whole",
            "budget",
            "checkpointed",
            "units",
            "problem",
        )
        return {
            **{name: getattr(self, name) for name in plain},
            "method": type(self.config).__name__,
            "modules": len(self.layouts),
            "kinds": [asdict(kind) for kind in self.kinds],
            "bytes": sizes,
            "curve": [asdict(point) for point in self.curve],
        }


def ranks_of(layouts: Layouts, rank: Callable[[str], int]) -> dict[str, list[int]]:
    """Return for all units of a module the rank that belongs to its name, or what a unit can use."""
    return {name: [min(rank(name), layout.max_rank)] * layout.units for name, layout in layouts.items()}


def uniform(layouts: Layouts, rank: int) -> dict[str, list[int]]:
    """Return ranks of `rank` everywhere, or of what a unit can use."""
    return ranks_of(layouts, lambda _: rank)


def live_parameters(layouts: Layouts, ranks: Ranks, config: AdapterConfig) -> int:
    """Return the adapter parameters in use, counted as `parameters_report` counts them."""
    factors = sum(layout.parameters(ranks[name]) for name, layout in layouts.items())
    if isinstance(config, SvdConfig):
        return factors + sum(sum(units) for units in ranks.values())
    if isinstance(config, DoraConfig):
        return factors + sum(layout.out_features for layout in layouts.values())
    return factors


def _capacities(name: str, layout: UnitLayout, ranks: Sequence[int], config: AdapterConfig) -> tuple[int, int]:
    """Return the rows that (lora_A, lora_B) of a module hold."""
    if config.capacity == "fixed":
        return layout.rows([min(config.limit(name), layout.max_rank)] * layout.units)
    a, b = layout.rows(ranks)
    return capacity_of(a), capacity_of(b)


def adapter_bytes(layouts: Layouts, ranks: Ranks, config: AdapterConfig, itemsize: int = 4) -> tuple[int, int, int]:
    """Return bytes of (weights and gates, gradients, scores); Adam's moments are twice the gradients.

    Args:
        layouts: units by module.
        ranks: of each unit by module.
        config: of the adapters.
        itemsize: bytes of an adapter's number.
    """
    trained = fixed = scores = 0
    for name, layout in layouts.items():
        a, b = _capacities(name, layout, ranks[name], config)
        trained += itemsize * (a * layout.a_width + b * layout.b_width)
        gated = a if layout.gate_on_a else b
        if isinstance(config, ArdConfig) and config.mode == "paper":
            fixed += 4 * gated
            scores += 8 * layout.units * (_ARRAYS + max(ranks[name]))
        if isinstance(config, SvdConfig):
            trained += 4 * gated
            scores += 2 * 4 * (layout.parameters(ranks[name]) + sum(ranks[name]))
        if isinstance(config, DoraConfig):
            trained += 4 * layout.out_features
    return trained + fixed, trained, scores


def hidden_bytes(layouts: Layouts, ranks: Ranks, config: AdapterConfig, rows: Mapping[str, int]) -> int:
    """Return the bytes of all H in float32; CUDA keeps 16 bits where x has.

    H is [M, the rows that both factors hold], or of experts, each with rows of its own, [M, the largest rank].
    """

    def columns(name: str, layout: UnitLayout) -> int:
        if layout.kind == "experts":
            return whole_chunks(max(ranks[name]))
        return min(_capacities(name, layout, ranks[name], config))

    return sum(4 * rows.get(name, 0) * columns(name, layout) for name, layout in layouts.items())


def peft_parameters(layouts: Layouts, rank: Callable[[str], int]) -> int:
    """Return the parameters of plain LoRA at the rank of each module."""
    matrices = {name: lay.units if lay.kind == "experts" else 1 for name, lay in layouts.items()}
    return sum(
        rank(name) * n * (layouts[name].in_features + layouts[name].out_features) for name, n in matrices.items()
    )


def make_plan(name: str, model: nn.Module, config: AdapterConfig, batch: int, length: int) -> Plan:
    """Return what adapters of `config` on `model` would cost.

    Args:
        name: of the model, for people.
        model: a skeleton, see `ardlora_ext.plan.skeleton`.
        config: of the adapters.
        batch: sequences (or images) of a step, on one device.
        length: tokens of each.

    Raises:
        ValueError: as `wrap`.
    """
    _, layouts, saved = plan_targets(model, config)
    traced = trace(model, config, batch, length)
    unique = {id(p): p for p in model.parameters()}.values()
    base = sum(p.numel() * p.element_size() for p in unique)
    whole = [p for n in saved for p in model.get_submodule(n).parameters()]
    dtype = next(iter(unique)).dtype
    itemsize = dtype.itemsize if config.adapter_dtype == "auto" else 4
    context = _Context(layouts, config, traced, base, 3 * sum(p.numel() * p.element_size() for p in whole), itemsize)
    ahead = isinstance(config, ArdConfig) and config.mode == "paper"  # the look-ahead component
    largest = config.limit if isinstance(config, ArdConfig) else config.start_rank
    last = _last(config)
    parameters = sum(p.numel() for p in unique)
    training = context.ours(lambda name: config.start_rank(name) + ahead)
    budget = config.allowance if isinstance(config, ArdConfig) else None
    return Plan(
        model=name,
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        length=length,
        config=config,
        parameters=parameters,
        trained_whole=sum(p.numel() for p in whole),
        layouts=layouts,
        kinds=_kinds(layouts),
        training=training,
        final=context.ours(last),
        peft_mean=context.peft(last),
        peft_max=context.peft(largest),
        curve=[_point(context, rank, parameters) for rank in CURVE],
        budget=live_parameters(layouts, ranks_of(layouts, last), config) if budget is None else budget,
        checkpointed=training.activations - traced.ours + traced.checkpointed,
        rows=traced.rows,
        problem=traced.problem,
    )


def _last(config: AdapterConfig) -> Callable[[str], int]:
    """Return the mean rank of a module's units at the end of a run, by its name; with `budget="auto"` the most."""
    if isinstance(config, ArdConfig):
        return config.start_rank if config.budget == "auto" else config.share
    if isinstance(config, AdaConfig):
        return lambda _: config.target_r
    return config.start_rank


@dataclass(frozen=True)
class _Context:
    layouts: Layouts
    config: AdapterConfig
    traced: Trace
    base: int
    head: int
    itemsize: int

    def ours(self, rank: Callable[[str], int]) -> Bytes:
        ranks = ranks_of(self.layouts, rank)
        weights, gradients, scores = adapter_bytes(self.layouts, ranks, self.config, self.itemsize)
        kept = self.traced.ours + hidden_bytes(self.layouts, ranks, self.config, self.traced.rows)
        return Bytes(self.base, weights, gradients, 2 * gradients, scores, self.head, kept)

    def peft(self, rank: Callable[[str], int]) -> Bytes:
        size = 4 * peft_parameters(self.layouts, rank)
        kept = self.traced.peft + sum(
            4 * rank(name) * rows for name, rows in self.traced.rows.items() if self.layouts[name].kind != "experts"
        )
        return Bytes(self.base, size, size, 2 * size, 0, self.head, kept)


def _point(context: _Context, rank: int, total: int) -> Point:
    ours, peft = context.ours(lambda _: rank), context.peft(lambda _: rank)
    live = live_parameters(context.layouts, uniform(context.layouts, rank), context.config)
    theirs = peft_parameters(context.layouts, lambda _: rank)
    return Point(rank, live, live / total, ours.state, ours.activations, theirs, peft.state, peft.activations)


_CUTS = {"matrix": "whole", "out_heads": "output rows", "in_heads": "input columns", "experts": "experts"}


def _kinds(layouts: Layouts) -> list[Kind]:
    groups: dict[tuple[str, UnitLayout], int] = {}
    for name, layout in layouts.items():
        key = name.rpartition(".")[2], layout
        groups[key] = groups.get(key, 0) + 1
    return [
        Kind(
            leaf,
            count,
            count * layout.units,
            layout.in_features,
            layout.out_features,
            _CUTS[layout.kind],
            layout.parameters([1] * layout.units),
        )
        for (leaf, layout), count in groups.items()
    ]
