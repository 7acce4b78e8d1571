"""ARD-LoRA (arXiv:2506.18267): ranks from a learned factor alpha per unit, r = max(1, round(r0 * alpha)).

The paper's rank has no derivative; the reconstruction (docs/design.md) gives component j of a unit with soft rank
rho = r0 * alpha the gate m_j(rho) of `csrc/include/ardlora/regularizer.h`. Only the boundary component j = floor(rho)
carries gradient: dL/drho = dL/dm_j = <dW_j, W_j> / m_j, a row dot of the unit's own factor with its gradient. One more
component, the look-ahead, is trained behind a nearly closed gate, so ranks can grow as well as fall.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import nn

from ardlora_ext._native import DTYPE_CODES, core, threads
from ardlora_ext.config import ArdConfig
from ardlora_ext.controllers.allocate import Floats, Ints, whole_ranks
from ardlora_ext.controllers.base import Controller
from ardlora_ext.resize import RankUpdate, UnitUpdate

_EMA = 0.95  # of the gradient's scale and of the gains shown in records
_OPEN_END_WARMUP = 2  # update intervals, when the length of the run is not known


def layer_key(name: str) -> str:
    """Return what names the transformer layer of a module: the path up to its first number."""
    found = re.match(r"(.*?\.)?\d+(?=\.|$)", name)
    return found.group(0) if found else name.rpartition(".")[0]


class ArdController(Controller[ArdConfig]):
    """Learns one alpha per unit (or per layer) by proximal steps; see `ArdConfig` for every constant.

    Phases, by step: `warmup` (nothing moves), `adapt`, `harden` (gates slide to 0 or 1), `frozen`.
    """

    def __init__(self, model: nn.Module, config: ArdConfig, total_steps: int | None = None) -> None:
        super().__init__(model, config, config.total_steps if total_steps is None else total_steps)
        units = self.units
        keys = [layer_key(units.names[m]) for m in units.module_of] if config.granularity == "layer" else None
        self.group: Ints = np.arange(len(units)) if keys is None else np.unique(keys, return_inverse=True)[1]
        groups = int(self.group.max()) + 1
        self.limit = np.zeros(groups)
        np.maximum.at(self.limit, self.group, units.limit)
        self.alpha: Floats = np.minimum(np.ones(groups), self.limit / config.r0)
        self.grad_square = 0.0
        self.gain: Floats = np.zeros(groups)  # EMA of -dL/dalpha, normalised
        self.fisher: Floats = np.zeros(len(units))
        self.spectrum: Floats | None = None  # squared singular values [units, rank], refreshed every interval
        self.price = 0.0 if config.l1 is None else config.l1
        self.dual = 0.0
        self.target: Ints | None = None  # whole ranks, once decided
        self.harden_from: Floats | None = None  # rho when hardening began
        self.harden_at = 0
        self.budget = self._budget()
        self.reported = self._rounded()
        self._pending: Floats | None = None

    def _budget(self) -> float | None:
        if self.config.l1 is not None:
            return None
        if self.config.budget is not None:
            return float(self.config.budget)
        return self.units.costs.parameters(np.minimum(self.config.r0, self.units.limit))

    # Phases.

    def _at(self, ratio: float) -> int:
        return round((self.total_steps or 0) * ratio)

    @property
    def phase(self) -> str:
        """`warmup`, `adapt`, `harden` or `frozen`."""
        if self.target is not None:
            return "harden" if self.harden_from is not None else "frozen"
        known = self.total_steps is not None
        warm = self._at(self.config.warmup_ratio) if known else _OPEN_END_WARMUP * self.config.update_interval
        return "warmup" if self.step < warm else "adapt"

    def _must_harden(self) -> bool:
        left = self._at(self.config.freeze_ratio) + self._at(self.config.harden_ratio)
        return self.total_steps is not None and self.step >= self.total_steps - left

    # Facts.

    @property
    def rho(self) -> Floats:
        """Soft rank of each group."""
        return self.config.r0 * self.alpha

    def _unit_rho(self) -> Floats:
        return np.minimum(self.rho[self.group], self.units.limit)

    def _rounded(self) -> Ints:
        return np.maximum(1, np.floor(self._unit_rho() + 0.5)).astype(np.int64)

    def _row_dots(self) -> Floats:
        """Return <dW_i, W_i> of every live row of the gated factors, module after module; 0 without a gradient."""
        layers = self.units.layers
        rows = [sum(layer.ranks) for layer in layers]
        out = np.zeros(sum(rows))
        offset = np.cumsum([0, *rows])
        for dtype, code in DTYPE_CODES.items():
            members = [m for m, g in enumerate(layers) if g.gated.grad is not None and g.gated.dtype == dtype]
            if not members:
                continue
            blocks = [(layers[m].gated, layers[m].gated.grad, rows[m]) for m in members]
            table = np.array([(w.data_ptr(), g.data_ptr(), r, w.shape[1]) for w, g, r in blocks if g is not None])
            index = np.concatenate([np.arange(offset[m], offset[m + 1]) for m in members])
            out[index] = core.row_dots(table, code, threads())
        return out

    def _first_rows(self) -> Ints:
        """Return the first row of each unit among all rows of `_row_dots`."""
        offset = np.cumsum([0, *(sum(layer.ranks) for layer in self.units.layers)])
        first: Ints = offset[self.units.module_of] + self.units.rows()
        return first

    def _boundary(self) -> Ints:
        """Return the component each unit's soft rank ends in."""
        boundary: Ints = np.minimum(np.floor(self._unit_rho()).astype(np.int64), self.units.live() - 1)
        return boundary

    def _tangent(self, dots: Floats) -> Floats:
        """dL/drho of each unit: the row dot of its boundary component over its gate."""
        gates = np.concatenate([layer.lora_gate.numpy() for layer in self.units.layers if layer.lora_gate is not None])
        rows = self._first_rows() + self._boundary()
        result: Floats = dots[rows] / gates[rows]
        return result

    def _secant(self, dots: Floats) -> Floats:
        """Minus the square root of what each unit's boundary component is worth.

        The loss that a unit's update is worth is its Fisher information along itself, E[<dL/ddW, dW>^2]; component j
        holds the share sigma_j^2 / sum sigma^2 of it.
        """
        unit = np.add.reduceat(dots, self._first_rows())
        self.fisher = np.asarray(_EMA * self.fisher + (1.0 - _EMA) * unit**2, dtype=np.float64)
        if self.spectrum is None or self.step % self.config.update_interval == 0:
            widest = int(self.units.live().max())
            values = [layer.singular_values().numpy() ** 2 for layer in self.units.layers]
            padded = [np.pad(v, ((0, 0), (0, widest - v.shape[1]))) for v in values]
            self.spectrum = np.asarray(np.concatenate(padded), dtype=np.float64)
        share = self.spectrum[np.arange(len(unit)), np.minimum(self._boundary(), self.spectrum.shape[1] - 1)]
        result: Floats = -np.sqrt(self.fisher * share / np.maximum(self.spectrum.sum(axis=1), 1e-300))
        return result

    def observe(self) -> None:
        self._pending = None
        if self.phase not in ("warmup", "adapt") or all(g.gated.grad is None for g in self.units.layers):
            return
        dots = self._row_dots()
        if not np.isfinite(dots).all():
            self._record_skip()
            return
        slope = self._secant(dots) if self.config.slope == "secant" else self._tangent(dots)
        gradient: Floats = np.bincount(self.group, slope, minlength=len(self.alpha)).astype(np.float64)
        if self.config.normalize:
            correction = 1.0 - _EMA ** (self.step + 1)
            self.grad_square = _EMA * self.grad_square + (1.0 - _EMA) * float(np.mean(gradient**2))
            gradient = gradient / max(np.sqrt(self.grad_square / correction), 1e-30)
        else:
            gradient = gradient * self.config.r0
        self.gain = _EMA * self.gain - (1.0 - _EMA) * gradient
        self._pending = gradient

    # Decisions.

    def start(self) -> RankUpdate | None:
        return self._allocate() if self.target is None else None

    def propose(self) -> RankUpdate | None:
        phase = self.phase
        self.step += 1
        update = None
        if phase == "adapt":
            self._move_alpha()
            if self.step % self.config.update_interval == 0:
                self._record_ranks()
                update = self._allocate()
        if self.target is None and self._must_harden():
            self._decide()
        if self.phase == "harden":
            update = self._harden() or update
        elif self.phase == "adapt":
            self._write_gates(self._unit_rho())
        return update

    def applied(self) -> None:
        if self.target is None:
            self._write_gates(self._unit_rho())

    def _move_alpha(self) -> None:
        """Take the dual step on the price and the proximal step on alpha."""
        if self._pending is None:
            return
        cfg, units = self.config, self.units
        rho = self._unit_rho()
        cost: Floats = np.bincount(self.group, units.costs.marginal(rho), minlength=len(self.alpha)).astype(np.float64)
        weight = cost / cost.mean() if cfg.cost_weighted else np.ones_like(cost)
        if cfg.slope == "secant":  # the slope is an amplitude, so is the cost it is weighed against
            weight = np.sqrt(weight)
        if self.budget is not None:
            # Augmented Lagrangian: the integral finds the price, the proportional part damps it critically.
            excess = units.costs.parameters(rho) / self.budget - 1.0
            self.dual = max(0.0, self.dual + cfg.lr_price * excess)
            self.price = max(0.0, self.dual + 2.0 * np.sqrt(cfg.lr_price / cfg.lr_alpha) * excess)
        live = np.full(len(self.alpha), np.inf)
        np.minimum.at(live, self.group, np.where(units.live() < units.limit, units.live(), np.inf))
        hi = np.minimum(self.limit, live) / cfg.r0
        lo = np.minimum(1.0, self.limit) / cfg.r0
        core.prox_step(self.alpha, self._pending, weight, lo, hi, cfg.lr_alpha, float(self.price), cfg.tv)

    def _allocate(self) -> RankUpdate | None:
        """Give each unit its boundary and look-ahead component; take back those whose gate is closed."""
        rho, live = self._unit_rho(), self.units.live()
        wanted = np.minimum(np.ceil(rho).astype(np.int64) + 1, self.units.limit)
        kept = np.minimum(np.ceil(rho + self.config.hysteresis).astype(np.int64) + 1, self.units.limit)
        ranks = np.where(live < wanted, wanted, np.where(live > kept, wanted, live))
        return self._resize_to(ranks)

    def _resize_to(self, ranks: Ints) -> RankUpdate | None:
        modules = {}
        now, then = self.units.by_module(self.units.live()), self.units.by_module(ranks)
        for name in self.units.names:
            if now[name] != then[name]:
                pairs = zip(now[name], then[name], strict=True)
                modules[name] = tuple(UnitUpdate(tuple(range(min(a, b))), max(b - a, 0)) for a, b in pairs)
        return RankUpdate(modules, seed=self.config.seed + self.step) if modules else None

    def _decide(self) -> None:
        """Fix the final ranks; gates then slide there."""
        limit = np.minimum(self.units.limit, self.units.live())
        self.target = whole_ranks(self.rho, limit, self.group, self.units.costs, self.budget)
        self._record_ranks(self.target)
        self.harden_from, self.harden_at = self._unit_rho(), self.step

    def _harden(self) -> RankUpdate | None:
        """Slide gates from their soft values to open or closed; drop the closed components at the end."""
        assert self.target is not None
        assert self.harden_from is not None
        length = self._at(self.config.harden_ratio)
        progress = min(1.0, (self.step - self.harden_at + 1) / max(length, 1))
        self._write_gates(self.harden_from, progress)
        if progress < 1.0:
            return None
        self.harden_from = None
        return self._resize_to(self.target)

    @torch.no_grad()
    def finalize(self) -> None:
        if self.target is None:
            self._decide()
        if self.harden_from is not None:
            self.harden_at = -(10**9)  # no time to slide
            update = self._harden()
            if update is not None and self.apply is not None:
                self.apply(update)

    def _write_gates(self, rho: Floats, progress: float = 0.0) -> None:
        layers, live, rows = self.units.layers, self.units.live(), self.units.rows()
        base = np.array([0 if g.lora_gate is None else g.lora_gate.data_ptr() for g in layers], dtype=np.int64)
        blocks = np.stack([base[self.units.module_of] + 4 * rows, live], axis=1)
        core.ramp_gates(blocks, rho, self.config.gate_floor)
        if progress > 0.0 and self.target is not None:
            gates = [layer.lora_gate.numpy() for layer in layers if layer.lora_gate is not None]
            for u, (m, row) in enumerate(zip(self.units.module_of, rows, strict=True)):
                unit = gates[m][row : row + live[u]]
                unit += progress * ((np.arange(live[u]) < self.target[u]) - unit)

    # Records and state.

    def _record_ranks(self, ranks: Ints | None = None) -> None:
        event = "adapt" if ranks is None else "freeze"
        ranks = self._rounded() if ranks is None else ranks
        for u in np.flatnonzero(ranks != self.reported):
            g, old, new = self.group[u], int(self.reported[u]), int(ranks[u])
            gain, m = float(self.gain[g]), int(self.units.module_of[u])
            sign = ">" if new > old else "<"
            why = f"marginal gain {gain:.3g} {sign} price {self.price:.3g}: soft rank is now {self.rho[g]:.2f}"
            if event == "freeze":
                why = f"final rank from soft rank {self.rho[g]:.2f}" + (" within the budget" if self.budget else "")
            self.records.append(
                {
                    "step": self.step,
                    "event": event,
                    "module": self.units.names[m],
                    "unit": int(u - self.units.first[m]),
                    "from": old,
                    "to": new,
                    "rho": float(self.rho[g]),
                    "gain": gain,
                    "price": float(self.price),
                    "reason": why,
                }
            )
        self.reported = ranks

    def _record_skip(self) -> None:
        self.records.append({"step": self.step, "event": "skip", "reason": "gradients hold NaN or Inf, ranks stay"})

    def ranks(self) -> dict[str, list[int]]:
        return self.units.by_module(self._rounded() if self.target is None else self.target)

    def summary(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "phase": self.phase,
            "mean_rank": float(np.mean(self._unit_rho() if self.target is None else self.target)),
            "price": float(self.price),
            "budget": self.budget,
            "parameters": self.units.costs.parameters(self._rounded() if self.target is None else self.target),
        }

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for key in ("alpha", "gain", "target", "harden_from", "reported"):
            value = getattr(self, key)
            state[key] = None if value is None else value.tolist()
        for key in ("grad_square", "price", "dual", "harden_at"):
            state[key] = getattr(self, key)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["alpha"]) != len(self.alpha):
            raise ValueError(f"state: alpha must have {len(self.alpha)} entries, got {len(state['alpha'])}")
        super().load_state_dict(state)
        for key in ("alpha", "gain", "harden_from"):
            setattr(self, key, None if state[key] is None else np.array(state[key], dtype=np.float64))
        for key in ("target", "reported"):
            setattr(self, key, None if state[key] is None else np.array(state[key], dtype=np.int64))
        self.grad_square, self.price, self.dual = (float(state[k]) for k in ("grad_square", "price", "dual"))
        self.harden_at = int(state["harden_at"])
