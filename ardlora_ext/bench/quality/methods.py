"""The methods that are compared: how each is configured for a bed, and what it does before and after training.

A method is named on the command line, with fields of its config to change after a colon: `ard`, `ard:tv=0`,
`elalora:k=4,b=2`; `rank=R` gives it the budget of LoRA at rank R instead of the bed's, `ard:l1=P` a fixed price or
`ard:budget=auto` a tolerance instead of a budget, and `holdout=True` the bed's validation data to judge by. A method
whose class or function this build does not have is reported by name; the others run.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext.config import AdapterConfig
from ardlora_ext.errors import InputError
from ardlora_ext.ranks import resize
from ardlora_ext.ranks.controllers.units import Units

Ranks = Mapping[str, Sequence[int]]

_LOOKS = 16  # training batches for the metric of the loss
FAT = 4  # how many times the mean rank a method that shrinks, or a unit that grows, may reach


class MethodUnavailable(Exception):  # noqa: N818 - says what happened to whom
    """This build, or this bed, lacks what a method needs; the message says what."""


@dataclass(frozen=True)
class Plan:
    """What every method of a comparison is given.

    Attributes:
        rank: of uniform LoRA, whose parameters are the budget.
        budget: adapter parameters at the end, at most.
        matrices: adapted.
        steps: optimizer steps.
        seed: of initial values and of a random allocation.
        base: config fields that belong to the bed: which modules, how heads are cut.
        oracle: best ranks in hindsight, where the bed knows them.
        loss: of the next training batch.
    """

    rank: int
    budget: int
    matrices: int
    steps: int
    seed: int
    base: Mapping[str, Any] = field(default_factory=dict)
    oracle: Ranks | None = None
    loss: Callable[[], torch.Tensor] | None = None

    def fields(self, rank: int, granularity: str | None = "matrix") -> dict[str, Any]:
        """Return the shared config fields; the update is scaled by 1 whatever the rank."""
        own = {"lora_alpha": float(rank), "seed": self.seed, **self.base}
        return own if granularity is None else own | {"granularity": granularity}


Prepare = Callable[[nn.Module, Plan], None]
_OURS = ("rank", "holdout")  # what may be changed and is no field of a config


def _nothing(_model: nn.Module, _plan: Plan) -> None:
    return None


@dataclass(frozen=True)
class Recipe:
    """How one method runs.

    Attributes:
        about: one line for tables.
        config: builds its config.
        before: acts on the wrapped model before the optimizer is made.
        attached: acts on the model and its controller before the first step.
        after: acts on the trained model.
        counts: what its budget is counted in. One that counts ranks ends above the parameters of the others where it
            prefers wide matrices; tables show both.
    """

    about: str
    config: Callable[[Plan], AdapterConfig]
    before: Prepare = _nothing
    attached: Callable[[nn.Module, Any], None] = lambda _model, _controller: None
    after: Prepare = _nothing
    counts: Literal["parameters", "ranks"] = "parameters"


@dataclass(frozen=True)
class Method:
    """A recipe under the label the user gave, with changed config fields."""

    label: str
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """What runs."""
        return RECIPES[self.name]

    @property
    def priced(self) -> bool:
        """Whether a price or a tolerance decides how large it gets, and no budget."""
        return self.changes.get("l1") is not None or self.changes.get("budget") == "auto"

    def rank(self, default: int) -> int:
        """Return the rank whose LoRA parameters are this method's budget."""
        return int(self.changes.get("rank", default))

    @property
    def holdout(self) -> bool:
        """Whether its controller sees the validation data."""
        return bool(self.changes.get("holdout", False))

    def config(self, plan: Plan) -> AdapterConfig:
        """Build the config.

        Raises:
            MethodUnavailable: the build or the bed lacks something.
            InputError: a changed field does not exist or has a bad value.
        """
        config = self.recipe.config(plan)
        changes = {key: value for key, value in self.changes.items() if key not in _OURS}
        if changes.get("l1") is not None:
            changes["budget"] = None
        known = sorted(entry.name for entry in dataclasses.fields(config))
        unknown = [key for key in changes if key not in known]
        if unknown:
            raise InputError(f"{self.label}: {unknown[0]} must be one of {', '.join((*_OURS, *known))}")
        try:
            return dataclasses.replace(config, **changes)
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.label}: {error}") from error


