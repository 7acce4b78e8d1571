"""What the loss says about a unit's update: second moments of its hidden activations, forward and backward.

With h = C x of the common rows and k = O_u dy of a unit's own rows (`recompress`), the running means

    P = E[h h^T] [R, R]          Q_u = sum over rows of E[k k^T] [r_u, r_u]

are all that is needed of the Kronecker-factored curvature (K-FAC) of the loss in the update M_u = O_u^T diag(g_u) C:
a change O_u^T X C of it costs ||Q_u^1/2 X P^1/2||^2 to second order. Both are rank-sized, and h and dH exist in the
backward pass anyway. Q is divided by its trace over the model at each step, so that neither a loss scale nor the fall
of gradients during training weighs steps differently; what is compared are units.

An expert has P and Q of its own rows alone: P is a mean over them, Q a sum, so that one that few tokens meet is worth
little; while none meets it, P stays.
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
from ardlora_ext.native.transfers import Fetched
from ardlora_ext.ranks.recompress import Metric, Recompressed, factor_names, groups

DECAY = 0.8  # of the means, per step that is looked at
DAMPING = 0.1  # share of the plain metric, at equal traces

Batch = Any
LossFunction = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass
class _Moments:
    """Second moments of all groups of one layer."""

    common: list[torch.Tensor]
    own: list[torch.Tensor]  # by unit


@dataclass
class _Sums(_Moments):
    """Sums over the rows of the passes since the last step."""

    rows: torch.Tensor  # [groups] how many there were


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


def _by_expert(layer: LoraLinear, h: torch.Tensor, d_h: torch.Tensor, offsets: torch.Tensor) -> _Sums:
    """Return the sums of a pass whose rows are sorted by expert; columns of H past an expert's rank mean nothing."""
    counts = offsets.diff()
    rows = counts.tolist()  # on a GPU this waits, once
    common, own = (_grams(side, rows, layer.ranks) for side in (h, d_h))
    if layer.gate is not None:  # dH has the gates in it
        gates = torch.split(layer.gate.detach()[: sum(layer.ranks)].float(), layer.ranks)
        inverse = [torch.where(g == 0, 0.0, 1.0 / g) for g in gates]
        own = [gram * g * g[:, None] for gram, g in zip(own, inverse, strict=True)]
    return _Sums(common, [gram / layer.scaling**2 for gram in own], counts.double().to(h.device))


def _grams(side: torch.Tensor, counts: list[int], ranks: Sequence[int]) -> list[torch.Tensor]:
    """Return sum h h^T [r, r] over the rows of each expert."""
    parts = torch.split(side[: sum(counts)].float(), counts)
    return [part[:, :r].T @ part[:, :r] for part, r in zip(parts, ranks, strict=True)]


def _filled(layer: LoraLinear, known: Sequence[Metric | None]) -> list[Metric | None]:
    """Return metrics in which units that no row met count as the least of those that some met."""
    sure = [m for m in known if m is not None]
    common = float(np.mean([float(m.common.trace()) for m in sure]))
    own = min(float(gram.trace()) for m in sure for gram in m.own if gram.any())

    def plain(rows: torch.Tensor, trace: float) -> torch.Tensor:
        gram = rows @ rows.T
        return gram * (trace / max(float(gram.trace()), 1e-300))

    return [
        metric
        if metric or not len(group.common)
        else Metric(plain(group.common, common), [plain(rows, own) for rows in group.own], DAMPING)
        for metric, group in zip(known, groups(layer), strict=True)
    ]


