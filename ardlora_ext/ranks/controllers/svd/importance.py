"""What the components of P Lambda Q are worth: smoothed sensitivity times uncertainty (AdaLoRA, ElaLoRA).

Of an entry w with gradient g:  I = |w g|,  Ibar = b1 Ibar + (1 - b1) I,  Ubar = b2 Ubar + (1 - b2) |I - Ibar|,
s = Ibar Ubar. Of component i:  S_i = s(lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.layers.rows import HOST
from ardlora_ext.native import dispatch
from ardlora_ext.native.compiled import DTYPE_CODES
from ardlora_ext.native.transfers import Fetched
from ardlora_ext.ranks.controllers.costs import Floats, Ints
from ardlora_ext.ranks.controllers.units import kinds, present

_FACTORS = ("lora_E", "lora_A", "lora_B")
Tensors = list[torch.Tensor]


def component_scores(sensitivity: Tensors, uncertainty: Tensors) -> torch.Tensor:
    """Return S [rows] from Ibar and Ubar of each factor [rows, width]: row means of their product, summed in float64.

    A finite gradient can be so large that float32 does not hold the product.
    """
    parts = [(i.double() * u.double()).mean(dim=1) for i, u in zip(sensitivity, uncertainty, strict=True)]
    return torch.stack(parts).sum(dim=0)


def _pack(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.cpu().numpy().astype("<f4").tobytes()).decode()


def _unpack(text: str, shape: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)).reshape(*shape)


def _follow(old: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return rows `source` of `old`; -1 gives zeros."""
    padded = torch.cat([old, old.new_zeros(1, *old.shape[1:])])
    return padded[source]  # -1 is the last row: the zeros


class Importance:
    """Ibar and Ubar of every live entry of a model's adapters, which follow the rows when ranks change.

    Two numbers per adapter parameter; `release` gives them back once nothing is to be decided any more.
    """

    def __init__(self, layers: Sequence[LoraLinear], beta1: float, beta2: float) -> None:
        self.layers = list(layers)
        self.beta1, self.beta2 = beta1, beta2
        self.sensitivity = [self._zeros(layer) for layer in self.layers]
        self.uncertainty = [self._zeros(layer) for layer in self.layers]
        self.released: Tensors | None = None  # scores of each module
        self._parameters = [layer.factors[factor] for layer in self.layers for factor in _FACTORS]
        self._blocks: Ints = np.zeros((0, 7), dtype=np.int64)  # for `dispatch.importance`, but for what steps bring
        self._seen = -1  # changes of layers that the blocks belong to

    @staticmethod
    def _zeros(layer: LoraLinear) -> Tensors:
        rows, factors = sum(layer.ranks), layer.factors
        return [torch.zeros(rows, factors[f].shape[1], **HOST) for f in _FACTORS]

    def _find(self) -> None:
        """Bring the averages to where their layers are, and note their addresses."""
        self._blocks = np.zeros((len(self._parameters), 7), dtype=np.int64)
        for column, averages in enumerate((self.sensitivity, self.uncertainty), start=2):
            for layer, module in zip(self.layers, averages, strict=True):
                module[:] = [t.to(layer.lora_A.device) for t in module]
            self._blocks[:, column] = [t.data_ptr() for module in averages for t in module]
            self._blocks[:, 4:6] = [tuple(t.shape) for module in averages for t in module]
        self._seen = LoraLinear.changes

    @torch.no_grad()
    def update(self) -> Fetched:
        """Take in the present weights and gradients; a factor without a gradient is left out.

        Returns:
            Of each device 1, or 0 if a gradient there is not finite: nothing has changed on it then.
        """
        if self._seen != LoraLinear.changes:
            self._find()
        grads, index = present([p.grad for p in self._parameters], self._parameters)
        blocks = self._blocks[index]
        blocks[:, 0] = [self._parameters[i].data_ptr() for i in index.tolist()]
        blocks[:, 1] = [g.data_ptr() for g in grads]
        found = kinds(grads)
        for dtype, _, chosen in found:
            blocks[chosen, 6] = DTYPE_CODES[dtype]
        devices = dict.fromkeys(device for _, device, _ in found)
        verdicts = []
        for device in devices:  # one call each: all of its averages follow, or none
            here = blocks if len(devices) == 1 else blocks[[g.device == device for g in grads]]
            verdicts.append(dispatch.importance(here, self.beta1, self.beta2, device))
        return Fetched(verdicts)

    def module_scores(self) -> Tensors:
        """Return S [components] of each module; the last known after `release`, 0 where recompression made others."""
        if self.released is not None:
            rows = [sum(layer.ranks) for layer in self.layers]
            return [t if len(t) == r else t.new_zeros(r) for t, r in zip(self.released, rows, strict=True)]
        return [component_scores(i, u) for i, u in zip(self.sensitivity, self.uncertainty, strict=True)]

    def scores(self) -> Floats:
        """Return S of every component, module after module [components]."""
        result: Floats = torch.cat([scores.cpu() for scores in self.module_scores()]).double().numpy()
        return result

    def moved(self, plans: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        """Return the attributes that follow the rows of modules: row i comes from `plan[i]`, a new one (-1) is 0."""
        sources = {m: torch.tensor(plan, dtype=torch.int64, device="cpu") for m, plan in plans.items()}
        if self.released is not None:
            return {"released": [_follow(t, sources[m]) if m in sources else t for m, t in enumerate(self.released)]}
        found: dict[str, Any] = {"_seen": -1}
        for name in ("sensitivity", "uncertainty"):
            found[name] = [
                [_follow(t, sources[m]) for t in module] if m in sources else module
                for m, module in enumerate(getattr(self, name))
            ]
        return found

    def release(self) -> None:
        """Keep the scores and give the averages back."""
        if self.released is None:
            self.released = self.module_scores()
            self.sensitivity, self.uncertainty = [], []

    def state_dict(self) -> dict[str, Any]:
        """Return the averages as base64 of little-endian float32, exact and compact inside JSON."""
        if self.released is not None:
            return {"released": [t.tolist() for t in self.module_scores()]}
        return {
            name: [[_pack(t) for t in module] for module in getattr(self, name)]
            for name in ("sensitivity", "uncertainty")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state from `state_dict`; the layers have the ranks of that time."""
        if "released" in state:
            released = [torch.tensor(t, dtype=torch.float64, device="cpu") for t in state["released"]]
            if [len(t) for t in released] != [sum(layer.ranks) for layer in self.layers]:
                raise ValueError("state: released must have the components of the model at its present ranks")
            if not all(t.isfinite().all() for t in released):
                raise ValueError("state: released must be finite, got NaN or Inf")
            self.release()
            self.released = released
            return
        shapes = [[t.shape for t in self._zeros(layer)] for layer in self.layers]
        for name in ("sensitivity", "uncertainty"):
            stored = state[name]
            if [len(base64.b64decode(t)) for module in stored for t in module] != [
                4 * shape.numel() for module in shapes for shape in module
            ]:
                raise ValueError(f"state: {name} must have the shapes of the model's adapters at their present ranks")
            loaded = [[_unpack(t, s) for t, s in zip(*pair, strict=True)] for pair in zip(stored, shapes, strict=True)]
            setattr(self, name, loaded)
        self._seen = -1
