"""ElaLoRA (arXiv:2504.00254): ranks move between units at a constant total.

Every `deltaT` steps of the middle phase each unit offers its k lowest-scoring components to one pool. The b lowest of
the pool are pruned; the b highest name the units that get a new component each: where even the worst matter, more is
needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ardlora_ext.config import ElaConfig
from ardlora_ext.ranks.controllers.costs import Floats, Ints
from ardlora_ext.ranks.controllers.svd.controller import SvdController
from ardlora_ext.ranks.controllers.svd.schedule import exchange_count
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate

_ALWAYS = -(10**9)  # step at which the first components were born: never young


@dataclass(frozen=True)
class Pool:
    """Candidates of a round by component number, lowest score first.

    Attributes:
        members: all of them.
        prunable: of each, whether it may be pruned; the only component of a unit may merely name it for growth.
    """

    members: Ints
    prunable: NDArray[np.bool_]

    @property
    def exchanges(self) -> int:
        """How many can be pruned while as many others name units for growth."""
        return min(int(self.prunable.sum()), len(self.members) // 2)


def candidates(scores: Floats, unit: Ints, live: Ints, young: NDArray[np.bool_], k: int, single: bool = False) -> Pool:
    """Return the min(k, r - 1) lowest components of each unit that are not young; ties in their order.

    Args:
        scores: [components].
        unit: [components] their unit, ascending.
        live: [units] ranks.
        young: [components] whether one is too new to be judged.
        k: components a unit may offer.
        single: let units of rank 1 offer their component for growth (without, they never grow again).
    """
    order = np.lexsort((scores, young, unit))
    place = np.arange(len(order)) - (np.cumsum(live) - live)[unit[order]]
    mature = np.bincount(unit[~young], minlength=len(live))
    offered = np.minimum(np.minimum(k, np.maximum(live - 1, int(single))), mature)
    members = order[place < offered[unit[order]]]
    members = members[np.lexsort((members, scores[members]))]
    return Pool(members, live[unit[members]] > 1)


def exchange(pool: Pool, unit: Ints, room: Ints, b: int, growth_order: Ints | None = None) -> tuple[Ints, Ints]:
    """Choose the components to prune and those whose units grow: equally many, at most b, disjoint.

    Args:
        pool: candidates, lowest score first.
        unit: [components] their unit.
        room: [units] components each may still get.
        b: exchanges wanted.
        growth_order: members in the order in which they name units; highest score first without it.
    """
    low = pool.members[pool.prunable][: min(b, pool.exchanges)]
    order = pool.members[::-1] if growth_order is None else growth_order
    left = room.copy()
    high: list[int] = []
    for c in order[~np.isin(order, low)]:
        if len(high) < len(low) and left[unit[c]] > 0:
            left[unit[c]] -= 1
            high.append(int(c))
    return low[: len(high)], np.array(high, dtype=np.int64)


def one_way(pool: Pool, unit: Ints, room: Ints, b: int, missing: int) -> tuple[Ints, Ints]:
    """Choose up to b components to prune where there are too many (`missing` < 0), else those whose units grow."""
    none = np.empty(0, dtype=np.int64)
    if missing < 0:
        return pool.members[pool.prunable][: min(b, -missing)], none
    high: list[int] = []
    left = room.copy()
    for c in pool.members[::-1]:
        if len(high) < min(b, missing) and left[unit[c]] > 0:
            left[unit[c]] -= 1
            high.append(int(c))
    return none, np.array(high, dtype=np.int64)


def with_ties(low: Ints, pool: Pool, unit: Ints, scores: Floats) -> Ints:
    """Return `low` and every candidate of the units it names that ties with its highest score (ElaLoRA's code)."""
    members = pool.members[pool.prunable]
    named = np.isin(unit[members], unit[low])
    tied: Ints = members[named & (scores[members] <= scores[low].max(initial=-np.inf))]
    return tied


class ElaController(SvdController[ElaConfig]):
    """Moves up to `b` components per round; see `ElaConfig` for every constant and for the two modes."""

    def __init__(self, model: nn.Module, config: ElaConfig, total_steps: int | None = None) -> None:
        super().__init__(model, config, total_steps)
        self.rounds = 0
        self.born = [np.full(sum(layer.ranks), _ALWAYS, dtype=np.int64) for layer in self.units.layers]

    def start(self) -> RankUpdate | None:
        live, b = self.units.live(), self.config.b
        _ = self.phases  # raises where the run is too short
        if self.step == 0:
            self._check_target(int(live.sum()))
            pool = self._pool(np.zeros(int(live.sum())))
            if self.config.target_r is None and pool.exchanges < b:
                raise ValueError(
                    f"attach: the pool of candidates must hold 2 b = {2 * b} components so that those pruned and those "
                    f"grown differ, got {len(pool.members)} from {len(live)} units with min(k, r - 1) each; "
                    f"use b <= {pool.exchanges}, or a larger k or r"
                )
        return RankUpdate({}, optimizer="pinned") if self.config.mode == "code" and self.rounds else None

    def _check_target(self, total: int) -> None:
        """Check that the rounds of the run are enough for `target_r`."""
        cfg, phases = self.config, self.phases
        steps = range(phases.total)
        most = sum(exchange_count(t, phases, cfg.deltaT, cfg.b, cfg.scheduler) for t in steps)
        if abs(self._goal(total) - total) > most:
            raise ValueError(
                f"attach: target_r must be within {most} components of the first {total}, what the rounds of the run "
                f"can move, got {self._goal(total)} components; use a larger b, a smaller deltaT, or train longer"
            )

    def _goal(self, total: int) -> int:
        """Return the components of the model at the end."""
        return total if self.config.target_r is None else self.config.target_r * len(self.units)

    def propose(self) -> RankUpdate | None:
        t, phases = self.step, self.phases
        if not self.config.task_scores:
            self._score()
        self.step += 1
        b = exchange_count(t, phases, self.config.deltaT, self.config.b, self.config.scheduler)
        update = self._round(b) if b and not self.finished else None
        if self.step >= phases.end:  # nothing more to decide
            self._release()
        return update

    def _pool(self, scores: Floats) -> Pool:
        young = self.step - 1 - np.concatenate(self.born) < self.config.grace_steps
        return candidates(scores, self.unit_of(), self.units.live(), young, self.config.k, self.config.rank1_candidate)

    def _round(self, b: int) -> RankUpdate | None:
        """Prune the b lowest of the pool and grow where its b highest are."""
        scores, unit = self.importance.scores(), self.unit_of()
        live, room = self.units.live(), self.units.limit - self.units.live()
        pool = self._pool(scores)
        if self.config.allocation == "none":
            self.rounds += 1
            return RankUpdate({}, optimizer="restarted") if self.config.mode == "code" else None
        if self.config.target_r is not None:
            low, high = one_way(pool, unit, room, b, self._goal(int(live.sum())) - int(live.sum()))
        elif self.config.allocation == "importance":
            low, high = exchange(pool, unit, room, b)
        else:
            rng = np.random.default_rng((self.config.seed, self.step))
            if self.config.allocation == "random":
                shuffled = rng.permutation(len(pool.members))
                pool = Pool(pool.members[shuffled], pool.prunable[shuffled])
            low, high = exchange(pool, unit, room, b, rng.permutation(pool.members))
        if self.config.mode == "code":
            low = with_ties(low, pool, unit, scores)
        if not len(low) and not len(high):
            return None
        self.rounds += 1
        grown = np.bincount(unit[high], minlength=len(live))
        self._record_round(scores, unit, low, high)
        return self._update(low, grown)

    def _update(self, low: Ints, grown: Ints) -> RankUpdate:
        pruned = set(low.tolist())
        modules: dict[str, tuple[UnitUpdate, ...]] = {}
        begin = 0
        for m, (name, layer) in enumerate(zip(self.units.names, self.units.layers, strict=True)):
            updates = []
            for u, rank in enumerate(layer.ranks, start=int(self.units.first[m])):
                keep = tuple(i for i in range(rank) if begin + i not in pruned)
                updates.append(UnitUpdate(keep, int(grown[u])))
                begin += rank
            if any(len(unit.keep) < rank or unit.grow for unit, rank in zip(updates, layer.ranks, strict=True)):
                modules[name] = tuple(updates)
        self._note(modules)
        code = self.config.mode == "code"
        return RankUpdate(
            modules,
            seed=self.config.seed + self.step,
            init="projected" if code else self.config.new_norm,
            optimizer="restarted" if code else "follow",
        )

    def _followed(self, plans: Mapping[int, Sequence[int]]) -> list[tuple[object, dict[str, Any]]]:
        born = list(self.born)
        for m, plan in plans.items():
            born[m] = np.append(born[m], self.step)[np.array(plan, dtype=np.int64)]  # -1 is what is born now
        return [*super()._followed(plans), (self, {"born": born})]

    def finalize(self) -> None:
        if not self.finished:
            self.carry_out(self._finish)

    def _finish(self) -> RankUpdate | None:
        self._release()
        self.finished = True
        return None

    # Records and state.

    def _record_round(self, scores: Floats, unit: Ints, low: Ints, high: Ints) -> None:
        live = self.units.live()
        for u in np.unique(unit[np.concatenate([low, high])]):
            gone, named = low[unit[low] == u], high[unit[high] == u]
            whys = []
            if len(gone):
                whys.append(f"{len(gone)} of the {len(low)} lowest scores pruned ({_listed(scores[gone])})")
            if len(named):
                whys.append(f"grown for {len(named)} of the {len(high)} highest ({_listed(scores[named])})")
            ranks = {"from": int(live[u]), "to": int(live[u] - len(gone) + len(named))}
            moved = {"pruned": len(gone), "grown": len(named)}
            self._record("exchange", int(u), **ranks, **moved, reason="; ".join(whys))

    def state_dict(self) -> dict[str, Any]:
        rows = [sum(layer.ranks) for layer in self.units.layers]  # recompressed components are as old as any
        born = [b.tolist() if len(b) == r else [_ALWAYS] * r for b, r in zip(self.born, rows, strict=True)]
        return super().state_dict() | {"rounds": self.rounds, "born": born}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rows = [sum(layer.ranks) for layer in self.units.layers]
        if [len(born) for born in state["born"]] != rows:
            raise ValueError(f"state: born must have {rows} entries, got {[len(born) for born in state['born']]}")
        super().load_state_dict(state)
        self.rounds = int(state["rounds"])
        self.born = [np.array(b, dtype=np.int64) for b in state["born"]]


def _listed(values: Floats) -> str:
    return ", ".join(f"{v:.3g}" for v in values)