class LossMetric:
    """Running means of P and Q for all adapters of a model; see the module.

    Attributes:
        layers: by module name.
        looking: whether passes are taken in while watched.
    """

    def __init__(self, layers: Mapping[str, LoraLinear], decay: float = DECAY) -> None:
        self.layers = dict(layers)
        self.decay = decay
        self._samples = 0
        self._means: dict[str, _Moments] = {}
        self._taken: tuple[dict[str, _Sums], Fetched] | None = None  # sums that are not in the means yet
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
    def note(
        self,
        name: str,
        x: torch.Tensor,
        h: torch.Tensor,
        dy: torch.Tensor,
        d_h: torch.Tensor,
        offsets: torch.Tensor | None = None,
    ) -> None:
        """Take in a backward pass of a layer."""
        layer = self.layers[name]
        if not self.looking or not any(layer.ranks):
            return
        if offsets is not None:
            self._add(name, _by_expert(layer, h, d_h, offsets))
            return
        layout = layer.layout
        hidden = max(layer.ranks) if layout.shared else sum(layer.ranks)
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
        self._add(name, _Sums(common, own, h.new_full((len(common),), float(len(h)), dtype=torch.float64)))

    def _add(self, name: str, new: _Sums) -> None:
        found = self._sums.get(name)
        if found is not None:
            new.common = [a + b for a, b in zip(found.common, new.common, strict=True)]
            new.own = [a + b for a, b in zip(found.own, new.own, strict=True)]
            new.rows = found.rows + new.rows
        self._sums[name] = new

    # Means.

    @torch.no_grad()
    def take(self, group: processes.Group = None) -> None:
        """Take the passes since the last step into the means, on all processes alike; what is not finite is left out.

        Nothing waits for a GPU: the means follow when they are next looked at.
        """
        self._settle()
        sums, self._sums = self._sums, {}
        for name, layer in self.layers.items():
            sums.setdefault(name, _zeros(layer))
        tensors = [t for s in sums.values() for t in (*s.common, *s.own)]
        rows = [s.rows.to(tensors[0].device, torch.float32) for s in sums.values()]
        processes.average([*rows, *tensors], group)
        on_a = {name: layer.layout.gate_on_a for name, layer in self.layers.items()}
        back = [t.diagonal().double().sum() for n, s in sums.items() for t in (s.common if on_a[n] else s.own)]
        finite = [torch.isfinite(t).all() for t in tensors]
        self._taken = sums, Fetched([*rows, *finite, *back])
        if self._taken[1].there:
            self._settle()

    def _settle(self) -> None:
        """Bring the means up to date with what was taken."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        sums, fetched = taken
        found, middle = fetched.values(), len(sums)
        end = middle + sum(len(s.common) + len(s.own) for s in sums.values())
        rows, finite, total = found[:middle], found[middle:end], sum(float(trace) for trace in found[end:])
        if not all(map(bool, finite)) or not total > 0.0:
            return
        self._means = {
            name: self._mixed(name, new, counts.tolist(), total)
            for (name, new), counts in zip(sums.items(), rows, strict=True)
        }
        self._samples += 1

    @property
    def means(self) -> dict[str, _Moments]:
        """The means of each layer."""
        self._settle()
        return self._means

    @means.setter
    def means(self, means: dict[str, _Moments]) -> None:
        self._settle()
        self._means = means

    @property
    def samples(self) -> int:
        """Steps taken in."""
        self._settle()
        return self._samples

    def _mixed(self, name: str, new: _Sums, counts: list[float], total: float) -> _Moments:
        """Return the means of a layer with the sums of a step taken in."""
        layer, old = self.layers[name], self._means.get(name)
        by_unit = [count for count, units in zip(counts, _members(layer), strict=True) for _ in units]
        sizes = [total] * len(new.common), by_unit  # what sums are divided by
        if not layer.layout.gate_on_a:
            sizes = counts, [total] * len(new.own)

        def means(before: list[torch.Tensor], sums: list[torch.Tensor], by: list[float]) -> list[torch.Tensor]:
            found = []
            for b, s, size in zip(before, sums, by, strict=True):
                now = s.double() / max(size, 1e-300)
                if b.shape != s.shape:  # somebody else has resized it
                    found.append(now)
                else:
                    found.append(torch.lerp(now, b, self.decay) if size > 0.0 else b)
            return found

        before = (
            _Moments([t[:0].double() for t in new.common], [t[:0].double() for t in new.own]) if old is None else old
        )
        return _Moments(means(before.common, new.common, sizes[0]), means(before.own, new.own, sizes[1]))

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
        return _filled(layer, found) if any(found) and not all(found) else found

    def turned(self, results: Mapping[str, Sequence[Recompressed]]) -> dict[str, _Moments]:
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
            means[name] = _Moments(common, own)
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
            means[name] = _Moments(loaded[: len(common)], loaded[len(common) :])
        self._means, self._samples, self._taken = means, int(state["samples"]), None


def _note(name: str, metric: LossMetric, *seen: torch.Tensor) -> None:
    metric.note(name, *seen)


def _zeros(layer: LoraLinear) -> _Sums:
    common, own = _sizes(layer)
    make = layer.lora_A.detach().float().new_zeros
    return _Sums([make(r, r) for r in common], [make(r, r) for r in own], make(len(common)).double())


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
