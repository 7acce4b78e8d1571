"""The trainer of a task: transformers' Trainer, or TRL's SFTTrainer for chats; `RankCallback` in both."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ardlora_ext.distributed.fully_shard import fully_shard
from ardlora_ext.errors import InputError, first_line
from ardlora_ext.native.dispatch import best_device
from ardlora_ext.train.encoding import choose, collator, score
from ardlora_ext.train.run_folder import trainer_state
from ardlora_ext.train.settings import METRICS, Settings, Task

_CHECKPOINTING = next(  # the new name, or the old one
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
_PART = 0.2  # of a run, between evaluations and between checkpoints
_LOGS = 450  # at most twice as many entries of the history, however long the run is


def make_trainer(
    settings: Settings,
    task: Task,
    model: nn.Module,
    tokenizer: Any,
    parts: tuple[Dataset, Dataset],
    heads: Sequence[str],
    max_length: int,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Return the trainer of `parts` (training and test rows).

    Raises:
        InputError: what was asked for does not fit together.
    """
    if settings.early_stopping is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(settings.early_stopping)]
    common = {
        "model": model,
        "train_dataset": parts[0],
        "eval_dataset": parts[1],
        "processing_class": tokenizer,
        "callbacks": callbacks,
    }
    try:
        if task == "sft":
            from trl import SFTConfig, SFTTrainer  # the slowest import here

            own = {
                "max_length": max_length,
                "packing": settings.packing,
                "assistant_only_loss": settings.answers_only,
            }
            trainer: Trainer = SFTTrainer(args=_arguments(SFTConfig, settings, task, own), **common)
        else:
            metric = {"compute_metrics": score, "preprocess_logits_for_metrics": choose} if task != "lm" else {}
            trainer = HeadTrainer(
                args=_arguments(TrainingArguments, settings, task, {}),
                data_collator=collator(task, tokenizer),
                heads=heads,
                head_lr=settings.head_lr,
                **metric,
                **common,
            )
    except torch.OutOfMemoryError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:
        raise error if isinstance(error, InputError) else InputError(f"finetune: {first_line(error)}") from error
    if settings.fsdp:
        fully_shard(trainer.model)
        # Without DistributedDataParallel: gradients of what is whole are averaged already.
        trainer.accelerator.prepare_model = partial(trainer.accelerator.prepare_model, evaluation_mode=True)
    trainer.remove_callback(PrinterCallback)
    return trainer


def go_on(trainer: Trainer, checkpoint: Path) -> None:
    """Prepare to resume: nothing is evaluated twice, and early stopping counts from where it was."""
    trainer.args.eval_on_start = False
    kept = trainer_state(checkpoint)["stateful_callbacks"].get(EarlyStoppingCallback.__name__)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback) and isinstance(kept, dict):
            callback.early_stopping_patience_counter = kept["attributes"]["early_stopping_patience_counter"]


class HeadTrainer(Trainer):  # type: ignore[misc]
    """Trainer with a learning rate of its own for the modules that are trained in full."""

    def __init__(self, *args: Any, heads: Sequence[str], head_lr: float, **kwargs: Any) -> None:
        self._heads, self._head_lr = heads, head_lr
        super().__init__(*args, **kwargs)
        if heads:
            # Models for classes take the number of items of a whole step and ignore it: Trainer would then add up what
            # it must average, over micro-batches and over processes.
            self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Move the heads' parameters to groups of their own."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        owners = [module for name, module in self.model.named_modules() if name.rpartition(".")[2] in self._heads]
        own = {id(parameter) for module in owners for parameter in module.parameters()}
        if fresh and own:
            for group in list(optimizer.param_groups):
                heads = [p for p in group["params"] if id(p) in own]
                group["params"] = [p for p in group["params"] if id(p) not in own]
                if heads:
                    options = {name: value for name, value in group.items() if name != "params"}
                    optimizer.add_param_group({**options, "params": heads, "lr": self._head_lr})
        return optimizer


# --- arguments --------------------------------------------------------------------------------------------------------


def _arguments(kind: type[TrainingArguments], settings: Settings, task: Task, own: dict[str, Any]) -> TrainingArguments:
    """Return what Trainer is asked for: the options by their names, then `--training-arg`."""
    device = _place(settings.device)
    values = {
        "output_dir": str(settings.out),
        "seed": settings.seed,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu",
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.06,  # a share of the run
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        _CHECKPOINTING: settings.gradient_checkpointing,
        "logging_steps": 1 / _LOGS,
        "logging_nan_inf_filter": False,  # a loss that is no number ends the run
        "eval_strategy": "steps",
        "eval_steps": settings.eval_steps or _PART,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": settings.save_steps or (settings.eval_steps if settings.early_stopping else None) or _PART,
        "save_total_limit": 2,
        "include_num_input_tokens_seen": "non_padding",
        "report_to": list(settings.report_to) or "none",
        "disable_tqdm": True,  # the bar is ours
        "log_level": "error",
        "bf16": settings.dtype == "bf16",
        "fp16": settings.dtype == "fp16",
        **own,
    }
    if settings.early_stopping is not None:
        by_loss = METRICS[task] == "perplexity"
        values["load_best_model_at_end"] = True
        values["metric_for_best_model"] = "loss" if by_loss else METRICS[task]
        values["greater_is_better"] = not by_loss
    arguments = _read_over(kind, values, settings.training_arg)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for several processes
    return arguments


def _place(device: str | None) -> str:
    """Return "cpu" or "cuda", and let the process see no other GPU than the one that was asked for."""
    name = torch.device(device) if device is not None else best_device()
    if name.index is not None and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[name.index] if seen else str(name.index)
    return name.type


class _Parser(HfArgumentParser):  # type: ignore[misc]
    def error(self, message: str) -> Any:
        raise InputError(f"finetune: --training-arg: {message}")


def _read_over(kind: type[TrainingArguments], values: dict[str, Any], words: Sequence[str]) -> TrainingArguments:
    """Return the arguments of these values, and over them `name=value`, read as Trainer's own command lines do."""
    names = {entry.name for entry in dataclasses.fields(kind) if entry.init} - {"output_dir"}
    parser = _Parser(kind, allow_abbrev=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # so that nothing is found but what is given
    lists = {action.dest for action in parser._actions if action.nargs == "+"}
    line: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if name not in names or not equals:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near and near[0] != name else ""
            raise InputError(f"finetune: --training-arg must be NAME=VALUE of {kind.__name__}, got {word}{hint}")
        line += [f"--{name}", *value.split(",")] if name in lists else [f"--{name}={value}"]
    return kind(**{**values, **vars(parser.parse_args(line))})
