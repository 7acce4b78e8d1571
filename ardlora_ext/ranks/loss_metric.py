"""What the loss says about a unit's update: second moments of its hidden activations, forward and backward.

With h = C x of the common rows and k = O_u dy of a unit's own rows (`recompress`), the running means

    P = E[h h^T] [R, R]          Q_u = sum over rows of E[k k^T] [r_u, r_u]

are all that is needed of the Kronecker-factored curvature (K-FAC) of the loss in the update M_u = O_u^T diag(g_u) C:
a change O_u^T X C of it costs ||Q_u^1/2 X P^1/2||^2 to second order. Both are rank-sized, and h and dH exist in the
backward pass anyway. Q is divided by its trace over the model at each step, so that neither a loss scale nor the fall
of gradients during training weighs steps differently; what is compared are units.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ardlora_ext import processes
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.native import observers, reference
from ardlora_ext.ranks.recompress import Metric, Recompressed, factor_names

DECAY = 0.8  # of the means, per step that is looked at
DAMPING = 0.1  # share of the plain metric, at equal traces

Batch = Any
LossFunction = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass
class _Sums:
    """Sums over the rows of the passes since the last step, of all groups of one layer."""

    common: list[torch.Tensor]
    own: list[torch.Tensor]  # by unit
    rows: int = 0


def _members(layer: LoraLinear) -> list[list[int]]:
    """Return the units of each group, as `recompress.groups` does."""
    every = range(layer.layout.units)
    return [list(every)] if layer.layout.shared else [[u] for u in every]


def _sizes(layer: LoraLinear) -> tuple[list[int], list[int]]:
    """Return the ranks of each group's common rows and of each unit's own ones."""
    return [max(layer.ranks[u] for u in units) for units in _members(layer)], list(layer.ranks)


def _blocks(gram: torch.Tensor, ranks: Sequence[int]) -> list[torch.Tensor]:
    """Return the blocks [r_u, r_u] of units that follow each other."""
    ends = np.cumsum(ranks).tolist()
    return [gram[end - r : end, end - r : end] for r, end in zip(ranks, ends, strict=True)]


def _own_grams(layer: LoraLinear, side: torch.Tensor) -> list[torch.Tensor]:
    """Return sum k k^T, k = O_u side_u, of each unit for activations `side` [M, width of the own rows' side]."""
    name = factor_names(layer)[1]
    on_a = name == "lora_A"
    factor = getattr(layer, name).detach().float()
    slices = reference.unit_slices(layer.layout, layer.ranks)
    most, width = max(layer.ranks), factor.shape[1]
    rows = factor.new_zeros(len(slices), most, width)
    for u, (a_rows, b_rows, *_) in enumerate(slices):
        rows[u, : layer.ranks[u]] = factor[a_rows if on_a else b_rows]
    cut = side.float().view(len(side), -1, width).transpose(0, 1)  # [units or 1, M, width]
    k = cut @ rows.mT
    return [gram[:r, :r] for gram, r in zip(k.mT @ k, layer.ranks, strict=True)]


class LossMetric:
    """Running means of P and Q for all adapters of a model; see the module.

    Attributes:
        layers: by module name.
        samples: steps taken in.
        looking: whether passes are taken in while watched.
    """

    def __init__(self, layers: Mapping[str, LoraLinear], decay: float = DECAY) -> None:
        self.layers = dict(layers)
        self.decay = decay
        self.samples = 0
        self.means: dict[str, _Sums] = {}
        self._sums: dict[str, _Sums] = {}
        self._ends: list[Callable[[], None]] = []
        self.looking = False

    # Looking.

    def watch(self, on: bool) -> None:
        """Begin or end to look at backward passes."""
        if on and not self._ends:
            self._ends = [
                observers.watch(layer.rank_table, self, functools.partial(_note, name))
                for name, layer in self.layers.items()
            ]
        elif not on:
            for end in self._ends:
                end()
            self._ends = []
        self.looking = on

    @torch.no_grad()
    def note(self, name: str, x: torch.Tensor, h: torch.Tensor, dy: torch.Tensor, d_h: torch.Tensor) -> None:
        """Take in a backward pass of a layer."""
        if not self.looking:
            return
        layer = self.layers[name]
        layout = layer.layout
        hidden = max(layer.ranks) if layout.shared else sum(layer.ranks)
        if not hidden:
            return
        forward, backward = h[:, :hidden].float(), d_h[:, :hidden].float()
        if layout.gate_on_a:
            common, own = [backward.T @ backward / layer.scaling**2], _own_grams(layer, x)
        elif layout.shared:
            common, own = [forward.T @ forward], _own_grams(layer, dy)
        else:
            common = _blocks(forward.T @ forward, layer.ranks)
            if layer.gate is None:
                own = _blocks(backward.T @ backward / layer.scaling**2, layer.ranks)
            else:  # dH has the gates in it
                own = _own_grams(layer, dy)
        found = self._sums.get(name)
        if found is None:
            self._sums[name] = _Sums(common, own, len(h))
            return
        found.common = [a + b for a, b in zip(found.common, common, strict=True)]
        found.own = [a + b for a, b in zip(found.own, own, strict=True)]
        found.rows += len(h)

    # Means.

    @torch.no_grad()
    def take(self, group: processes.Group = None) -> bool:
        """Take the passes since the last step into the means, on all processes alike; return whether there were any.

        What is not finite is left out.
        """
        sums, self._sums = self._sums, {}
        for name, layer in self.layers.items():
            sums.setdefault(name, _zeros(layer))
        tensors = [t for s in sums.values() for t in (*s.common, *s.own)]
        rows = torch.tensor([float(s.rows) for s in sums.values()], device=tensors[0].device)
        processes.average([rows, *tensors], group)
        on_a = {name: layer.layout.gate_on_a for name, layer in self.layers.items()}
        back = [t for n, s in sums.items() for t in (s.common if on_a[n] else s.own)]
        total = sum(float(t.diagonal().double().sum()) for t in back)
        if not all(bool(torch.isfinite(t).all()) for t in tensors) or not total > 0.0:
            return False
        means = {}
        for (name, found), count in zip(sums.items(), rows.tolist(), strict=True):
            by = (total, max(count, 1.0)) if on_a[name] else (max(count, 1.0), total)
            new = _Sums([t.double() / by[0] for t in found.common], [t.double() / by[1] for t in found.own])
            old = self.means.get(name)
            means[name] = new if old is None else self._mixed(old, new)
        self.means, self.samples = means, self.samples + 1
        return True

    def _mixed(self, old: _Sums, new: _Sums) -> _Sums:
        def means(before: list[torch.Tensor], now: list[torch.Tensor]) -> list[torch.Tensor]:
            pairs = zip(before, now, strict=True)  # what somebody else has resized begins anew
            return [torch.lerp(b, a, self.decay) if a.shape == b.shape else b for a, b in pairs]

        return _Sums(means(old.common, new.common), means(old.own, new.own))

    def of(self, name: str) -> list[Metric | None]:
        """Return the metric of each group of a layer, None where nothing is known of it."""
        layer, means = self.layers[name], self.means.get(name)
        common, own = _sizes(layer)
        if means is None or [len(t) for t in means.common] != common or [len(t) for t in means.own] != own:
            return [None] * len(common)  # ranks were changed by somebody else
        members = _members(layer)
        found: list[Metric | None] = []
        for gram, units in zip(means.common, members, strict=True):
            known = bool(gram.any()) and any(bool(means.own[u].any()) for u in units)
            found.append(Metric(gram, [means.own[u] for u in units], DAMPING) if known else None)
        return found

    def turned(self, results: Mapping[str, Sequence[Recompressed]]) -> dict[str, _Sums]:
        """Return the means after recompressions, exactly: by module, one result for each group."""
        means = dict(self.means)
        for name, found in results.items():
            before = means.pop(name, None)
            if before is None or [len(g) for g in before.common] != [r.common_map.shape[1] for r in found]:
                continue
            own = list(before.own)
            for units, result in zip(_members(self.layers[name]), found, strict=True):
                for u, turn in zip(units, result.own_map, strict=True):
                    own[u] = turn @ own[u] @ turn.T
            common = [r.common_map @ g @ r.common_map.T for g, r in zip(before.common, found, strict=True)]
            means[name] = _Sums(common, own)
        return means

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return the means as base64 of little-endian float64: exact inside JSON."""
        packed = {n: [_pack(t) for t in (*m.common, *m.own)] for n, m in self.means.items()}
        return {"samples": self.samples, "means": packed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; the layers have the ranks of that time.

        Raises:
            ValueError: it does not fit them.
        """
        means = {}
        for name, values in state["means"].items():
            if name not in self.layers:
                raise ValueError(f"state: loss metric must be of the model's adapters, got '{name}'")
            layer = self.layers[name]
            common, own = _sizes(layer)
            device = layer.lora_A.device
            loaded = [_unpack(v, size, device) for v, size in zip(values, common + own, strict=True)]
            means[name] = _Sums(loaded[: len(common)], loaded[len(common) :])
        self.means, self.samples = means, int(state["samples"])


def _note(name: str, metric: LossMetric, *seen: torch.Tensor) -> None:
    metric.note(name, *seen)


def _zeros(layer: LoraLinear) -> _Sums:
    common, own = _sizes(layer)
    make = layer.lora_A.detach().float().new_zeros
    return _Sums([make(r, r) for r in common], [make(r, r) for r in own])


def _pack(values: torch.Tensor) -> str:
    return base64.b64encode(values.cpu().numpy().astype("<f8").tobytes()).decode("ascii")


def _unpack(text: str, size: int, device: torch.device) -> torch.Tensor:
    values = np.frombuffer(base64.b64decode(text), dtype="<f8")
    if len(values) != size * size or not np.isfinite(values).all():
        raise ValueError(f"state: loss metric must hold {size} x {size} finite numbers, got {len(values)}")
    return torch.from_numpy(values.astype(np.float64).reshape(size, size)).to(device)


def model_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the loss that a transformers model computes from its labels."""
    loss: torch.Tensor = model(**batch).loss
    return loss


def measured(
    model: nn.Module, layers: Mapping[str, LoraLinear], batches: Iterable[Batch], loss_fn: LossFunction | None
) -> LossMetric:
    """Return the metric over a few batches; `.grad` of parameters stays as it was.

    Raises:
        ValueError: there are no batches, or no gradient reaches an adapter.
    """
    metric = LossMetric(layers)
    gradients = [(p, p.grad) for p in model.parameters()]
    count = 0
    metric.watch(True)
    try:
        with torch.enable_grad():
            for batch in batches:
                for parameter, _ in gradients:
                    parameter.grad = None
                loss = (loss_fn or model_loss)(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                count += 1
                metric.decay = (count - 1.0) / count  # a plain mean
                metric.take()
    finally:
        metric.watch(False)
        for parameter, gradient in gradients:
            parameter.grad = gradient
    if not metric.samples:
        raise ValueError(f"loss metric: gradients of some batch must reach the adapters, got none in {count} batches")
    return metric
