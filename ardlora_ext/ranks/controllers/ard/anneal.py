"""ARD-LoRA with a fat start and a thin end: alpha per unit under one price that rises as the budget falls.

Units start at `start` times their share. At each decision the ranks r = r0 alpha are those that minimise

    L(alpha) + price sum_u w_u |alpha_u|

where L is what the loss is expected to lose by the components that go, to second order (`ranks/loss_metric.py`), w_u
what a component of the unit costs, and the price the lowest that meets the budget of the time: an exact knapsack.
Components go by recompression with the optimizer's state; none comes back, so a unit may have rank 0. The last part of
the run trains at the final ranks.

With `budget="auto"` the budget falls further, but no cut is made that costs more than the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ardlora_ext.config import ArdConfig
from ardlora_ext.model.parameters import SERVED_RANKS, served_rank
from ardlora_ext.ranks.controllers.ard.regularizer import layer_key
from ardlora_ext.ranks.controllers.ard.tolerance import DEEPEST, PARTS, Cut, Holdout
from ardlora_ext.ranks.controllers.base import Controller
from ardlora_ext.ranks.controllers.costs import Floats, Ints
from ardlora_ext.ranks.controllers.trial import scored, tried
from ardlora_ext.ranks.controllers.worth import Allocation, Choice, Offer, allocate, allocate_padded, offers
from ardlora_ext.ranks.loss_metric import LossMetric
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate

_MOST_CUTS = 20
# The loss is looked at every fourth step, where that leaves two looks to each decision; else every second.
_SELDOM, _OFTEN = 4, 2


def budget_at(progress: float, first: float, last: float, shape: str) -> float:
    """Return the parameters allowed when `progress` (0 to 1) of the fall is over."""
    if shape == "geometric":
        return float(first * (last / first) ** progress)
    left = 1.0 - progress if shape == "linear" else (1.0 - progress) ** 3
    return last + (first - last) * left


class AnnealController(Controller[ArdConfig]):
    """Lets the budget fall and chooses ranks for it; see `ArdConfig` and the module.

    Phases, by step: `warmup` (nothing moves), `adapt`, `frozen`.

    Attributes:
        shares: [units] r0 of each.
        budget: parameters at the end, with `budget="auto"` at least.
        first: parameters at the start.
        price: worth per parameter around which the present ranks were chosen, relative to all that there is.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ArdConfig,
        total_steps: int | None = None,
        holdout: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(model, config, config.total_steps if total_steps is None else total_steps)
        units = self.units
        self.model = model
        self.shares: Ints = np.array([config.share(n) for n in units.names], dtype=np.int64)[units.module_of]
        self.first = self._counted(units.live())
        self.price = 0.0
        self.finished = False
        self.holdout = None if holdout is None else Holdout(lambda: scored(model, lambda: float(holdout())))
        if config.metric == "loss":
            self.metric = LossMetric(dict(zip(units.names, units.layers, strict=True)))

    # The schedule.

    @property
    def auto(self) -> bool:
        """Whether the tolerance, not a budget, ends the fall."""
        return self.config.budget == "auto"

    @property
    def budget(self) -> float:
        """Parameters at the end, with `budget="auto"` at least."""
        units, config = self.units, self.config
        if self.auto:
            floor = self._counted(np.minimum(config.min_rank, units.limit))
            return max(self.first / DEEPEST, floor, float(units.costs.own.min()))
        if config.allowance is not None:
            return float(config.allowance)
        return self._counted(np.minimum(self.shares, units.limit))

    @property
    def begins(self) -> int | None:
        """Steps before the budget falls, None where the length of the run is not known."""
        return None if self.total_steps is None else round(self.total_steps * self.config.warmup_ratio)

    @property
    def ends(self) -> int | None:
        """Steps after which ranks are final."""
        if self.total_steps is None:
            return None
        return max(round(self.total_steps * (1.0 - self.config.final_ratio)), (self.begins or 0) + 1)

    @property
    def phase(self) -> str:
        """`warmup`, `adapt` or `frozen`."""
        if self.finished:
            return "frozen"
        return "warmup" if self.begins is None or self.step < self.begins else "adapt"

    def _budget_now(self) -> int | None:
        """Return the parameters allowed from this step on, None when nothing is to be decided."""
        begins, ends = self.begins, self.ends
        if begins is None or ends is None or self.step < begins:
            return None
        if self.step >= ends:
            return int(self.budget)
        interval = max(self.config.update_interval, math.ceil((ends - begins) / _MOST_CUTS))
        if (ends - self.step) % interval:
            return None
        progress = (self.step - begins) / (ends - begins)
        return int(budget_at(progress, max(self.first, self.budget), self.budget, self.config.shape))

    # Facts.

    @property
    def _looks_now(self) -> bool:
        """Whether the backward passes of the coming step are looked at."""
        every = _SELDOM if self.config.update_interval >= 2 * _SELDOM else _OFTEN
        return self.metric is not None and not self.finished and self.step % every == 0

    def _look(self) -> None:
        """Look at the backward passes of the coming step, or not."""
        if self.metric is not None:
            self.metric.watch(not self.finished)
            self.metric.looking = self._looks_now

    def observe(self) -> None:
        if self.holdout is not None and self.holdout.first is None and not self.finished:
            self.holdout.first = self._held_out_loss()
        if self.metric is not None and self._looks_now:
            self.metric.take(self.processes)

    @property
    def step_share(self) -> float:
        """(r0 / r)^step_power of the mean rank r, at most 1."""
        costs, share = self.units.costs, np.minimum(self.shares, self.units.limit)
        live = costs.parameters(self.units.live())
        return float(min(1.0, costs.parameters(share) / max(live, 1.0)) ** self.config.step_power)

    @property
    def alpha(self) -> Floats:
        """Rank of each unit in shares of its r0 [units]."""
        return np.asarray(self.units.live() / self.shares, dtype=np.float64)

    # Decisions.

    def parts(self) -> list[object]:
        return [self, *(part for part in (self.metric, self.holdout) if part is not None)]

    def settle(self) -> None:
        self._look()

    def propose(self) -> RankUpdate | None:
        self.step += 1
        update = None
        allowed = None if self.finished else self._budget_now()
        if allowed is not None:
            self.finished = self.ends is not None and self.step >= self.ends
            update = self._tolerated(allowed) if self.auto else self._cut(allowed)
        return update

    def finalize(self) -> None:
        while not self.finished:
            self.carry_out(self._next_cut if self.auto else self._last_cut)

    def _last_cut(self) -> RankUpdate | None:
        self.finished = True
        return self._cut(int(self.budget))

    def _next_cut(self) -> RankUpdate | None:
        """Go one of the steps that the longest run would take."""
        present = self._counted(self.units.live())
        update = self._tolerated(max(int(present * DEEPEST ** (-1 / _MOST_CUTS)), int(self.budget)))
        self.finished |= update is None
        return update

    def _cut(self, allowed: int) -> RankUpdate | None:
        """Choose ranks for `allowed` parameters, none below those that the last budget would have now."""
        live = self.units.live()
        most = self._most()
        if self._counted(live) <= allowed and int(live.max()) <= most:
            return None
        found = self._offers(most)
        if self.config.budget_counts == "live" and not self.auto and allowed > self.budget:
            found = self._kept(found, self._allocation(found)(int(self.budget)))
        return self._made(self._allocation(found)(allowed), allowed)

    @staticmethod
    def _kept(found: list[list[Offer]], last: Allocation) -> list[list[Offer]]:
        """Return the offers without ranks below those of `last`."""

        def above(offer: Offer) -> Offer:
            least = np.array(last.ranks[offer.name])[offer.indices, None]
            levels = np.arange(offer.worth.shape[1])
            return replace(offer, worth=np.where(levels < least, -np.inf, offer.worth))

        return [[above(offer) for offer in some] for some in found]

    def _tolerated(self, allowed: int) -> RankUpdate | None:
        """Cut towards `allowed` as far as the tolerance lets."""
        live, most = self.units.live(), self._most()
        present = self._counted(live)
        if present <= allowed and int(live.max()) <= most:
            return None
        allocation = self._allocation(self._offers(most))
        for part in range(PARTS):
            aim = max(allowed, int(present * 0.5**0.5**part))
            found = allocation(aim)
            wanted = self._wanted(found)
            if not found.total > 0.0 or np.array_equal(wanted, live):
                break
            cut = self._judged(Cut(present, self._counted(wanted), 1.0 - found.kept / found.total), wanted)
            if cut.within(self.config.tolerance):
                return self._made(found, aim, cut)
            if part == 0:
                self._hold(cut)
        return self._cut(int(present))  # to what `serve_rank` allows

    def _judged(self, cut: Cut, wanted: Ints) -> Cut:
        """Return the cut with what it costs on held-out batches, if there are any and it is not too dear already."""
        if self.holdout is None or not cut.within(self.config.tolerance):
            return cut
        before = self._held_out_loss()
        names = self.units.by_module(wanted)
        return self.holdout.judged(cut, before, tried(self.model, names, self.metric, self._held_out_loss))

    def _held_out_loss(self) -> float:
        assert self.holdout is not None
        return self.holdout.now(self.units.layers[0].lora_A.device, self.processes)

    def _hold(self, cut: Cut) -> None:
        """Note a cut that is too dear."""
        reason = f"{cut.told()}, more than {self.config.tolerance:.2%} for each halving"
        self.records.append({"step": self.step, "event": "hold", **cut.costs(), "reason": reason})

    def _wanted(self, found: Allocation) -> Ints:
        ranks = np.array([r for name in self.units.names for r in found.ranks[name]], dtype=np.int64)
        return np.minimum(ranks, self.units.live())

    def _made(self, found: Allocation, allowed: int, cut: Cut | None = None) -> RankUpdate | None:
        """Return the change to these ranks, and note why."""
        live, wanted = self.units.live(), self._wanted(found)
        self.price = found.price / found.total if found.total > 0.0 else 0.0
        self._record(live, wanted, allowed, found, cut)
        names = self.units.by_module(wanted)
        now = self.units.by_module(live)
        modules = {
            name: tuple(UnitUpdate(tuple(range(r))) for r in ranks)
            for name, ranks in names.items()
            if ranks != now[name]
        }
        return RankUpdate(modules, seed=self.config.seed + self.step, leave="recompress") if modules else None

    def _counted(self, ranks: Ints) -> float:
        """Return what of the budget these ranks [units] take."""
        if self.config.budget_counts == "live":
            return self.units.costs.parameters(ranks)
        return float(self.units.costs.own @ (ranks > 0) * served_rank(int(ranks.max())))

    def _most(self) -> int:
        """Return the largest rank that a unit may have now: falls to `serve_rank` as the budget falls."""
        cap, largest = self.config.serve_rank, int(self.units.limit.max())
        if cap is None or cap >= largest:
            return largest
        begins, ends = self.begins, self.ends
        done = 1.0 if self.finished or begins is None or ends is None else (self.step - begins) / (ends - begins)
        return math.ceil(budget_at(done, largest, cap, "geometric"))

    def _offers(self, most: int) -> list[list[Offer]]:
        """Return what the components of each module are worth now, up to rank `most`."""
        config, units = self.config, self.units
        found = []
        for name, layer in zip(units.names, units.layers, strict=True):
            known = None if self.metric is None else self.metric.of(name)
            found.append(offers(name, layer, min(config.min_rank, layer.max_rank), known))
        if config.allocation != "learned":
            found = [[self._untold(offer, m) for offer in some] for m, some in enumerate(found)]
        return [[replace(offer, worth=offer.worth[:, : most + 1]) for offer in some] for some in found]

    def _allocation(self, found: list[list[Offer]]) -> Callable[[int], Allocation]:
        """Return what gives ranks for a number of parameters."""
        if self.config.budget_counts == "exported":
            every = [offer for some in found for offer in some]
            return lambda allowed: allocate_padded(every, allowed, SERVED_RANKS)
        choices = self._choices(found)
        return lambda allowed: allocate(choices, allowed)

    def _choices(self, found: list[list[Offer]]) -> list[Choice]:
        if self.config.granularity != "layer":
            return [Choice.of([offer]) for some in found for offer in some]
        together: dict[str, list[Offer]] = {}
        for name, some in zip(self.units.names, found, strict=True):
            together.setdefault(layer_key(name), []).extend(some)
        return [Choice.of(members) for members in together.values()]

    def _untold(self, offer: Offer, module: int) -> Offer:
        """Give components a worth that knows nothing of the model, the same in every decision of a run.

        `uniform`: a parameter's is alike in all units, so that ranks are as equal as the budget lets them, and who is
        one ahead on the way is drawn. `random`: drawn by unit.
        """
        generator = np.random.default_rng([self.config.seed, module, *offer.indices])
        drawn = generator.random((len(offer.worth), 1))
        if self.config.allocation == "uniform":
            drawn = (offer.own + offer.common) * (1.0 + 1e-3 * drawn)
        levels = np.arange(offer.worth.shape[1])
        steps = drawn / np.maximum(levels, 1)
        worth = np.cumsum(np.where(levels > 0, steps, 0.0), axis=1)
        present = np.array(self.units.layers[module].ranks)[offer.indices]
        least = np.minimum(self.config.min_rank, present)
        room = (levels >= least[:, None]) & (levels <= present[:, None])
        return replace(offer, worth=np.where(room, worth, -np.inf))

    # Records and state.

    def _record(self, before: Ints, after: Ints, allowed: int, found: Allocation, cut: Cut | None) -> None:
        event = "freeze" if self.finished else "adapt"
        reason = f"{allowed:,} parameters are allowed now: what is below price {self.price:.3g} goes"
        if found.total > 0.0:
            reason += f", {1.0 - found.kept / found.total:.2%} of all"
        costs = {} if cut is None else cut.costs()
        for u in np.flatnonzero(before != after):
            m = int(self.units.module_of[u])
            self.records.append(
                {
                    "step": self.step,
                    "event": event,
                    "module": self.units.names[m],
                    "unit": int(u - self.units.first[m]),
                    "from": int(before[u]),
                    "to": int(after[u]),
                    "price": self.price,
                    **costs,
                    "reason": reason,
                }
            )

    def begin_anew(self) -> None:
        self.first = self._counted(self.units.live())

    def extend(self, total_steps: int) -> None:
        super().extend(total_steps)
        if self.finished and self.ends is not None and self.step < self.ends:
            self.finished = False

    def ranks(self) -> dict[str, list[int]]:
        return self.units.by_module(self.units.live())

    def summary(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "phase": self.phase,
            "mean_rank": float(np.mean(self.units.live())),
            "alpha": float(np.mean(self.alpha)),
            "price": float(self.price),
            "budget": None if self.auto else int(self.budget),
            "parameters": self.parameters(),
        }

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state |= {"first": float(self.first), "price": float(self.price), "finished": self.finished}
        state["held_out"] = None if self.holdout is None else self.holdout.first
        state["metric"] = None if self.metric is None else self.metric.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        numbers = {key: float(state[key]) for key in ("first", "price")}
        held_out = state.get("held_out")
        if not all(map(math.isfinite, [*numbers.values(), 0.0 if held_out is None else float(held_out)])):
            raise ValueError("state: first, price and held_out must be finite, got NaN or Inf")
        if self.metric is not None and state["metric"] is not None:
            self.metric.load_state_dict(state["metric"])
        super().load_state_dict(state)
        self.first, self.price, self.finished = numbers["first"], numbers["price"], bool(state["finished"])
        if self.holdout is not None:
            self.holdout.first = held_out
        self._look()
