"""Train big, then compress: one threshold over the singular values of all updates (PARA, arXiv:2604.27796).

A component of unit u is worth the squared singular value sigma^2 that its loss takes from the update (or the loss, see
`controllers/worth.py`), and costs the parameters of its rows. At a price p the best ranks maximise
sum sigma_kept^2 - p * parameters,  layer by layer; for units with factors of their own that is the threshold
sigma^2 / cost >= p. The price is one for the model, the smallest that meets the budget; around it the ranks are chosen
that are worth most within it (`controllers/knapsack.py`). Units that share a factor also share the cost of its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from ardlora_ext import processes
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.record import adapters, injection
from ardlora_ext.ranks.controllers.trial import tried
from ardlora_ext.ranks.controllers.worth import Choice, allocate, least_cost, offers
from ardlora_ext.ranks.loss_metric import Batch, LossFunction, model_loss
from ardlora_ext.ranks.recompress import check_finite, cores, factor_names, groups
from ardlora_ext.ranks.svd_prune import Basis, check_settled, known_metric, prune
from ardlora_ext.unbroken import nothing

_REFINE_LR = 0.05  # of a singular value, in parts of itself; falls to 0


@dataclass(frozen=True)
class Compression:
    """What `compress` did.

    Attributes:
        ranks: by module, the rank of each unit.
        threshold: the price: sigma^2 per parameter that a component must have to stay (0: all but zeros stay), but for
            what it takes to spend the budget.
        before: live adapter parameters before.
        after: live adapter parameters now.
        change: ||dW' - dW|| / ||dW|| over all updates (Frobenius), before what `refine` does.
        losses: mean loss over the `refine` batches after the cut, and after their steps; None without.
    """

    ranks: dict[str, list[int]]
    threshold: float
    before: int
    after: int
    change: float
    losses: tuple[float, float] | None = None


def _cores(name: str, layer: LoraLinear) -> list[torch.Tensor]:
    """Return a core for each unit of a layer, of the size of its update; raises ValueError where it is not finite."""
    check_finite(name, layer)
    return [core for group in groups(layer) for core in cores(group)]


def _allowed(budget: int | float, present: int) -> int:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"compress: budget must be a number, got {type(budget).__name__}")
    if isinstance(budget, int) and budget >= 1:
        return budget
    if isinstance(budget, float) and 0.0 < budget < 1.0:
        return int(budget * present)
    raise ValueError(f"compress: budget must be parameters (int >= 1) or a share in (0, 1), got {budget}")


@torch.no_grad()
def compress(
    model: nn.Module,
    budget: int | float,
    *,
    optimizer: Optimizer | None = None,
    min_rank: int = 0,
    metric: Basis = "update",
    batches: Iterable[Batch] | None = None,
    loss_fn: LossFunction | None = None,
    refine: Iterable[Batch] | None = None,
) -> Compression:
    """Lower ranks until the live adapter parameters fit `budget`, with little change of the updates or of the loss.

    One price for all units decides what stays (see the module's docstring) and the most is spent that `budget` and the
    costs of components allow: all of it where they divide it. Then each update is recompressed by QR and a rank-sized
    SVD (`svd_prune`), so what is left is its best approximation. Gates are folded in. Frozen parts of
    the count (DoRA's magnitudes) are paid from the budget first; for DoRA the update is that of the direction.

    Args:
        model: a wrapped, trained model.
        budget: adapter parameters allowed (int), or a share of the present ones (float below 1).
        optimizer: to go on training: its state is carried over.
        min_rank: smallest rank of a unit (or its present one, if less). 0: whole units may go.
        metric: what a component is worth: its share of the `update` (squared singular value), or what the `loss` would
            lose by it to second order, from rank-sized statistics of a few backward passes.
        batches: for `metric="loss"`, a few batches that the loss is looked at on; None: what the run itself saw
            (ARD-LoRA in `mode="anneal"`).
        loss_fn: `loss_fn(model, batch)` returns a scalar; None: `model(**batch).loss`.
        refine: batches, each for a step on the singular values of what is left, and on nothing else: a cut turns the
            loss's slope along them away from zero. Steps that do not lower the mean loss over the batches are undone.

    Returns:
        The new ranks, the threshold and the change. Nothing is done if the budget is met already.

    Raises:
        ValueError: the model is not wrapped or was never trained, its controller still moves ranks, the budget is below
            `min_rank` everywhere, or nothing is known of the loss. Nothing changes then.
        TypeError: budget is not a number.
    """
    check_settled(model, "compress")
    layers = adapters(model)
    before = sum(layer.live_parameters for layer in layers.values())
    allowed = _allowed(budget, before)
    if min_rank < 0:
        raise ValueError(f"compress: min_rank must be >= 0, got {min_rank}")
    if before <= allowed:
        return Compression({name: list(layer.ranks) for name, layer in layers.items()}, 0.0, before, before, 0.0)
    size = sum(layer.scaling**2 * float(c.square().sum()) for n, layer in layers.items() for c in _cores(n, layer))
    if size == 0.0:
        raise ValueError("compress: adapters must have been trained, got updates that are all zero")
    known = known_metric(model, metric, batches, loss_fn, "compress")
    choices = [
        Choice.of([offer])
        for name, layer in layers.items()
        for offer in offers(name, layer, min_rank, None if known is None else known.of(name))
    ]
    fixed = sum(layer.parameters_at([0] * layer.layout.units) for layer in layers.values())
    floor = fixed + least_cost(choices)
    if allowed < floor:
        raise ValueError(
            f"compress: budget must be at least {floor:,} parameters (rank {min_rank} everywhere), got {allowed:,}"
        )
    found = allocate(choices, allowed - fixed)
    controller = injection(model).controller
    applied = nothing if controller is None else controller.applied
    refined: _Refined | None = None
    if refine is not None:
        data = list(refine)
        if not data:
            raise ValueError("compress: refine must hold batches, got none")
        refined = tried(model, found.ranks, known, partial(_refined, model, layers, data, loss_fn or model_loss))

    def then() -> None:
        applied()
        if refined is not None:
            _scale(layers, refined.scales)

    change = prune(model, found.ranks, optimizer, known, then=then)
    after = sum(layer.live_parameters for layer in layers.values())
    losses = None if refined is None else refined.losses
    return Compression(found.ranks, found.price, before, after, change / size**0.5, losses)


# --- steps on the singular values -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Refined:
    """By module, what each row of the own factor (or each trained gate) is multiplied by; the losses around it."""

    scales: dict[str, torch.Tensor]
    losses: tuple[float, float]


def _rows(layer: LoraLinear) -> torch.nn.Parameter:
    """Return the factor whose live rows are one component of one unit each."""
    return layer.factors["lora_E" if layer.lora_E is not None else factor_names(layer)[1]]


def _scale(layers: Mapping[str, LoraLinear], scales: Mapping[str, torch.Tensor]) -> None:
    for name, scale in scales.items():
        rows = _rows(layers[name]).data[: len(scale)]
        rows.mul_(scale.view(-1, *[1] * (rows.dim() - 1)).to(rows))


def _refined(
    model: nn.Module, layers: Mapping[str, LoraLinear], data: Sequence[Batch], loss_fn: LossFunction
) -> _Refined:
    """Take a step for each batch; the model is not put back."""
    start = {name: _rows(layer).detach()[: sum(layer.ranks)].clone() for name, layer in layers.items()}
    scales = {name: torch.ones(len(rows), device=rows.device) for name, rows in start.items()}
    optimizer = torch.optim.Adam(list(scales.values()), lr=_REFINE_LR, betas=(0.8, 0.95))
    gradients = [(p, p.grad) for p in model.parameters()]

    def put(by: Mapping[str, torch.Tensor]) -> None:
        for name, rows in start.items():
            _rows(layers[name]).data[: len(rows)] = rows
        _scale(layers, by)

    try:
        before = _mean_loss(model, data, loss_fn)
        for step, batch in enumerate(data):
            for parameter, _ in gradients:
                parameter.grad = None
            with torch.enable_grad():
                loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
            for name, scale in scales.items():
                slope = _rows(layers[name]).grad
                live = start[name].flatten(1) if start[name].dim() > 1 else start[name][:, None]
                scale.grad = (
                    torch.zeros_like(scale)
                    if slope is None
                    else (slope[: len(live)].reshape(live.shape).float() * live.float()).sum(1)
                )
            processes.average([scale.grad for scale in scales.values() if scale.grad is not None])
            for group in optimizer.param_groups:
                group["lr"] = _REFINE_LR * (1.0 - step / len(data))
            optimizer.step()
            put(scales)
        after = _mean_loss(model, data, loss_fn)
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    if not after < before:
        return _Refined({}, (before, before))
    return _Refined({name: scale.detach() for name, scale in scales.items()}, (before, after))


def _mean_loss(model: nn.Module, data: Sequence[Batch], loss_fn: LossFunction) -> float:
    total = torch.stack([loss_fn(model, batch).detach().float().reshape(()) for batch in data]).mean()
    processes.average([total])
    return float(total)
