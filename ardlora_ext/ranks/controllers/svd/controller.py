"""What ElaLoRA and AdaLoRA share: the P Lambda Q form, its scores, its soft orthogonality and three phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from torch import nn

from ardlora_ext.config import SvdConfig
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.native.transfers import Fetched
from ardlora_ext.ranks.controllers.base import Controller
from ardlora_ext.ranks.controllers.costs import Ints
from ardlora_ext.ranks.controllers.svd.importance import Importance
from ardlora_ext.ranks.controllers.svd.penalty import PenaltyHooks
from ardlora_ext.ranks.controllers.svd.schedule import Phases
from ardlora_ext.ranks.controllers.svd.soft_orthogonality import Rows, add_penalty_gradients, share
from ardlora_ext.ranks.resize import UnitUpdate, row_plans

Config = TypeVar("Config", bound=SvdConfig)


class SvdController(Controller[Config]):
    """Scores components and keeps factors near orthonormal; what to do with the scores is for each method.

    Components are numbered through the model: module after module, unit after unit.
    """

    def __init__(self, model: nn.Module, config: Config, total_steps: int | None = None) -> None:
        super().__init__(model, config, config.total_steps if total_steps is None else total_steps)
        self.importance = Importance(self.units.layers, config.beta1, config.beta2)
        self.finished = False
        self._verdict: tuple[Fetched, int] | None = None  # on the gradients of a step, not yet read
        self._moved: list[tuple[object, dict[str, Any]]] = []  # what of whom is new once a proposed change is made
        # Scores of the task alone need gradients without the penalty until the step.
        self._penalty = PenaltyHooks([] if config.task_scores else self.units.layers, self._add_penalty)

    @property
    def phases(self) -> Phases:
        """The phases of the run.

        Raises:
            ValueError: its length is not known, or too short for them.
        """
        if self.total_steps is None:
            raise ValueError(
                f"attach: total_steps must be given for {type(self.config).__name__}, whose schedule depends on the "
                "length of the run, got None"
            )
        return Phases(*self.config.phases(self.total_steps), self.total_steps)

    @property
    def phase(self) -> str:
        """`warmup`, `adapt` or `frozen`."""
        return "frozen" if self.finished else self.phases.name(self.step)

    # Facts.

    def unit_of(self) -> Ints:
        """Return the unit of each component [components]."""
        return np.repeat(np.arange(len(self.units)), self.units.live())

    def scores(self) -> dict[str, list[float]]:
        """Return the present score of each component by module name; the last one once ranks are frozen."""
        rows = [sum(layer.ranks) for layer in self.units.layers]
        parts = np.split(self.importance.scores(), np.cumsum(rows)[:-1])
        return {name: part.tolist() for name, part in zip(self.units.names, parts, strict=True)}

    def observe(self) -> None:
        if self.config.task_scores:
            self._score()
        self._penalty.settle()

    def _add_penalty(self, layer: LoraLinear, factor: nn.Parameter) -> None:
        """Add the gradient of the soft orthogonality to that of a factor, in train mode and if it is due."""
        config, grad = self.config, factor.grad
        if config.orth_reg_weight == 0.0 or self.step % config.orth_interval or not layer.training or grad is None:
            return
        weight = config.orth_reg_weight * config.orth_interval
        strength = weight * share(config.initial_rank, factor.shape[1], len(self.units), config.orth_form)
        begins = layer.table.unit_begin
        rows = [Rows(factor, grad, begin, end, strength) for begin, end in pairwise(begins)]
        add_penalty_gradients(rows, config.orth_form)

    def detach(self) -> None:
        self._penalty.remove()
        super().detach()

    def _score(self) -> None:
        """Take this step's gradients into the scores; gradients with NaN or Inf are left out, with one record.

        The device leaves them out by itself: where that is a GPU, the record is made a step later, or before a decision
        has its own, so that no step waits for it.
        """
        self._hear()
        if self.finished or self.step >= self.phases.end:
            return
        verdict = self.importance.update()
        self._verdict = verdict, self.step
        if verdict.there:
            self._hear()

    def _hear(self) -> None:
        """Make the record of a step whose verdict has not been read."""
        heard, self._verdict = self._verdict, None
        if heard is None or all(map(bool, heard[0].values())):
            return
        if not self.records or self.records[-1]["event"] != "skip":
            reason = "gradients hold NaN or Inf: scores and ranks stay"
            self.records.append({"step": heard[1], "event": "skip", "reason": reason})

    def _release(self) -> None:
        """Give back what was kept for decisions: there are none any more."""
        self._hear()
        self.importance.release()

    # Rank changes.

    def _note(self, modules: Mapping[str, Sequence[UnitUpdate]]) -> None:
        """Let everything kept per component follow its row, to be there once the change is made."""
        plans = {
            m: row_plans(layer.layout, layer.ranks, modules[name])[0]
            for m, (name, layer) in enumerate(zip(self.units.names, self.units.layers, strict=True))
            if name in modules
        }
        self._moved = self._followed(plans)

    def _followed(self, plans: Mapping[int, Sequence[int]]) -> list[tuple[object, dict[str, Any]]]:
        """Return, by the object that holds it, what is kept per component, after rows of modules have moved."""
        return [(self.importance, self.importance.moved(plans))]

    def applied(self) -> None:
        for holder, values in self._moved:
            vars(holder).update(values)
        self._moved = []

    def parts(self) -> list[object]:
        return [self, self.importance]

    # Records and state.

    def _record(self, event: str, unit: int | None, **facts: Any) -> None:
        self._hear()
        place = {}
        if unit is not None:
            m = int(self.units.module_of[unit])
            place = {"module": self.units.names[m], "unit": int(unit - self.units.first[m])}
        self.records.append({"step": self.step, "event": event, **place, **facts})

    def unit_ranks(self) -> Ints:
        """Return the components that each unit uses [units]."""
        return self.units.live()

    def ranks(self) -> dict[str, list[int]]:
        return self.units.by_module(self.unit_ranks())

    def summary(self) -> dict[str, Any]:
        ranks = self.unit_ranks()
        return {
            "step": self.step,
            "phase": self.phase,
            "mean_rank": float(np.mean(ranks)),
            "total_rank": int(ranks.sum()),
            "parameters": self.parameters(),
        }

    def state_dict(self) -> dict[str, Any]:
        self._hear()
        return super().state_dict() | {"finished": self.finished, "importance": self.importance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.importance.load_state_dict(state["importance"])
        super().load_state_dict(state)
        self._verdict, self.finished = None, bool(state["finished"])
