"""Try a cut: make it, look at the model, and put everything back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.record import adapters
from ardlora_ext.ranks.loss_metric import LossMetric
from ardlora_ext.ranks.svd_prune import prune
from ardlora_ext.unbroken import unbroken

T = TypeVar("T")


def tried(model: nn.Module, ranks: Mapping[str, Sequence[int]], metric: LossMetric | None, look: Callable[[], T]) -> T:
    """Lower units to `ranks`, return what `look` returns, and undo it: no bit of model or optimizer differs then.

    Args:
        model: a wrapped model.
        ranks: by module, as for `svd_prune`.
        metric: which change is least; None: that of the update.
        look: looks at the smaller model; whatever it raises, the model is as it was.
    """
    back = _way_back(list(adapters(model).values()), metric)
    try:
        prune(model, ranks, None, metric)
        return look()
    finally:
        with unbroken():
            back()


@torch.no_grad()
def scored(model: nn.Module, score: Callable[[], float]) -> float:
    """Return a score of the model in eval mode, without a graph."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return float(score())
    finally:
        for module, mode in modes:
            module.training = mode


def _way_back(layers: Sequence[LoraLinear], metric: LossMetric | None) -> Callable[[], None]:
    """Return what puts ranks, factors, gradients, gates and the metric back."""
    held = [
        (
            list(layer.ranks),
            {
                name: (p.detach().clone(), None if p.grad is None else p.grad.detach().clone())
                for name, p in layer.factors.items()
            },
            None if layer.lora_gate is None else layer.lora_gate.clone(),
        )
        for layer in layers
    ]
    means = None if metric is None else metric.means

    @torch.no_grad()
    def back() -> None:
        for layer, (ranks, factors, gate) in zip(layers, held, strict=True):
            for name, parameter in layer.factors.items():
                values, gradient = factors[name]
                parameter.grad = None  # set_ resets the gradient accumulator, which must not see the old shape
                if parameter.shape == values.shape:
                    parameter.copy_(values)
                else:
                    parameter.set_(values)  # type: ignore[call-overload]
                parameter.grad = gradient
            if gate is not None:
                layer.lora_gate = gate
            layer.set_ranks(ranks)
        if metric is not None and means is not None:
            metric.means = means

    return back
