"""The arithmetic behind two figures of ARD-LoRA's abstract (arXiv:2506.18267): 0.32 % of parameters, 41 % of memory.

The paper does not say which matrices are adapted, how heads share factors, or what the 41 % are relative to. What its
figures would mean on a given model can be computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ardlora_ext.config import AdapterConfig, ArdConfig
from ardlora_ext.model.heads import head_cut
from ardlora_ext.model.targets import plan_targets
from ardlora_ext.native.units import Factoring
from ardlora_ext.plan.memory import Plan, live_parameters, uniform

SHARE, SAVED = 0.0032, 0.41
_QV = ("q_proj", "v_proj", "query", "value", "q", "v", "q_lin", "v_lin")


@dataclass(frozen=True)
class Reading:
    """The mean rank at which one reading of "per-head adapters" has 0.32 % of the model's parameters.

    Attributes:
        targets: which matrices.
        factoring: `shared` (costs what one adapter per matrix costs) or `independent` (the paper taken literally).
        units: how many.
        per_rank: parameters of rank 1 everywhere.
        mean_rank: that gives the share.
    """

    targets: str
    factoring: str
    units: int
    per_rank: int
    mean_rank: float


def readings(model: nn.Module, plan: Plan) -> list[Reading]:
    """Return every reading that the model's names allow."""
    attention = [n for n in plan.layouts if head_cut(n) is not None]
    groups = {
        "q, v": [n for n in attention if n.rpartition(".")[2] in _QV],
        "attention": attention,
        "all linear": list(plan.layouts),
    }
    found = []
    for targets, names in groups.items():
        for factoring in ("shared", "independent") if names else ():
            config = _config(names, factoring)
            layouts = plan_targets(model, config)[1]
            per_rank = live_parameters(layouts, uniform(layouts, 1), config)
            units = sum(layout.units for layout in layouts.values())
            found.append(Reading(targets, factoring, units, per_rank, SHARE * plan.parameters / per_rank))
    return found


def _config(names: list[str], factoring: str) -> AdapterConfig:
    literal: Factoring = "independent" if factoring == "independent" else "shared"
    return ArdConfig(mode="paper", target_modules=names, granularity="head", factoring=literal, modules_to_save=())


@dataclass(frozen=True)
class Saving:
    """What is saved against a baseline, as a share of 1; negative: it costs more.

    Attributes:
        baseline: what it is compared with.
        state: of adapter weights, gradients and moments at the end.
        moving: the same while ranks move.
        total: of everything in memory, activations included, at the end.
    """

    baseline: str
    state: float
    moving: float
    total: float


def savings(plan: Plan) -> list[Saving]:
    """Return the savings in memory against PEFT's LoRA and full fine-tuning."""
    found = []
    for baseline, theirs in (("LoRA at r_max", plan.peft_max), ("LoRA at the mean rank", plan.peft_mean)):
        state, moving = (1 - ours.state / theirs.state for ours in (plan.final, plan.training))
        found.append(Saving(baseline, state, moving, 1 - plan.final.total / theirs.total))
    full_state = plan.full_bytes - plan.training.base
    full = plan.full_bytes + plan.training.activations
    state, moving = (1 - ours.state / full_state for ours in (plan.final, plan.training))
    return [*found, Saving("full fine-tuning", state, moving, 1 - plan.final.total / full)]
