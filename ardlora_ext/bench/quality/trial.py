"""One run: a task, a method, a learning rate, a seed. The same loop for every method and bed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext.bench.quality.methods import Method, Plan, Ranks
from ardlora_ext.config.registry import config_to_dict
from ardlora_ext.errors import InputError
from ardlora_ext.ranks.controllers.svd.controller import SvdController

Row = dict[str, Any]

_WARMUP = 0.05
SCORE_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Measure:
    """What a bed is judged by: a key of its rows, and which way is better."""

    key: str
    better: Literal["lower", "higher"]
    label: str


class Task(Protocol):
    """One seed of a bed: a fresh model, its data, its truth.

    Attributes:
        model: not yet wrapped.
        base: config fields that belong to the bed.
        oracle: best ranks in hindsight for a budget in parameters, or None where nobody knows.
        clip: gradient norm to clip at, or None.
    """

    model: nn.Module
    base: Mapping[str, Any]
    clip: float | None

    def oracle(self, budget: int) -> Ranks | None:
        """Return the best ranks for a budget in parameters, or None where nobody knows them."""

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups of the wrapped model."""

    def loss(self) -> torch.Tensor:
        """Return the loss of the next training batch."""

    def valid(self) -> float:
        """Return the validation loss: what chooses the learning rate."""

    def test(self) -> Row:
        """Return what the bed measures after training."""


class Bed(Protocol):
    """A family of tasks, one per seed, and how they are compared."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def measure(self) -> Measure:
        """What it is judged by."""

    @property
    def rank(self) -> int:
        """Rank of uniform LoRA, whose parameters are everyone's budget."""

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""

    @property
    def lrs(self) -> tuple[float, ...]:
        """Learning rates to try."""

    def task(self, seed: int) -> Task:
        """Return the task of a seed; equal for all methods."""


@dataclass
class RankTrack:
    """Counts what ranks did during training.

    Attributes:
        moves: components given to or taken from units, in total.
        flips: changes of a unit's rank against the direction of its previous change.
        peak: most live adapter parameters at any step.
        mean: mean of them over the steps.
    """

    model: nn.Module
    controller: Any
    moves: int = 0
    flips: int = 0
    peak: int = 0
    _sum: int = 0
    _steps: int = 0
    _last: list[int] = field(default_factory=list)
    _direction: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._layers = list(ard.adapters(self.model).values())
        self.note()

    def note(self) -> None:
        """Look at the ranks after a step."""
        live = sum(layer.live_parameters for layer in self._layers)
        self.peak, self._sum, self._steps = max(self.peak, live), self._sum + live, self._steps + 1
        now = [rank for ranks in self.controller.ranks().values() for rank in ranks]
        for unit, (old, new) in enumerate(zip(self._last, now, strict=False)):
            if old != new:
                sign = 1 if new > old else -1
                self.moves += abs(new - old)
                self.flips += self._direction.get(unit, sign) != sign
                self._direction[unit] = sign
        self._last = now

    @property
    def mean(self) -> float:
        """Mean of the live adapter parameters over the steps."""
        return self._sum / self._steps


def plan_for(method: Method, bed: Bed, task: Task, seed: int) -> Plan:
    """Return what `method` gets on this task: the parameters of LoRA at the bed's rank, to everybody."""
    rank = method.rank(bed.rank)
    ard.wrap(task.model, ard.LoraConfig(r=rank, **task.base))
    budget, matrices = ard.parameters_report(task.model).live, len(ard.adapters(task.model))
    ard.unwrap(task.model)
    return Plan(rank, budget, matrices, bed.steps, seed, task.base, task.oracle(budget), task.loss)


def check_budget(model: nn.Module, method: Method, plan: Plan) -> None:
    """Check that the low-rank factors ended within the budget (gates and magnitudes are shown, not counted).

    A method that pays a price instead may end anywhere.

    Raises:
        InputError: they did not; the comparison would not be fair.
    """
    layers = ard.adapters(model).values()
    if method.recipe.counts == "ranks":
        spent, allowed = (
            sum(sum(layer.ranks) for layer in layers),
            plan.rank * sum(len(layer.ranks) for layer in layers),
        )
    else:
        spent, allowed = sum(layer.layout.parameters(layer.ranks) for layer in layers), plan.budget
    if spent > allowed and not method.priced:
        what = "ranks" if method.recipe.counts == "ranks" else "parameters of factors"
        raise InputError(f"{method.label}: must end within {allowed:,} {what}, got {spent:,}")


