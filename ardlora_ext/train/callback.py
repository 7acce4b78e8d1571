"""`RankCallback`: dynamic ranks in transformers' Trainer (and what derives from it) by one argument.

It only calls the package at the right events: `wrap` when Trainer is made, `attach` once the optimizer exists. What the
controller knows travels in Trainer's own trainer_state.json, ranks in the model's state_dict. What Trainer saves is the
adapter: a PEFT checkpoint, and as `model.safetensors` what training changes; the frozen base is in neither.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ardlora_ext.checkpoint.save_pretrained import save_pretrained
from ardlora_ext.checkpoint.wrap import wrap
from ardlora_ext.config import AdapterConfig
from ardlora_ext.file_set import write_set
from ardlora_ext.model.peft.convert import PeftLoraConfig, check_config
from ardlora_ext.model.peft.guard import guard_from_peft
from ardlora_ext.model.record import Injection, adapters, home, injection
from ardlora_ext.ranks.attach import attach
from ardlora_ext.ranks.controllers.base import Controller
from ardlora_ext.ranks.optimizer import restart, unwrapped
from ardlora_ext.report.run_files import run_files
from ardlora_ext.train import trainer_hooks as hooks

_SETTINGS = (  # of TrainingArguments, for a report
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "bf16", "fp16"),
)
PHASES = ("warmup", "adapt", "harden", "frozen")  # logged by number, because trackers draw numbers


class RankCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Let ranks follow the gradients: `Trainer(model, ..., callbacks=[ard.RankCallback(ard.ArdConfig(r0=8))])`.

    Trainer's log gets `mean_rank`, `rank_min`, `rank_max`, `adapter_parameters`, `rank_phase` (0 warmup, 1 adapt, 2
    harden, 3 frozen) and, for ARD, `rank_alpha` (mean of alpha), `rank_price` (lambda) and `rank_budget`;
    `records.jsonl` in the output folder every decision with its reason, and `metrics.json` beside it what
    `python -m ardlora_ext report` draws the run from, while it goes on and when it has ended. Checkpoints, and what
    `trainer.save_model` writes, are as large as the adapter and load with PEFT; `resume_from_checkpoint` continues
    ranks and decisions.

    Args:
        config: wraps Trainer's model when Trainer is made, and each that `model_init` makes, unless it is wrapped
            already. None: it must be.
        holdout: as for `attach`.
        report: whether to write those two files.

    Attributes:
        controller: what `attach` returned, from the beginning of training on.
    """

    def __init__(
        self,
        config: AdapterConfig | PeftLoraConfig | None = None,
        holdout: Callable[[], torch.Tensor] | None = None,
        *,
        report: bool = True,
    ) -> None:
        self.config, self.holdout, self.report = config, holdout, report
        self.controller: Controller[Any] | None = None
        self.restored: dict[str, Any] | None = None  # set by Trainer when it restores callbacks itself
        self._training = False
        self._first_step = (0, 0)  # of the controller and of Trainer, when this training began
        self._written = -1  # records
        self._reference_is_theirs = False  # whether Trainer was given the reference of preference training
        guard_from_peft()  # TRL's trainers have imported PEFT by now
        if config is not None:
            check_config("RankCallback", config)
            hooks.before_quantisation_check(_wrap_for)

    def state(self) -> dict[str, Any]:
        """Return what Trainer keeps of this callback in trainer_state.json."""
        running = self.controller if self._training else None
        return {"args": {}, "attributes": {"restored": None if running is None else running.state_dict()}}

    # Events, in Trainer's order.

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Wrap the model if that is left to us, before Trainer makes the optimizer."""
        self.wrap(model)
        trainer = hooks.running_trainer()
        self._reference_is_theirs = hooks.users_reference()
        if trainer is not None:
            hooks.before_each_training(trainer, self._begin_anew)
        if trainer is None or not adapters(model):
            return
        if not self._reference_is_theirs:
            hooks.check_precomputed_reference(trainer, model)
        if home(model) is not model:
            hooks.load_parts_on_resume(trainer)

    def _begin_anew(self, model: nn.Module) -> None:
        """Take note of another model: what is known belongs to the last one, also where its training was stopped."""
        self.controller, self.restored, self._training = None, None, False
        self.wrap(model)

    def wrap(self, model: nn.Module) -> None:
        """Wrap the model if that is left to us and not done."""
        if self.config is not None and not adapters(model):
            wrap(model, self.config)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Attach, or go on where the checkpoint was."""
        if self.config is not None and not adapters(model):
            raise ValueError(
                "RankCallback: with a config it must be in Trainer(callbacks=[...]), because the optimizer holds the "
                "base by now; or call ardlora_ext.wrap(model, config) before Trainer"
            )
        injection(model)
        trainer = hooks.running_trainer()
        if trainer is not None:
            hooks.check_fused_head(trainer, model)
        kept = state.stateful_callbacks.get(type(self).__name__)
        saved = self.restored or (kept["attributes"]["restored"] if isinstance(kept, dict) else None)
        self.restored = None
        if saved is not None:
            _restore(model, saved)
        self.controller, self._training, self._written = None, True, -1
        self._attach(state, model, kwargs.get("optimizer"))
        hooks.precede_reporters(self)
        if trainer is not None and not self._reference_is_theirs:
            hooks.complete_reference(trainer, model)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Attach now if the optimizer was not there when training began."""
        self._attach(state, model, kwargs.get("optimizer"))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add ranks to a training log, for the history and for every tracker."""
        if self.controller is None or logs is None or "loss" not in logs:
            return
        facts = rank_facts(self.controller)
        logs.update(facts)
        if state.log_history:
            state.log_history[-1].update(facts)
        self._write_report(args, state)

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Put the adapter beside what Trainer has just saved of a model that cannot save itself."""
        self._write_report(args, state)
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if isinstance(model, PreTrainedModel) or not state.is_world_process_zero or not folder.is_dir():
            return
        save_pretrained(model, folder)
        if home(model) is not model:
            hooks.save_parts(model, folder)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Write the last records; say so if ranks could not follow."""
        self._training = False
        if self.controller is None:
            warnings.warn(
                "RankCallback: training ended and nothing was attached, because Trainer showed no optimizer; ranks did "
                "not change. Call ardlora_ext.attach(model, optimizer) where the optimizer is made",
                stacklevel=2,
            )
            return
        step, global_step = self._first_step
        if self.controller.step == step and state.global_step > global_step:
            warnings.warn(
                f"RankCallback: training ended after {state.global_step - global_step} steps and the attached "
                "optimizer took none of them; ranks did not change. Is it another one than Trainer's?",
                stacklevel=2,
            )
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._follow_best(Path(state.best_model_checkpoint), model, kwargs.get("optimizer"))
        self._written = -1
        self._write_report(args, state)

    # Pieces.

    def _attach(self, state: Any, model: nn.Module, optimizer: Any) -> None:
        if self.controller is not None:
            return
        record = injection(model)
        if record.controller is not None and optimizer is not None and not _follows(record, unwrapped(optimizer)):
            record.controller.detach()  # of an earlier training
        if optimizer is not None and (record.controller is None or not record.controller.handles):
            attach(model, optimizer, total_steps=state.max_steps, holdout=self.holdout)
        if record.controller is not None:
            self.controller = record.controller
            self._first_step = record.controller.step, state.global_step

    def _follow_best(self, folder: Path, model: nn.Module, optimizer: Any) -> None:
        """Trainer has loaded the weights and ranks of an earlier step: bring the controller there, too.

        The optimizer's moments are of later weights and other ranks; should `train` be called again, it starts anew.
        """
        if optimizer is not None:
            restart(unwrapped(optimizer))
        path = folder / "trainer_state.json"
        if path.is_file():
            callbacks = json.loads(path.read_text(encoding="utf-8"))["stateful_callbacks"]
            kept = callbacks.get(type(self).__name__)
            if isinstance(kept, dict) and kept["attributes"]["restored"] is not None:
                _restore(model, kept["attributes"]["restored"])

    def _write_report(self, args: Any, state: Any) -> None:
        """Write the files of the report where decisions were added."""
        if self.controller is None or not self.report or not state.is_world_process_zero:
            return
        if len(self.controller.records) != self._written:
            self._written = len(self.controller.records)
            metrics = self.controller.metrics(**trainer_facts(args, state))
            write_set(Path(args.output_dir), run_files(metrics, self.controller.records))


