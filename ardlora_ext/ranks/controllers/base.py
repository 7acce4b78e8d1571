"""What every rank controller is: told facts, asked for a decision. It never touches the optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from torch import nn
from torch.utils.hooks import RemovableHandle

from ardlora_ext.config import AdapterConfig, LoraConfig
from ardlora_ext.file_set import write_set
from ardlora_ext.model.record import adapters
from ardlora_ext.processes import Group
from ardlora_ext.ranks.controllers.costs import Ints
from ardlora_ext.ranks.controllers.run import RankHistory, run_metrics
from ardlora_ext.ranks.controllers.units import Units
from ardlora_ext.ranks.loss_metric import LossMetric
from ardlora_ext.ranks.resize import RankUpdate
from ardlora_ext.report.rank_view import RankView
from ardlora_ext.report.run_files import METRICS_FILE, REPORT_FILE, check_facts, run_files
from ardlora_ext.unbroken import unbroken, undone_by

Config = TypeVar("Config", bound=AdapterConfig)


def _plain(value: Any) -> Any:
    """Return numpy's numbers as Python's, which torch.load takes."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


class Controller(Generic[Config]):
    """Decides about ranks. `attach` drives it: `observe` before each optimizer step, `propose` after it.

    Facts and decisions are new values in its attributes (or a record more), never changes in place, and the model stays
    as it is until the change is made, by `applied` and `settle`: so that `remember` can take back what was broken off.

    Attributes:
        records: one JSON-able dict per decision, with its reason.
        step: optimizer steps seen.
        metric: what is known of the loss by component, where a method asks for it.
        history: ranks and live parameters where they changed.
    """

    def __init__(self, model: nn.Module, config: Config, total_steps: int | None = None) -> None:
        self.config = config
        self.units = Units(adapters(model))
        self.total_steps = total_steps
        self.step = 0
        self.records: list[dict[str, Any]] = []
        self.apply: Callable[..., None] | None = None  # (update, called once it is made): set by attach
        self.handles: list[RemovableHandle] = []  # of the optimizer's hooks, set by attach
        self.processes: Group = None  # processes that decide the same, set by attach
        self.metric: LossMetric | None = None
        self.copies: list[weakref.ref[nn.Module]] = []  # whose ranks follow
        self.history = RankHistory()
        self._noted: tuple[Ints | None, int] = None, 0  # live ranks and the number of records that `history` knows
        self._model = weakref.ref(model)
        self.given = False  # whether its state was, by a checkpoint or by the wish for a new schedule

    def follow(self, copy: nn.Module) -> None:
        """Let the ranks of a copy of the model (EMA, SWA) change with the model's, for as long as the copy lives.

        Components that stay keep the copy's values, new ones begin as the model's, so that
        `torch.optim.swa_utils.AveragedModel` can average on.

        Args:
            copy: a copy made when ranks were what they are now, or one of those within it, such as an AveragedModel.

        Raises:
            ValueError: it has other adapters or ranks.

        Example:
            averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
            controller.follow(averaged)
        """
        theirs = {name: layer.ranks for name, layer in adapters(copy).items()}
        ours = {name: layer.ranks for name, layer in zip(self.units.names, self.units.layers, strict=True)}
        if theirs != ours:
            wrong = next((name for name in ours if theirs.get(name) != ours[name]), next(iter(theirs), ""))
            raise ValueError(
                f"follow: copy must have the model's adapters and ranks ('{wrong}': {ours.get(wrong)}), got "
                f"{theirs.get(wrong)}; copy the model after attach"
            )
        self.copies.append(weakref.ref(copy))

    def detach(self) -> None:
        """Stop following the optimizer."""
        if self.metric is not None:
            self.metric.watch(False)
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @property
    def step_share(self) -> float:
        """Part of the optimizer's step that lora_B takes, see `controllers.steps`."""
        return 1.0

    def start(self) -> RankUpdate | None:
        """Return the change to make before the first step."""
        return None

    def observe(self) -> None:
        """Read gradients: they are accumulated, unscaled, clipped and all-reduced here."""

    def propose(self) -> RankUpdate | None:
        """Return the rank change to make after this optimizer step, if any."""
        self.step += 1
        return None

    def applied(self) -> None:
        """Take note that ranks have just changed; cannot fail."""

    def note(self) -> None:
        """Keep ranks and live parameters where they have changed; cannot fail."""
        live, records = self._noted
        now = self.units.live()
        if live is None or records != len(self.records) or not (live is now or np.array_equal(live, now)):
            self.history = self._history_now()
        self._noted = now, len(self.records)

    def _history_now(self) -> RankHistory:
        """Return the history with the present ranks."""
        units = [rank for ranks in self.ranks().values() for rank in ranks]
        return self.history.add(self.step, sum(layer.live_parameters for layer in self.units.layers), units)

    def settle(self) -> None:
        """Write into the model what was decided besides ranks, after every step and before they change; cannot fail."""

    def parts(self) -> list[object]:
        """Return the objects that hold a state of this one."""
        return [self]

    def remember(self) -> Callable[[], None]:
        """Return what brings this controller back to where it is now."""
        then = [(part, dict(vars(part))) for part in self.parts()]
        records = len(self.records)

        def back() -> None:
            for part, values in then:
                vars(part).update(values)
            del self.records[records:]

        return back

    def carry_out(self, decide: Callable[[], RankUpdate | None]) -> None:
        """Take a decision and make its change; whatever is raised before that, nothing has changed."""
        with undone_by(self.remember()) as keep:
            update = decide()
            if self.apply is not None:
                self.apply(update, keep)
                return
            with unbroken():
                self.settle()
                self.note()
                keep()

    def finalize(self) -> None:
        """Make ranks final now, for runs whose length was not known."""

    def ranks(self) -> dict[str, list[int]]:
        """Return the rank of each unit by module name."""
        return self.units.by_module(self.units.live())

    def parameters(self) -> int:
        """Return the adapter parameters at `ranks()`, counted as `parameters_report` counts them."""
        ranks = self.ranks()
        return sum(layer.parameters_at(ranks[n]) for n, layer in zip(self.units.names, self.units.layers, strict=True))

    def summary(self) -> dict[str, Any]:
        """Return the present state in a few JSON-able numbers, for logs."""
        mean_rank = float(np.mean(self.units.live()))
        return {"step": self.step, "phase": "fixed", "mean_rank": mean_rank, "parameters": self.parameters()}

    def rank_history(self) -> list[dict[str, Any]]:
        """Return `step`, `params` (live) and `ranks` by module where they changed, at most 400 times, and now."""
        return [
            {"step": step, "params": count, "ranks": self.units.by_module(np.array(ranks, dtype=np.int64))}
            for step, count, ranks in self._history_now().entries
        ]

    def metrics(self, **facts: Any) -> dict[str, Any]:
        """Return what metrics.json of this run holds, `facts` included; see `report`."""
        check_facts(facts)
        model = self._model()
        if model is None:
            raise ValueError("report: the model must be there, got one that was deleted")
        return {**run_metrics(self, model, self.history.peak), **facts}

    def report(self, folder: str | Path, **facts: Any) -> Path:
        """Write metrics.json, records.jsonl and report.html of this run, as `finetune` does: at its end or at any time.

        `python -m ardlora_ext report FOLDER` draws the page again, that of several folders a comparison. Without
        matplotlib and jinja2 (the `train` extra) there is no page, but what it is drawn from. Of several processes, the
        first one calls this.

        Args:
            folder: made if missing; other files in it stay.
            facts: what only the caller knows, all of it optional. `history`: dicts of `step` and `loss` (and `lr`);
                `evals`: dicts of `step` and `metric`; `metric_name`, `metric_before`, `metric_after`, `loss_before`,
                `loss_after`, `data`, `task`, `epochs`, `batch_size`, `train_examples`, `test_examples`, `seconds`,
                `step_ms_median`, `tokens_per_s`, `command`, `settings` (a dict), `model`.

        Returns:
            The page, or metrics.json where there is none.

        Raises:
            ValueError: a fact of another name.
            OSError: the folder cannot be written; the files of before are still there (the message tells).

        Example:
            losses = [{"step": step, "loss": loss} for step, loss in enumerate(seen, start=1)]
            controller.report("run", history=losses, data="reviews")
        """
        metrics = self.metrics(**facts)
        files: Mapping[str, bytes] = run_files(metrics, self.records)
        try:
            from ardlora_ext.report.page import render
        except ImportError:
            write_set(Path(folder), files)
            return Path(folder, METRICS_FILE)
        write_set(Path(folder), {REPORT_FILE: render(metrics, self.records).encode(), **files})
        return Path(folder, REPORT_FILE)

    def show(self) -> RankView:
        """Return the ranks of now to look at: a heat map where it is the last line of a notebook's cell, else a table.

        Example:
            print(controller.show())
        """
        now, ranks = self.summary(), self.ranks()
        title = f"step {self.step}, {now['phase']}: mean rank {now['mean_rank']:.2f}, {now['parameters']:,} parameters"
        return RankView(title, ranks)

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists: everything a resumed run needs to take the same decisions."""
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "records": [_plain(record) for record in self.records],
            "history": self.history.to_json(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state from `state_dict`."""
        history = state.get("history")  # older states have none
        self.history = RankHistory() if history is None else RankHistory.from_json(history, len(self.units))
        self._noted = None if history is None else self.units.live(), len(state["records"])
        self._is_given()
        self.step = int(state["step"])
        self.total_steps = self.total_steps if state["total_steps"] is None else state["total_steps"]
        self.records = list(state["records"])

    def begin_anew(self) -> None:
        """Begin the schedule at step 0 from the ranks that units have."""
        self._is_given()

    def _is_given(self) -> None:
        self.given = True
        for layer in self.units.layers:
            layer.loaded = False

    def extend(self, total_steps: int) -> None:
        """Let the run have another length; what was decided for the old one stays where the new one allows it."""
        self.total_steps = total_steps

    def resume(self, state: dict[str, Any]) -> None:
        """Take over a state while attached; the model has the ranks of that time already."""

        def decide() -> RankUpdate | None:
            self.load_state_dict(state)
            return self.start()

        self.carry_out(decide)


class FixedController(Controller[LoraConfig]):
    """Plain LoRA: ranks never change."""