def run_trial(bed: Bed, method: Method, lr: float, seed: int, tuning: bool = False) -> Row:
    """Train once and return a row; a run that diverges has an infinite validation loss.

    A run that only tunes the learning rate stops at the validation loss: the test set stays unseen.

    Raises:
        MethodUnavailable: the build or the bed lacks something the method needs.
        InputError: the method does not fit the bed, or ended above the budget.
    """
    torch.manual_seed(seed)
    task = bed.task(seed)
    plan = plan_for(method, bed, task, seed)
    config = method.config(plan)
    try:
        ard.wrap(task.model, config)
        method.recipe.before(task.model, plan)
        optimizer = torch.optim.AdamW(task.groups(lr), lr=lr, weight_decay=0.0, foreach=True)
        holdout = (lambda: torch.tensor(task.valid())) if method.holdout else None
        controller = ard.attach(task.model, optimizer, total_steps=bed.steps, holdout=holdout)
        method.recipe.attached(task.model, controller)
    except ValueError as error:
        raise InputError(f"{method.label}: {error}") from error
    track = RankTrack(task.model, controller)
    started = time.process_time()
    half = _train(task, optimizer, bed.steps, track, tuning)
    controller.finalize()
    method.recipe.after(task.model, plan)
    seconds = time.process_time() - started
    check_budget(task.model, method, plan)
    measure = {"measure": bed.measure.key, "better": bed.measure.better}
    row = {"bed": bed.name, **measure, "method": method.label, "seed": seed, "lr": lr}
    result = _scores(task, bed.measure.key, tuning) if half is not None else _diverged(bed.measure.key)
    sizes = {"params": ard.parameters_report(task.model).live, "budget": plan.budget, "peak_params": track.peak}
    sizes["mean_params"] = round(track.mean)
    return {
        **row,
        "regret": None,
        "spearman": None,
        **result,
        "valid_half": None if tuning else half,
        **sizes,
        "moves": track.moves,
        "flips": track.flips,
        "seconds": seconds,
        "scores": score_quantiles(controller),
        "cuts": cuts(controller),
        "ranks": {name: list(layer.ranks) for name, layer in ard.adapters(task.model).items()},
        "config": config_to_dict(config),
    }


def score_quantiles(controller: Any) -> list[float] | None:
    """Return the `SCORE_QUANTILES` of the last importance scores, where a method has any."""
    if not isinstance(controller, SvdController):
        return None
    scores = [score for module in controller.scores().values() for score in module]
    return [float(q) for q in np.quantile(scores, SCORE_QUANTILES)]


def cuts(controller: Any) -> list[Row]:
    """Return what each cut of a run cost, made or held, where that was predicted and measured."""
    found = {}
    for record in getattr(controller, "records", []):
        if record.get("measured") is not None:
            found[record["step"], record["event"]] = {
                key: record[key] for key in ("step", "event", "predicted", "measured")
            }
    return list(found.values())


def _train(task: Task, optimizer: torch.optim.Optimizer, steps: int, track: RankTrack, tuning: bool) -> float | None:
    """Take all steps and return the validation loss at half of them; None when the loss is no longer a number.

    While tuning nobody asks for it: NaN.
    """
    warmup = max(1, round(_WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    half = math.nan
    task.model.train()
    for step in range(steps):
        if step == steps // 2 and not tuning:
            half = _valid(task)
        loss = task.loss()
        if not math.isfinite(loss.item()):
            return None
        loss.backward()  # type: ignore[no-untyped-call]
        if task.clip is not None:
            nn.utils.clip_grad_norm_(trained, task.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        track.note()
    return half


@torch.no_grad()
def _valid(task: Task) -> float:
    task.model.eval()
    value = task.valid()
    task.model.train()
    return value


def _diverged(key: str) -> Row:
    return {"valid": math.inf, key: math.nan}


@torch.no_grad()
def _scores(task: Task, key: str, tuning: bool) -> Row:
    task.model.eval()
    valid = task.valid()
    found: Row = {key: None} if tuning else task.test()
    if not math.isfinite(valid) or not (tuning or math.isfinite(found[key])):
        return _diverged(key)
    return {"valid": valid, **found}
