"""When the soft orthogonality of P and Q enters gradients: before anybody clips them, as if it were part of the loss.

A factor's penalty depends on its weights alone, which rest between two optimizer steps, so it is added once for each
step: at the end of the first backward pass through the factor, right after its gradient has arrived and before
DistributedDataParallel or `replicate` average it. A gradient that nobody's backward pass made gets it before the step.

A `GradScaler` scales the loss by a factor that only its `unscale_` takes out again. It is used where activations are in
float16; there the penalty enters right before the step, after clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.native import observers

Add = Callable[[LoraLinear, nn.Parameter], None]


class PenaltyHooks:
    """Calls `add(layer, factor)` once for each factor and step.

    Args:
        layers: with the factors P and Q.
        add: adds the penalty's gradient to that of a factor, if it is due.
    """

    def __init__(self, layers: Sequence[LoraLinear], add: Add) -> None:
        self.add = add
        self.factors = [(layer, factor) for layer in layers for factor in (layer.lora_A, layer.lora_B)]
        self._has: set[int] = set()  # factors whose present gradient has the penalty
        self._scaled = False
        self._ends: list[Callable[[], None]] = [
            observers.watch(layer.rank_table, self, PenaltyHooks._see) for layer in layers
        ]
        handles: list[RemovableHandle] = []
        for layer, factor in self.factors:
            handles.append(factor.register_hook(lambda _grad, p=factor: self._before(p)))  # type: ignore[no-untyped-call]
            handles.append(
                factor.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda p, own=layer: self._after(own, p)
                )
            )
        self._ends += [handle.remove for handle in handles]

    def remove(self) -> None:
        """Take all hooks off."""
        for end in self._ends:
            end()
        self._ends = []

    def _see(self, _x: torch.Tensor, _h: torch.Tensor, dy: torch.Tensor, *_others: torch.Tensor) -> None:
        self._scaled = dy.dtype == torch.float16

    def _before(self, factor: nn.Parameter) -> None:
        if factor.grad is None:  # what it had was thrown away
            self._has.discard(id(factor))

    def _after(self, layer: LoraLinear, factor: nn.Parameter) -> None:
        grad = factor.grad
        if id(factor) in self._has or self._scaled or grad is None or grad.requires_grad:
            return
        self._has.add(id(factor))
        self.add(layer, factor)

    def settle(self) -> None:
        """Give it to the gradients that have not got it; the next gradients are those of another step."""
        for layer, factor in self.factors:
            if id(factor) not in self._has and factor.grad is not None:
                self.add(layer, factor)
        self._has.clear()
