"""ARD-LoRA written a second time, slowly: one unit after the other, in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import nn

import ardlora_ext as ard
from ardlora_ext.layers.linear import LoraLinear


@dataclass
class SlowUnit:
    layer: LoraLinear
    index: int
    module: int
    group: int
    own: float
    limit: int
    live: int
    fisher: float = 0.0
    spectrum: list[float] = field(default_factory=list)

    def dots(self) -> list[float]:
        """<W_j, dL/dW_j> of each component."""
        begin = sum(self.layer.ranks[: self.index])
        weight, grad = self.layer.gated.detach().double(), self.layer.gated.grad
        assert grad is not None
        return [float(weight[begin + j] @ grad[begin + j].double()) for j in range(self.live)]

    def gates(self) -> list[float]:
        begin = sum(self.layer.ranks[: self.index])
        assert self.layer.gate is not None
        return [float(g) for g in self.layer.gate[begin : begin + self.live]]


class SlowArd:
    """docs/design.md, "ARD-LoRA, reconstructed", one number after the other."""

    def __init__(self, model: nn.Module, config: ard.ArdConfig, warmup: int, budget: float | None) -> None:
        self.config, self.warmup, self.budget, self.step = config, warmup, budget, 0
        self.units: list[SlowUnit] = []
        self.common: list[float] = []  # parameters of a row that units share, by module
        for m, (name, layer) in enumerate(ard.adapters(model).items()):
            layout = layer.layout
            gated, other = layout.b_width, layout.a_width
            if layout.gate_on_a:
                gated, other = other, gated
            self.common.append(other if layout.shared else 0.0)
            for u in range(layout.units):
                group = int(name.split(".")[0]) if config.granularity == "layer" else len(self.units)
                own = gated if layout.shared else gated + other
                self.units.append(SlowUnit(layer, u, m, group, own, layer.max_rank, layer.ranks[u]))
        self.groups = max(u.group for u in self.units) + 1
        self.limits = [max(u.limit for u in self.units if u.group == g) for g in range(self.groups)]
        self.alpha = [min(1.0, limit / config.r0) for limit in self.limits]
        self.previous = list(self.alpha)
        self.square = self.dual = 0.0
        self.price = 0.0 if config.l1 is None else config.l1
        self.slope: list[float] | None = None

    def rho(self, unit: SlowUnit) -> float:
        return min(self.config.r0 * self.alpha[unit.group], unit.limit)

    def observe(self) -> None:
        slopes = [0.0] * self.groups
        for unit in self.units:
            dots, boundary = unit.dots(), min(math.floor(self.rho(unit)), unit.live - 1)
            if self.config.slope == "tangent":
                slopes[unit.group] += self.tangent(unit, dots, boundary)
                continue
            unit.fisher = 0.95 * unit.fisher + 0.05 * sum(dots) ** 2
            if self.step % self.config.update_interval == 0:
                unit.spectrum = [float(s) ** 2 for s in unit.layer.singular_values()[unit.index]]
            total = sum(unit.spectrum)
            slopes[unit.group] -= math.sqrt(unit.fisher * unit.spectrum[boundary] / total) if total else 0.0
        self.square = 0.95 * self.square + 0.05 * sum(s * s for s in slopes) / len(slopes)
        scale = math.sqrt(self.square / (1 - 0.95 ** (self.step + 1)))
        self.slope = [s / max(scale, 1e-30) if self.config.normalize else s * self.config.r0 for s in slopes]

    def tangent(self, unit: SlowUnit, dots: list[float], boundary: int) -> float:
        """<dL/dm, dm/drho>, with dL/dm_j = dots_j / m_j."""
        gates = unit.gates()
        if self.config.gate == "sigmoid":
            return sum(d * (1 - g) / self.config.gate_width for d, g in zip(dots[1:], gates[1:], strict=True))
        if self.config.gate == "scale":  # every open gate is alpha
            return sum(dots[: self.open(unit)]) / self.rho(unit)
        return dots[boundary] / gates[boundary]

    def open(self, unit: SlowUnit) -> int:
        return max(1, math.floor(self.rho(unit) + 0.5))

    def propose(self) -> None:
        phase_is_adapt = self.step >= self.warmup
        self.step += 1
        if not phase_is_adapt:
            return
        self.move_alpha()
        if self.step % self.config.update_interval == 0:
            self.allocate()

    def parameters(self) -> float:
        total = sum(u.own * self.rho(u) for u in self.units)
        for m, common in enumerate(self.common):
            total += common * max(self.rho(u) for u in self.units if u.module == m)
        return total

    def marginal(self, unit: SlowUnit) -> float:
        """What the unit's next component costs; a shared row is paid by those that reach it."""
        beside = [self.rho(u) for u in self.units if u.module == unit.module]
        share = self.rho(unit) ** 8 / sum(r**8 for r in beside)
        return unit.own + share * self.common[unit.module]

    def move_alpha(self) -> None:
        assert self.slope is not None
        c = self.config
        costs = [sum(self.marginal(u) for u in self.units if u.group == g) for g in range(self.groups)]
        weights = [cost / (sum(costs) / len(costs)) if c.cost_weighted else 1.0 for cost in costs]
        if c.slope == "secant":
            weights = [math.sqrt(w) for w in weights]
        if self.budget is not None:
            excess = self.parameters() / self.budget - 1
            self.dual = max(0.0, self.dual + c.lr_price * excess)
            self.price = max(0.0, self.dual + 2 * math.sqrt(c.lr_price / c.lr_alpha) * excess)
        for g in range(self.groups):
            live = [u.live for u in self.units if u.group == g and u.live < u.limit]
            pull = self.slope[g] + self.price * weights[g]  # alpha >= 0: l1 is linear
            strength, last = self.price * c.tv, self.previous[g]
            if c.variation_form == "explicit":
                change = -c.lr_alpha * (pull + strength * (self.alpha[g] - last))
            elif c.variation == "temporal_abs":  # soft threshold of the step
                change = -math.copysign(max(abs(c.lr_alpha * pull) - c.lr_alpha * strength, 0.0), pull)
            else:
                change = -c.lr_alpha * pull / (1 + c.lr_alpha * strength)
            self.previous[g] = self.alpha[g]
            self.alpha[g] = max(1 / c.r0, min(self.alpha[g] + change, min([self.limits[g], *live]) / c.r0))

    def allocate(self) -> None:
        for unit in self.units:
            wanted = min(math.ceil(self.rho(unit)) + 1, unit.limit)
            kept = min(math.ceil(self.rho(unit) + self.config.hysteresis) + 1, unit.limit)
            if unit.live < wanted or unit.live > kept:
                unit.live = wanted

    def expected_gates(self, unit: SlowUnit) -> list[float]:
        rho, floor, kind = self.rho(unit), self.config.gate_floor, self.config.gate
        gates = []
        for j in range(unit.live):
            if kind == "sigmoid":
                gates.append(1 / (1 + math.exp(-(rho - j - 0.5) / self.config.gate_width)))
                continue
            if kind in ("ste", "scale"):
                gates.append((1.0 if kind == "ste" else self.alpha[unit.group]) if j < self.open(unit) else floor)
                continue
            inside = rho - j  # above 0 in what the soft rank covers, then the look-ahead
            gates.append(max(min(inside, 1.0), floor) if inside >= 0 else max(0.0, floor * (1 + inside)))
        return gates if kind == "scale" else [1.0, *gates[1:]]  # component 0 is always open