def training_log(state: Any) -> list[dict[str, Any]]:
    """Return Trainer's log of training, under the names of reports."""
    names = {"step": "step", "loss": "loss", "lr": "learning_rate", "mean_rank": "mean_rank"}
    return [
        {**{ours: entry.get(theirs) for ours, theirs in names.items()}, "params_live": entry.get("adapter_parameters")}
        for entry in state.log_history
        if "loss" in entry
    ]


def trainer_facts(args: Any, state: Any) -> dict[str, Any]:
    """Return what Trainer knows of a run, for its report: the metric is the one that chooses the best, or the loss."""
    looks = [entry for entry in state.log_history if "eval_loss" in entry]
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if args.metric_for_best_model is None and any("eval_accuracy" in entry for entry in looks):
        name = "accuracy"
    values = [
        {"step": entry["step"], "loss": entry["eval_loss"], "metric": entry[f"eval_{name}"]}
        for entry in looks
        if f"eval_{name}" in entry
    ]
    first = values[0] if values and values[0]["step"] == 0 else {}
    last = values[-1] if values else {}
    if args.load_best_model_at_end and state.best_global_step:
        last = next((entry for entry in values if entry["step"] == state.best_global_step), last)
    seconds = next((e["train_runtime"] for e in reversed(state.log_history) if "train_runtime" in e), None)
    tokens = state.num_input_tokens_seen
    return {
        "seed": args.seed,
        "epochs": state.epoch,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "settings": {key: str(value) if (value := getattr(args, key)) is not None else None for key in _SETTINGS},
        "metric_name": name if values else None,
        **{f"{key}_before": first.get(key) for key in ("metric", "loss")},
        **{f"{key}_after": last.get(key) for key in ("metric", "loss")},
        "seconds": seconds,
        "tokens_per_s": tokens / seconds if tokens and seconds else None,
        "history": training_log(state),
        "evals": values,
    }


