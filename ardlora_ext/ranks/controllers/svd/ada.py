"""AdaLoRA (arXiv:2303.10512): start with more components than wanted, keep the best of them all by a falling budget.

A component that is not among the budget's best gets lambda = 0 after the optimizer step; it may come back, because
lambda keeps its gradient. The last phase holds the mask. After the last step masked components are taken out, which
changes nothing of the function. With `removal` they are taken out at once and never come back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ardlora_ext.config import AdaConfig
from ardlora_ext.native.transfers import sent
from ardlora_ext.ranks.controllers.costs import Floats, Ints
from ardlora_ext.ranks.controllers.svd.controller import SvdController
from ardlora_ext.ranks.controllers.svd.schedule import rank_budget
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate

Mask = NDArray[np.bool_]


def best(scores: Floats, budget: int) -> Mask:
    """Return which components are among the `budget` highest; of equal ones the later are."""
    kept = np.ones(len(scores), dtype=np.bool_)
    kept[np.argsort(scores, kind="stable")[: max(0, len(scores) - budget)]] = False
    return kept


class AdaController(SvdController[AdaConfig]):
    """Masks or removes components down to `target_r` per unit on average; see `AdaConfig` for every constant."""

    def __init__(self, model: nn.Module, config: AdaConfig, total_steps: int | None = None) -> None:
        super().__init__(model, config, total_steps)
        live = self.units.live()
        self.first_budget = int(live.sum())
        self.target_budget = min(config.target_r * len(live), self.first_budget)
        self.kept: Mask = np.ones(self.first_budget, dtype=np.bool_)  # [components]
        self._masks: list[tuple[torch.Tensor, torch.Tensor]] = []  # gates, and which of them are to become 0

    def start(self) -> RankUpdate | None:
        _ = self.phases  # raises where the run is too short
        return None

    def propose(self) -> RankUpdate | None:
        t, phases = self.step, self.phases
        if not self.config.task_scores:
            self._score()
        self.step += 1
        if self.finished:
            return None
        last = t == phases.total - 1
        final = t == phases.end or (last and not phases.tfinal)
        due = phases.tinit < t < phases.end and t % self.config.deltaT == 0
        if final or due:
            self._choose(rank_budget(t, phases, self.first_budget, self.target_budget) if due else self.target_budget)
        if final or due or t > phases.end:
            self._mask()
        if t >= phases.end or last:
            self._release()
        self.finished = last
        return self._remove() if last or self.config.removal else None

    def finalize(self) -> None:
        if not self.finished:
            self.carry_out(self._finish)

    def _finish(self) -> RankUpdate | None:
        self._choose(self.target_budget)
        self._mask()
        self._release()
        self.finished = True
        return self._remove()

    # Decisions.

    def _choose(self, budget: int) -> None:
        """Keep the `budget` best components."""
        before, scores = self.unit_ranks(), self.importance.scores()
        self.kept = best(scores, budget)
        after = self.unit_ranks()
        lowest = scores[self.kept].min(initial=np.inf)
        for u in np.flatnonzero(before != after):
            why = f"{after[u]} of its components score {lowest:.3g} or more, what the best {budget} of the model reach"
            ranks = {"from": int(before[u]), "to": int(after[u])}
            self._record("mask" if not self.config.removal else "remove", int(u), **ranks, budget=budget, reason=why)

    def _mask(self) -> None:
        """Let lambda of masked components be 0."""
        ends = np.cumsum([sum(layer.ranks) for layer in self.units.layers]).tolist()
        there = {device: sent(~self.kept, device) for device in {layer.lora_A.device for layer in self.units.layers}}
        self._masks = [
            (layer.lora_E.detach()[: end - begin, 0], there[layer.lora_A.device][begin:end])
            for layer, begin, end in zip(self.units.layers, [0, *ends], ends, strict=False)
            if layer.lora_E is not None
        ]

    def settle(self) -> None:
        for values, masked in self._masks:
            values.masked_fill_(masked, 0.0)
        self._masks = []

    def _remove(self) -> RankUpdate | None:
        """Take out what is masked."""
        modules: dict[str, tuple[UnitUpdate, ...]] = {}
        begin = 0
        for name, layer in zip(self.units.names, self.units.layers, strict=True):
            updates = []
            for rank in layer.ranks:
                updates.append(UnitUpdate(tuple(int(i) for i in np.flatnonzero(self.kept[begin : begin + rank]))))
                begin += rank
            if [unit.rank for unit in updates] != layer.ranks:
                modules[name] = tuple(updates)
        self._note(modules)
        return RankUpdate(modules) if modules else None

    def applied(self) -> None:
        super().applied()
        self._masks = []  # those were taken out
        live = int(self.units.live().sum())
        if live < len(self.kept):  # what is masked has just been taken out
            self.kept = np.ones(live, dtype=np.bool_)

    # Records and state.

    def unit_ranks(self) -> Ints:
        """Return the components of each unit that are not masked [units]."""
        return np.bincount(self.unit_of()[self.kept], minlength=len(self.units)).astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"kept": self.kept.tolist(), "first_budget": self.first_budget}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        live = int(self.units.live().sum())
        if len(state["kept"]) != live:
            raise ValueError(f"state: kept must have {live} entries, got {len(state['kept'])}")
        super().load_state_dict(state)
        self.kept = np.array(state["kept"], dtype=np.bool_)
        self.first_budget = int(state["first_budget"])
