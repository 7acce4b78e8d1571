"""One trained adapter at many sizes: cut, score, and put everything back bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ardlora_ext.model.parameters import parameters_report
from ardlora_ext.model.record import adapters
from ardlora_ext.ranks.controllers.trial import scored, tried
from ardlora_ext.ranks.controllers.worth import Choice, allocate, least_cost, offers
from ardlora_ext.ranks.loss_metric import Batch, LossFunction, measured, model_loss
from ardlora_ext.ranks.svd_prune import check_settled

SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class Point:
    """An adapter of one size.

    Attributes:
        parameters: live adapter parameters; give them to `compress` for this adapter.
        exported: parameters of its portable PEFT file.
        score: what it was scored.
        ranks: by module, of each unit.
    """

    parameters: int
    exported: int
    score: float
    ranks: dict[str, list[int]]


def frontier(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss_fn: LossFunction | None = None,
    score: Callable[[nn.Module], float] | None = None,
    shares: Sequence[float] = SHARES,
) -> list[Point]:
    """Cut a trained adapter to several sizes by what the loss would lose, and score each; the model stays as it is.

    Each cut begins from the whole adapter. `compress(model, point.parameters, metric="loss", batches=batches)` then
    makes the one that is wanted.

    Args:
        model: a wrapped, trained model.
        batches: a few, on which the loss is looked at (they are kept in a list).
        loss_fn: `loss_fn(model, batch)` returns a scalar; None: `model(**batch).loss`.
        score: scores the model in eval mode; None: the mean loss over the batches.
        shares: of the present parameters, in (0, 1].

    Returns:
        A point for each share, the largest first; equal sizes once.

    Raises:
        ValueError: the model is not wrapped, its controller still moves ranks, updates are all zero, a share is out of
            range, or no gradient reaches the adapters.
    """
    check_settled(model, "frontier")
    wrong = [s for s in shares if not (math.isfinite(s) and 0.0 < s <= 1.0)]
    if wrong or not shares:
        raise ValueError(f"frontier: shares must be in (0, 1], got {wrong[0] if wrong else 'none'}")
    layers = adapters(model)
    if not any(bool(layer.get_delta_weight().any()) for layer in layers.values()):
        raise ValueError("frontier: adapters must have been trained, got updates that are all zero")
    data = list(batches)
    metric = measured(model, layers, data, loss_fn)
    judged = score or _mean_loss(data, loss_fn)
    choices = [Choice.of([o]) for name, layer in layers.items() for o in offers(name, layer, 0, metric.of(name))]
    fixed = sum(layer.parameters_at([0] * layer.layout.units) for layer in layers.values())
    whole = sum(layer.live_parameters for layer in layers.values())
    points: dict[int, Point] = {}

    def note() -> None:
        sizes = parameters_report(model)
        if sizes.live not in points:
            found = scored(model, lambda: judged(model))
            ranks = {name: list(layer.ranks) for name, layer in layers.items()}
            points[sizes.live] = Point(sizes.live, sizes.exported, found, ranks)

    for share in sorted(shares, reverse=True):
        if share == 1.0:
            note()
            continue
        allowed = max(int(share * whole) - fixed, least_cost(choices))
        tried(model, allocate(choices, allowed).ranks, metric, note)
    return list(points.values())


def smallest_within(points: Sequence[Point], tolerance: float, better: str = "lower") -> Point:
    """Return the smallest point whose score is at most `tolerance` worse than the best.

    Args:
        points: from `frontier`.
        tolerance: in the score's own unit, at least 0.
        better: which way scores are better, `lower` or `higher`.
    """
    if better not in ("lower", "higher") or not tolerance >= 0.0 or not points:
        raise ValueError(
            f"smallest_within: needs points, a tolerance >= 0 and better 'lower' or 'higher', got {len(points)} "
            f"points, {tolerance} and {better!r}"
        )
    sign = 1.0 if better == "lower" else -1.0
    best = min(sign * point.score for point in points)
    return min((p for p in points if sign * p.score <= best + tolerance), key=lambda p: p.parameters)


def _mean_loss(data: Sequence[Batch], loss_fn: LossFunction | None) -> Callable[[nn.Module], float]:
    loss = loss_fn or model_loss
    return lambda model: sum(float(loss(model, batch)) for batch in data) / len(data)