def parse(label: str) -> Method:
    """Parse `NAME` or `NAME:field=value,...`.

    Raises:
        InputError: no such method, or not of that form.
    """
    name, _, rest = label.partition(":")
    if name not in RECIPES:
        raise InputError(f"bench: method must be one of {', '.join(RECIPES)}, got {name!r}")
    changes = {}
    for part in rest.split(",") if rest else []:
        key, equals, text = part.partition("=")
        if not key or not equals:
            raise InputError(f"bench: method must read NAME:field=value,..., got {label!r}")
        try:
            changes[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            changes[key] = text
    if not isinstance(changes.get("rank", 1), int) or changes.get("rank", 1) < 1:
        raise InputError(f"{label}: rank must be a whole number from 1, got {changes['rank']!r}")
    return Method(label, name, changes)


def _needs(name: str) -> Any:
    """Return a public name of the package.

    Raises:
        MethodUnavailable: this build does not have it.
    """
    found = getattr(ard, name, None)
    if found is None:
        raise MethodUnavailable(f"this build has no ardlora_ext.{name}")
    return found


# --- recipes ----------------------------------------------------------------------------------------------------------


def _lora(plan: Plan) -> AdapterConfig:
    return ard.LoraConfig(r=plan.rank, **plan.fields(plan.rank))


def _dora(plan: Plan) -> AdapterConfig:
    config: AdapterConfig = _needs("DoraConfig")(r=plan.rank, **plan.fields(plan.rank))
    return config


def _ard(plan: Plan) -> AdapterConfig:
    return ard.ArdConfig(
        r0=plan.rank, r_max=FAT * plan.rank, budget=plan.budget, total_steps=plan.steps, **plan.fields(plan.rank, None)
    )


def _paper(plan: Plan) -> AdapterConfig:
    fields = plan.fields(plan.rank, "head")
    return ard.ArdConfig(
        mode="paper", r0=plan.rank, r_max=FAT * plan.rank, budget=plan.budget, total_steps=plan.steps, **fields
    )


def _ela(plan: Plan) -> AdapterConfig:
    pool = plan.matrices * min(2, plan.rank - 1)  # of candidates, with the published k = 2
    if pool < 2:
        raise MethodUnavailable("at rank 1 no unit has a component to give")
    config: AdapterConfig = _needs("ElaConfig")(
        r=plan.rank, b=min(4, pool // 2), total_steps=plan.steps, **plan.fields(plan.rank)
    )
    return config


def _ada(plan: Plan) -> AdapterConfig:
    start = round(1.5 * plan.rank + 0.5)
    config: AdapterConfig = _needs("AdaConfig")(
        target_r=plan.rank, init_r=start, total_steps=plan.steps, **plan.fields(start)
    )
    return config


def _fat_lora(plan: Plan) -> AdapterConfig:
    _needs("compress")
    return ard.LoraConfig(r=FAT * plan.rank, **plan.fields(FAT * plan.rank))


def _compress(model: nn.Module, plan: Plan) -> None:
    _needs("compress")(model, plan.budget)


def _compress_loss(model: nn.Module, plan: Plan) -> None:
    loss = plan.loss
    assert loss is not None
    _needs("compress")(model, plan.budget, metric="loss", batches=range(_LOOKS), loss_fn=lambda _model, _batch: loss())


def _compress_refine(model: nn.Module, plan: Plan) -> None:
    loss = plan.loss
    assert loss is not None
    _needs("compress")(
        model,
        plan.budget,
        metric="loss",
        batches=range(_LOOKS),
        loss_fn=lambda _model, _batch: loss(),
        refine=range(_LOOKS),
    )


def _compress_uniform(model: nn.Module, plan: Plan) -> None:
    layers = _needs("adapters")(model)
    _needs("svd_prune")(model, {n: [min(plan.rank, r) for r in layer.ranks] for n, layer in layers.items()})


def largest(layer: Any, count: int) -> tuple[int, ...]:
    """Return the components of a matrix with the largest ||a_i|| ||b_i||, in their order."""
    size = layer.lora_A.detach().norm(dim=1) * layer.lora_B.detach().norm(dim=1)
    return tuple(sorted(size[: layer.ranks[0]].topk(count).indices.tolist()))


def _dropping(model: nn.Module, controller: Any) -> None:
    """Let components be dropped where the controller would recompress updates."""
    layers = ard.adapters(model)
    decide: Callable[[], resize.RankUpdate | None] = controller.propose

    def propose() -> resize.RankUpdate | None:
        update = decide()
        if update is None:
            return None
        modules = {n: (resize.UnitUpdate(largest(layers[n], u.rank)),) for n, (u,) in update.modules.items()}
        return dataclasses.replace(update, modules=modules, leave="drop")

    controller.propose = propose


def _oracle_lora(plan: Plan) -> AdapterConfig:
    if plan.oracle is None:
        raise MethodUnavailable("the best ranks are not known on this bed")
    largest = max(1, *(rank for ranks in plan.oracle.values() for rank in ranks))
    heads = any(len(ranks) > 1 for ranks in plan.oracle.values())
    return ard.LoraConfig(r=largest, **plan.fields(largest, "head" if heads else "matrix"))


def _oracle(model: nn.Module, plan: Plan) -> None:
    assert plan.oracle is not None
    set_ranks(model, plan.oracle)


def _random_lora(plan: Plan) -> AdapterConfig:
    return ard.LoraConfig(r=FAT * plan.rank, **plan.fields(FAT * plan.rank))


def _random(model: nn.Module, plan: Plan) -> None:
    set_ranks(model, random_ranks(Units(ard.adapters(model)), plan.budget, plan.seed))


def set_ranks(model: nn.Module, ranks: Ranks) -> None:
    """Bring a freshly wrapped plain LoRA down to `ranks`."""
    modules = {name: tuple(resize.UnitUpdate(tuple(range(r))) for r in units) for name, units in ranks.items()}
    resize.apply(model, resize.RankUpdate(modules))


def random_ranks(units: Units, budget: float, seed: int) -> dict[str, list[int]]:
    """Give component after component to a unit drawn at random, as long as one fits into `budget`."""
    generator = np.random.default_rng(seed)
    ranks = np.zeros(len(units), dtype=np.int64)
    while True:
        costs = [units.costs.parameters(ranks + np.eye(len(units), dtype=np.int64)[u]) for u in range(len(units))]
        open_units = np.flatnonzero((np.array(costs) <= budget) & (ranks < units.limit))
        if not len(open_units):
            return units.by_module(ranks)
        ranks[generator.choice(open_units)] += 1


RECIPES: dict[str, Recipe] = {
    "lora": Recipe("one rank for all", _lora),
    "ard": Recipe("ARD-LoRA, from a fat start down to the budget", _ard),
    "ard_drop": Recipe("the same, smallest components dropped instead of recompressing", _ard, attached=_dropping),
    "paper": Recipe("ARD-LoRA as published, ranks from gradients under a budget", _paper),
    "elalora": Recipe("ElaLoRA, prune and expand", _ela, counts="ranks"),
    "adalora": Recipe("AdaLoRA, prune from 1.5 times the rank", _ada, counts="ranks"),
    "dora": Recipe("DoRA (weight-decomposed), one rank for all", _dora),
    "compress": Recipe(
        f"LoRA at {FAT} times the rank, then one global singular-value threshold", _fat_lora, after=_compress
    ),
    "compress_loss": Recipe(
        f"the same by what {_LOOKS} training batches say the loss would lose", _fat_lora, after=_compress_loss
    ),
    "compress_refine": Recipe(
        f"the same, then {_LOOKS} steps on the singular values alone", _fat_lora, after=_compress_refine
    ),
    "compress_uniform": Recipe("the same, to one rank for all", _fat_lora, after=_compress_uniform),
    "oracle": Recipe("LoRA at the best ranks, known in hindsight", _oracle_lora, before=_oracle),
    "random": Recipe("LoRA at ranks drawn at random", _random_lora, before=_random),
}
