"""Start lora_A in the directions that the loss asks for, found from the gradients of a few batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.layers.rows import HOST
from ardlora_ext.layers.start.orthogonal import ROW_NORM, Block, blocks, spread
from ardlora_ext.model.record import adapters, injection
from ardlora_ext.processes import average

_OVERSAMPLING = 8

Batch = Any
LossFunction = Callable[[nn.Module, Batch], torch.Tensor]


class _Sketch:
    """Top right-singular vectors of a gradient G [n, k], by subspace iteration over passes of the data.

    A pass sums G^T L [k, p] for a basis L [n, p], or G R [n, p] for a basis R [k, p]; the orthonormalised sum is the
    basis of the next pass, the other way round. The first L is Gaussian, p = 2 r + 8: nothing larger is held. Exact
    where p reaches min(n, k).
    """

    def __init__(self, layer: LoraLinear, block: Block, generator: torch.Generator) -> None:
        n, k = len(range(layer.layout.out_features)[block.out]), len(range(layer.layout.in_features)[block.cols])
        self.block = block
        self.sizes = n, k
        self.left = True
        drawn = torch.randn(n, min(2 * block.rank + _OVERSAMPLING, n, k), generator=generator, **HOST)
        self.basis = drawn.to(layer.lora_A.device)
        self.sum = self.basis.new_zeros(k, self.basis.shape[1])

    def add(self, x: torch.Tensor, dy: torch.Tensor) -> None:
        """Take x [M, K] and dy [M, N] of one backward pass in; G is the sum of dy^T x."""
        x, dy = x[:, self.block.cols], dy[:, self.block.out]
        self.sum += x.T @ (dy @ self.basis) if self.left else dy.T @ (x @ self.basis)

    def turn(self) -> None:
        """Go on to the next pass."""
        self.basis = torch.linalg.qr(self.sum).Q
        self.left = not self.left
        self.sum = self.basis.new_zeros(self.sizes[1 if self.left else 0], self.basis.shape[1])

    def directions(self) -> torch.Tensor:
        """Return the top right-singular vectors of G, [rank, k], after the last pass."""
        found = torch.linalg.svd(self.sum, full_matrices=False)
        vectors: torch.Tensor = found.U if self.left else self.basis @ found.Vh.T
        return vectors.T[: self.block.rank]


def _model_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    return loss


def init_from_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFunction | None = None,
    *,
    passes: int = 3,
    seed: int = 0,
) -> None:
    """Point lora_A at what the loss wants: the top right-singular vectors of dL/dW, summed over a few batches.

    lora_B stays zero, so the function does not change; the first steps of lora_B then move W within the best rank-r row
    space of its gradient. Rows get the norm 1/sqrt(3) of the default start. The model is run `passes` times over the
    batches in the mode it is in (train or eval); no gradient of the size of a weight is ever held, and `.grad` of
    parameters stays as it was. Meant for `init="gradient"`, and allowed for any fresh model whose method has it.

    Args:
        model: a wrapped model before its first step.
        batches: a few batches (they are kept in a list).
        loss_fn: `loss_fn(model, batch)` returns a scalar; None: `model(**batch).loss`.
        passes: passes over the batches, at least 2; more find the directions better where no few stand out.
        seed: of the random sketches.

    Raises:
        ValueError: the model is not wrapped or has been trained, its method starts otherwise, there are no batches, or
            gradients are all zero or not finite. Nothing changes then.
    """
    record, layers, data = injection(model), adapters(model), list(batches)
    if "gradient" not in record.config.inits:
        raise ValueError(f"init_from_gradients: method must start from lora_B = 0, got {type(record.config).__name__}")
    if any(layer.lora_B.detach().any() for layer in layers.values()):
        raise ValueError("init_from_gradients: model must not be trained yet, got lora_B other than 0")
    if passes < 2:
        raise ValueError(f"init_from_gradients: passes must be >= 2, got {passes}")
    if not data:
        raise ValueError("init_from_gradients: batches must not be empty")
    generator = torch.Generator().manual_seed(seed)
    sketches = {
        name: [_Sketch(layer, b, generator) for b in blocks(layer.layout, layer.ranks)]
        for name, layer in layers.items()
    }
    for number in range(passes):
        _accumulate(model, layers, sketches, data, loss_fn or _model_loss)
        every = [s for several in sketches.values() for s in several]
        average([sketch.sum for sketch in every])  # over processes, which see other batches
        for sketch in every:
            if not torch.isfinite(sketch.sum).all():
                raise ValueError("init_from_gradients: gradients must be finite, got NaN or Inf")
            if number < passes - 1:
                sketch.turn()
    silent = [name for name, several in sketches.items() if not any(s.sum.any() for s in several)]
    if len(silent) == len(layers):
        raise ValueError("init_from_gradients: gradients must not be all zero")
    if silent:
        warnings.warn(
            f"init_from_gradients: no gradient reached {', '.join(silent)}; they keep their start", stacklevel=2
        )
    for name, layer in layers.items():
        if name not in silent:
            _point(layer, sketches[name])
    record.started = True


@torch.no_grad()
def _point(layer: LoraLinear, sketches: Sequence[_Sketch]) -> None:
    # A direction cut into the heads' columns keeps its length over all of them.
    norm = ROW_NORM * (math.sqrt(layer.layout.units) if layer.layout.gate_on_a else 1.0)
    for sketch in sketches:
        rows = (norm * sketch.directions()).to(layer.lora_A.dtype)
        spread(layer.layout, layer.ranks, sketch.block, rows, layer.lora_A)


def _accumulate(
    model: nn.Module,
    layers: dict[str, LoraLinear],
    sketches: dict[str, list[_Sketch]],
    batches: Sequence[Batch],
    loss_fn: LossFunction,
) -> None:
    """Run forward and backward over the batches and let the sketches see each layer's input and output gradient."""

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, out: torch.Tensor) -> None:
            x = (args[0] if args else kwargs["x"]).detach()

            def add(dy: torch.Tensor) -> None:
                for sketch in sketches[name]:
                    sketch.add(x.reshape(-1, x.shape[-1]).float(), dy.reshape(-1, dy.shape[-1]).float())

            if out.requires_grad:  # not in the first of two passes under activation checkpointing
                out.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        for batch in batches:
            for parameter, _ in gradients:
                parameter.grad = None
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for handle in handles:
            handle.remove()