def rank_facts(controller: Controller[Any]) -> dict[str, float]:
    """Return what a log shows about ranks now, numbers only."""
    summary = controller.summary()
    phase = summary["phase"]
    ranks = [r for units in controller.ranks().values() for r in units]
    facts = {
        "mean_rank": summary["mean_rank"],
        "rank_min": min(ranks),
        "rank_max": max(ranks),
        "adapter_parameters": summary["parameters"],
        "rank_phase": PHASES.index(phase) if phase in PHASES else len(PHASES) - 1,
    }
    for key in ("alpha", "price", "budget"):
        if summary.get(key) is not None:
            facts[f"rank_{key}"] = summary[key]
    return facts


def _restore(model: nn.Module, saved: dict[str, Any]) -> None:
    """Bring the controller to a saved state, now or when it is attached; the model has the ranks of that time."""
    record = injection(model)
    record.started = True
    if record.controller is None:
        record.controller_state, record.resumed = saved, True
    else:
        record.controller.resume(saved)


def _follows(record: Injection, optimizer: Optimizer) -> bool:
    """Tell whether the controller follows this optimizer, or one that it has yet to see."""
    return record.optimizer is None or record.optimizer() is optimizer


def _wrap_for(callback: object, model: nn.Module) -> None:
    if isinstance(callback, RankCallback):
        callback.wrap(model)
