"""Smaller steps of lora_B while ranks are above their share.

LoRA's update moves by the sum of its components' steps, so that r components move it r times as far at one learning
rate. LoRA divides by r, rsLoRA by sqrt(r): `scaling = lora_alpha / r`. For optimizers whose step does not depend on the
size of the gradient (Adam and its kind) that is the same as dividing the step of lora_B, and nothing else of the model
has to follow the rank then: no scaling, no saved file, no compiled graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.ranks.optimizer import copied, copies


class SmallerSteps:
    """Takes back a part of each step of lora_B; holds a copy of it from before the step."""

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = layers
        self._share = 1.0
        self._held: dict[tuple[int, str], torch.Tensor] = {}

    def _weights(self, optimizer: Optimizer) -> dict[tuple[int, str], torch.Tensor]:
        """Return lora_B of every layer, and what the optimizer keeps that is a copy of it."""
        found = {(i, ""): layer.lora_B.data for i, layer in enumerate(self.layers)}
        if copied(optimizer):
            for i, layer in enumerate(self.layers):
                found |= {(i, key): value for key, value in copies(optimizer, layer.lora_B).items()}
        return found

    @torch.no_grad()
    def begin(self, optimizer: Optimizer, share: float) -> None:
        """Before a step of which `share` (0 to 1) is to stay; of whole steps nothing is held."""
        self._share = share
        now = {} if share == 1.0 else self._weights(optimizer)
        if {key: t.shape for key, t in now.items()} == {key: t.shape for key, t in self._held.items()}:
            if now:
                torch._foreach_copy_(list(self._held.values()), list(now.values()))
        else:
            self._held = {key: t.clone() for key, t in now.items()}

    @torch.no_grad()
    def end(self, optimizer: Optimizer) -> None:
        """After the step; a copy that is new there began as lora_B."""
        if self._held:
            moved = self._weights(optimizer)
            before = [self._held.get(key, self._held[key[0], ""]) for key in moved]
            torch._foreach_lerp_(list(moved.values()), before, 1.0 - self._share)
