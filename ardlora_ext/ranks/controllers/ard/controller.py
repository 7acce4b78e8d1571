"""ARD-LoRA (arXiv:2506.18267): ranks from a learned factor alpha per unit, r = max(1, round(r0 * alpha)).

The paper's rank has no derivative; the reconstruction (docs/design.md) gives component j of a unit with soft rank
rho = r0 * alpha the gate m_j(rho) of `csrc/include/ardlora/regularizer.h`. Only the boundary component j = floor(rho)
carries gradient: dL/drho = dL/dm_j = <dW_j, W_j> / m_j, a row dot of the unit's own factor with its gradient. One more
component, the look-ahead, is trained behind a nearly closed gate, so ranks can grow as well as fall.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ardlora_ext.config import ArdConfig
from ardlora_ext.ranks.controllers.ard.gates import Gates
from ardlora_ext.ranks.controllers.ard.order import component_orders
from ardlora_ext.ranks.controllers.ard.regularizer import alpha_step, layer_chains, layer_key
from ardlora_ext.ranks.controllers.ard.slopes import EMA, Dots, SlopeEstimator, held_out_gradients, row_dots
from ardlora_ext.ranks.controllers.ard.state import check_state
from ardlora_ext.ranks.controllers.base import Controller
from ardlora_ext.ranks.controllers.costs import Floats, Ints
from ardlora_ext.ranks.controllers.knapsack import whole_ranks
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate

_OPEN_END_WARMUP = 2  # update intervals, when the length of the run is not known


class ArdController(Controller[ArdConfig]):
    """Learns one alpha per unit (or per layer) by proximal steps; see `ArdConfig` for every constant.

    Phases, by step: `warmup` (nothing moves), `adapt`, `harden` (gates slide to 0 or 1), `frozen`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ArdConfig,
        total_steps: int | None = None,
        holdout: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(model, config, config.total_steps if total_steps is None else total_steps)
        self.holdout = holdout
        units = self.units
        keys = [layer_key(units.names[m]) for m in units.module_of] if config.granularity == "layer" else None
        self._alone = keys is None  # each unit is a group
        self._unit_limit = units.limit.astype(np.float64)
        self.group: Ints = np.arange(len(units)) if keys is None else np.unique(keys, return_inverse=True)[1]
        groups = int(self.group.max()) + 1
        self.limit = np.zeros(groups)
        np.maximum.at(self.limit, self.group, units.limit)
        starts = np.array([config.start_rank(name) for name in units.names], dtype=np.int64)[units.module_of]
        self._starts: Ints = np.minimum(starts, units.limit)
        start = np.zeros(groups)
        np.maximum.at(start, self.group, self._starts)
        self.alpha: Floats = start / config.r0
        self.grad_square = 0.0
        self.gain: Floats = np.zeros(groups)  # EMA of -dL/dalpha, normalised
        self.gates = Gates(units, config)
        self.slope = SlopeEstimator(units, self.gates, config)
        self.previous = self.alpha
        self.chains = layer_chains(units, self.group, whole_layers=keys is not None)
        self.lipschitz = 0.0
        self.price = 0.0 if config.l1 is None else config.l1
        self.dual = 0.0
        self.target: Ints | None = None  # whole ranks, once decided
        self.harden_from: Floats | None = None  # rho when hardening began
        self.harden_at = 0
        self.budget = self._budget()
        self.reported = self._rounded()
        self._asked: Callable[[], None] | None = None  # takes in the gradients of this step
        self._pending: Floats | None = None
        self._unwritten = self.skip = False  # gates are to be written; this step's gradients hold NaN or Inf
        self.unit_price: Floats = np.full(groups, self.price)
        self._bounded_by: Ints | None = None  # live ranks that _bounds belong to
        self._bounds = self.alpha, self.alpha

    def begin_anew(self) -> None:
        """Start from the ranks that units have instead of from r0."""
        super().begin_anew()
        ranks = np.zeros(len(self.limit))
        np.maximum.at(ranks, self.group, self.units.live())
        self.alpha = self.previous = ranks / self.config.r0
        self.reported = self._rounded()

    def extend(self, total_steps: int) -> None:
        super().extend(total_steps)
        if self.target is not None and not self._must_harden():  # what was fixed for a shorter run moves again
            self.target = self.harden_from = None
            self.begin_anew()

    def _budget(self) -> float | None:
        if self.config.l1 is not None:
            return None
        if self.config.allowance is not None:
            return float(self.config.allowance)
        return self.units.costs.parameters(self._starts)

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

    def _due(self) -> bool:
        """Tell whether ranks may change after this step."""
        return (self.step + 1) % self.config.update_interval == 0

    def _must_harden(self) -> bool:
        left = self._at(self.config.final_ratio) + self._at(self.config.harden_ratio)
        return self.total_steps is not None and self.step >= self.total_steps - left

    # Facts.

    @property
    def rho(self) -> Floats:
        """Soft rank of each group."""
        return self.config.r0 * self.alpha

    def _unit_rho(self) -> Floats:
        rho = self.rho if self._alone else self.rho[self.group]
        return np.minimum(rho, self._unit_limit)

    def _by_group(self, values: Floats) -> Floats:
        """Return the sums of [units] values over each group."""
        if self._alone:
            return values
        return np.bincount(self.group, values, minlength=len(self.alpha)).astype(np.float64)

    def _rounded(self) -> Ints:
        return np.maximum(1, np.floor(self._unit_rho() + 0.5)).astype(np.int64)

    def observe(self) -> None:
        self._take_in()  # where an optimizer asks for several gradients in a step
        self._pending, self.skip = None, False
        if self.phase not in ("warmup", "adapt"):
            return
        gated = [p.grad for p in self.units.gated]
        # Alpha follows these alone; a decision is not made on a step that is broken elsewhere either.
        ungated = [p.grad for p in self.units.ungated] if self._due() else ()
        if self.holdout is None and all(g is None for g in gated):
            return
        dots = [row_dots(self.units, gated, ungated)]
        if self.holdout is not None:
            dots.append(row_dots(self.units, held_out_gradients(self.units, self.holdout, self.processes)))
        slope = self.slope.asked(self.processes)
        self._asked = lambda: self._take(dots, slope)
        if self.slope.looks(self.step):
            self._take_in()

    def _take_in(self) -> None:
        """Take this step's gradients in; once the optimizer's step is queued, a GPU has work while it is waited for."""
        asked, self._asked = self._asked or (lambda: None), None
        asked()

    def _take(self, asked: Sequence[Callable[[], tuple[Dots, Dots]]], slope: Callable[..., Floats]) -> None:
        found = [dots() for dots in asked]
        if not all(np.isfinite(part).all() for dots in found for part in dots):
            self.records.append({"step": self.step, "event": "skip", "reason": "gradients hold NaN or Inf, ranks stay"})
            self.skip = True
            return
        gradient = self._by_group(slope(found[-1][0], self._unit_rho(), self.step))
        if self.config.normalize:
            correction = 1.0 - EMA ** (self.step + 1)
            self.grad_square = EMA * self.grad_square + (1.0 - EMA) * float(gradient @ gradient) / len(gradient)
            gradient = gradient / max(np.sqrt(self.grad_square / correction), 1e-30)
        else:
            gradient = gradient * self.config.r0
        gain = np.asarray(EMA * self.gain - (1.0 - EMA) * gradient, dtype=np.float64)
        travelled = float(np.linalg.norm(self.alpha - self.previous))
        if travelled > 0.0:
            self.lipschitz = max(self.lipschitz, float(np.linalg.norm(gain - self.gain)) / travelled)
        self.gain, self._pending = gain, gradient

    # Decisions.

    def start(self) -> RankUpdate | None:
        return self._allocate() if self.target is None and self.step == 0 else None  # a resumed run has its ranks

    def propose(self) -> RankUpdate | None:
        self._take_in()
        phase, due = self.phase, self._due()
        self.step += 1
        update = None
        if phase == "adapt" and not self.skip:
            self._move_alpha()
            if due:
                self._record_ranks()
                update = self._allocate()
        if self.target is None and self._must_harden():
            self._decide(self.units.limit)
            update = self._allocate()
        self._unwritten = self.phase in ("adapt", "harden")
        if self.phase == "harden" and self._hardened == 1.0:
            update = self._harden()
        return update

    def applied(self) -> None:
        self._unwritten = self._unwritten or self.phase != "frozen"
        self.settle()

    def settle(self) -> None:
        if self._unwritten and self.target is None:
            self.gates.write(self._unit_rho())
        elif self._unwritten:
            self._open_gates()
        self._unwritten = False

    def parts(self) -> list[object]:
        return [self, self.slope]

    def _move_alpha(self) -> None:
        """Take the dual step on the price and the regularised step on alpha."""
        if self._pending is None:
            return
        cfg, units = self.config, self.units
        rho = self._unit_rho()
        parameters, marginal = units.costs.at(rho)
        cost = self._by_group(marginal)
        weight = cost / cost.mean() if cfg.cost_weighted else np.ones(len(cost))
        if cfg.slope == "secant":  # the slope is an amplitude, so is the cost it is weighed against
            weight = np.sqrt(weight)
        if self.budget is not None:
            # Augmented Lagrangian: the integral finds the price, the proportional part damps it critically.
            excess = parameters / self.budget - 1.0
            self.dual = max(0.0, self.dual + cfg.lr_price * excess)
            self.price = max(0.0, self.dual + 2.0 * np.sqrt(cfg.lr_price / cfg.lr_alpha) * excess)
        self.unit_price = np.asarray(self.price * weight, dtype=np.float64)
        moved = alpha_step(
            self.alpha,
            self.previous,
            self._pending,
            np.asarray(weight, dtype=np.float64),
            self._alpha_bounds(),
            cfg.lr_alpha,
            float(self.price),
            cfg.tv,
            cfg.variation,
            cfg.variation_form == "explicit",
            self.chains,
        )
        self.previous, self.alpha = self.alpha, moved

    def _alpha_bounds(self) -> tuple[Floats, Floats]:
        """Return the smallest and largest alpha of each group: up to the components that its units train now."""
        live = self.units.live()
        if live is not self._bounded_by:
            highest = np.full(len(self.alpha), np.inf)
            np.minimum.at(highest, self.group, np.where(live < self.units.limit, live, np.inf))
            highest = np.minimum(self.limit, highest)
            self._bounds = np.minimum(1.0, self.limit) / self.config.r0, highest / self.config.r0
            self._bounded_by = live
        return self._bounds

    def _allocate(self) -> RankUpdate | None:
        """Give each unit its boundary and look-ahead component; take back those whose gate is closed.

        Once final ranks are known, no unit has less: what the budget had left to give trains from now on.
        """
        rho, live = self._unit_rho(), self.units.live()
        wanted = np.minimum(np.ceil(rho).astype(np.int64) + 1, self.units.limit)
        kept = np.minimum(np.ceil(rho + self.config.hysteresis).astype(np.int64) + 1, self.units.limit)
        ranks = np.where(live < wanted, wanted, np.where(live > kept, wanted, live))
        if self.target is not None:
            ranks = np.maximum(ranks, self.target)
        return self._resize_to(ranks, reorder=self.config.reorder and self.config.gate == "ramp")

    def _resize_to(self, ranks: Ints, reorder: bool = False) -> RankUpdate | None:
        modules, orders = {}, component_orders(self.units, self._unit_rho()) if reorder else {}
        now, then = self.units.by_module(self.units.live()), self.units.by_module(ranks)
        for m, name in enumerate(self.units.names):
            if now[name] != then[name] or m in orders:
                order = orders.get(m, list(range(max(now[name]))))
                pairs = zip(now[name], then[name], strict=True)
                modules[name] = tuple(UnitUpdate(tuple(order[: min(a, b)]), max(b - a, 0)) for a, b in pairs)
        return RankUpdate(modules, seed=self.config.seed + self.step) if modules else None

    def _decide(self, limit: Ints) -> None:
        """Fix the final ranks; gates then slide there."""
        self.target = whole_ranks(self.rho, limit, self.group, self.units.costs, self.budget)
        self._record_ranks(self.target)
        self.harden_from, self.harden_at = self._unit_rho(), self.step

    @property
    def _hardened(self) -> float:
        """Share of the way that gates have gone from their soft values to open or closed."""
        return min(1.0, (self.step - self.harden_at + 1) / max(self._at(self.config.harden_ratio), 1))

    def _open_gates(self) -> None:
        """Let gates slide on from where they were when hardening began; to the end when that is over."""
        assert self.target is not None
        if self.harden_from is not None:
            self.gates.write(self.harden_from)
        self.gates.slide(self.target, 1.0 if self.harden_from is None else self._hardened)

    def _harden(self) -> RankUpdate | None:
        """Drop the components whose gates have closed."""
        assert self.target is not None
        self.harden_from, self._unwritten = None, True
        return self._resize_to(self.target)

    def finalize(self) -> None:
        self.carry_out(self._finish)

    def _finish(self) -> RankUpdate | None:
        if self.target is None:
            self._decide(np.minimum(self.units.limit, self.units.live()))
        return None if self.harden_from is None else self._harden()

    # Records and state.

    def _record_ranks(self, ranks: Ints | None = None) -> None:
        event = "adapt" if ranks is None else "freeze"
        ranks = self._rounded() if ranks is None else ranks
        for u in np.flatnonzero(ranks != self.reported):
            g, old, new = self.group[u], int(self.reported[u]), int(ranks[u])
            gain, price, m = float(self.gain[g]), float(self.unit_price[g]), int(self.units.module_of[u])
            sign = ">" if float(f"{gain:.3g}") > float(f"{price:.3g}") else "<"
            why = f"marginal gain {gain:.3g} {sign} price {price:.3g}: soft rank is now {self.rho[g]:.2f}"
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
                    "price": price,
                    "reason": why,
                }
            )
        self.reported = ranks

    def step_bound(self) -> dict[str, float | bool]:
        """Tell whether `lr_alpha` obeys Theorem III.1's  eta_alpha <= 1 / (L_T + lambda beta).

        L_T, the Lipschitz constant of the task loss's slope in alpha, is estimated as the largest ratio of changes in
        the smoothed slope to changes in alpha seen so far (in the normalised units the step is taken in). That is an
        estimate from below: a step that does not obey is too large for the theorem, one that obeys may still be
        (`python -m ardlora_ext.bench descent`).
        """
        bound = 1.0 / max(self.lipschitz + float(self.price) * self.config.tv, 1e-300)
        obeys = bool(self.config.lr_alpha <= bound)
        return {"lipschitz": self.lipschitz, "bound": bound, "lr_alpha": self.config.lr_alpha, "obeys": obeys}

    def ranks(self) -> dict[str, list[int]]:
        return self.units.by_module(self._rounded() if self.target is None else self.target)

    def summary(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "phase": self.phase,
            "mean_rank": float(np.mean(self._unit_rho() if self.target is None else self.target)),
            "alpha": float(np.mean(self.alpha)),
            "price": float(self.price),
            "budget": None if self.budget is None else int(self.budget),
            "parameters": self.parameters(),
        }

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for key in ("alpha", "previous", "gain", "unit_price", "target", "harden_from", "reported"):
            value = getattr(self, key)
            state[key] = None if value is None else value.tolist()
        for key in ("grad_square", "price", "dual", "lipschitz"):
            state[key] = float(getattr(self, key))
        state["harden_at"] = int(self.harden_at)
        spectrum = self.slope.spectrum
        state["fisher"] = self.slope.fisher.tolist()
        state["spectrum"] = None if spectrum is None else spectrum.tolist()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, len(self.alpha), len(self.units))
        super().load_state_dict(state)
        for key in ("alpha", "previous", "gain", "unit_price", "harden_from"):
            setattr(self, key, None if state[key] is None else np.array(state[key], dtype=np.float64))
        for key in ("target", "reported"):
            setattr(self, key, None if state[key] is None else np.array(state[key], dtype=np.int64))
        for key in ("grad_square", "price", "dual", "lipschitz"):
            setattr(self, key, float(state[key]))
        self._asked, self.harden_at = None, int(state["harden_at"])
        self._unwritten = self.phase != "frozen"
        self.slope.fisher = np.array(state["fisher"], dtype=np.float64)
        self.slope.spectrum = None if state["spectrum"] is None else np.array(state["spectrum"], dtype=np.float64)
