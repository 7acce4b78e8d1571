"""`RunRecord`: the progress bar of a run, and what the run leaves behind for its report."""

from __future__ import annotations

import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers.trainer_callback import ExportableState, TrainerCallback

from ardlora_ext.model.record import injection
from ardlora_ext.train.settings import METRICS, Task, metric_of

Json = dict[str, Any]
_logger = logging.getLogger(__name__)
_KEPT = ("before", "command", "evals", "step_ms", "seconds")


class DivergenceError(RuntimeError):
    """The loss is no longer a number."""


class RunRecord(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Show how a run goes and keep what happened; it travels in Trainer's checkpoints.

    Attributes:
        command: What was asked for.
        measure: What gives loss, metric and answers before training. Called when Trainer has prepared the model: one
            that is evaluated earlier is not wrapped in DistributedDataParallel any more, and processes train apart.
        before: What it gave.
        evals: Evaluations during training.
        step_ms: Mean time of a step between two logs.
        seconds: Time in training steps, without evaluations.
    """

    def __init__(self, name: str, task: Task, command: str) -> None:
        self.name, self.task, self.command = name, task, command
        self.measure: Callable[[], tuple[float, float, list[str]]] | None = None
        self.before: list[Any] | None = None
        self.evals: list[Json] = []
        self.step_ms: list[float] = []
        self.seconds = 0.0
        self.steps = 0  # taken by this process
        self._training = False
        self._bar: Any = None
        self._begun = 0.0
        self._window: list[float] = []
        self._loss: float | None = None  # until the first log

    def state(self) -> Json:
        """Return what Trainer keeps in trainer_state.json."""
        return {"args": {}, "attributes": {name: getattr(self, name) for name in _KEPT}}

    def restore(self, state: Any) -> None:
        """Go on where a checkpoint was, from what `state` kept there."""
        kept = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and isinstance(kept, dict):
            now = self.command
            for name in _KEPT:
                setattr(self, name, kept["attributes"][name])
            if self.command != now:
                _logger.warning("the run that is resumed was started as: %s", self.command)
                self.command = now

    # Events, in Trainer's order.

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Draw the bar."""
        self.restore(state)
        if self.measure is not None:
            self.before = list(self.measure())
        self._training = True
        if state.is_world_process_zero:
            watched = sys.stderr.isatty() or "ipykernel" in sys.modules
            interval = 0.1 if watched else 15.0  # a log file gets a line now and then, a person a moving bar
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.name,
                unit="step",
                mininterval=interval,
                dynamic_ncols=True,
                leave=None,  # but where it is one of many
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Count the step; a step that is saved is logged too, so that no checkpoint holds a loss nobody looked at."""
        self._window.append(time.perf_counter() - self._begun)
        self.seconds += self._window[-1]
        self.steps += 1
        control.should_log |= control.should_save
        if self._bar is not None:
            self._bar.set_postfix(self._postfix(state, model), refresh=False)
            self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Json, **kwargs: Any) -> None:
        """Look at the loss."""
        if "loss" not in logs:
            return
        self._loss = loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise DivergenceError(f"finetune: the loss became {loss} at step {state.global_step}; try a smaller --lr")
        if self._window:
            self.step_ms.append(1e3 * statistics.fmean(self._window))
            self._window = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Json, **kwargs: Any) -> None:
        """Keep an evaluation."""
        if self._training:
            loss, metric = metric_of(self.task, metrics)
            self.evals.append({"step": state.global_step, "loss": loss, "metric": metric})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Leave the terminal to others."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._training = None, False

    def _postfix(self, state: Any, model: nn.Module) -> dict[str, str]:
        controller = injection(model).controller
        assert controller is not None
        _, parameters, ranks = controller.history.entries[-1]
        shown = {
            "loss": "" if self._loss is None else f"{self._loss:.3f}",
            METRICS[self.task]: f"{self.evals[-1]['metric']:.3f}" if self.evals else "",
            "rank": f"{statistics.fmean(ranks):.2f}",
            "params": f"{parameters:,}",
            "tok/s": f"{state.num_input_tokens_seen / self.seconds:,.0f}",
        }
        return {name: text for name, text in shown.items() if text}
