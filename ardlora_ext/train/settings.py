"""What a fine-tuning run is asked to do, checked before anything is loaded; the columns and scores of its tasks."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ardlora_ext.config import AdapterConfig
from ardlora_ext.config.registry import Method, config_for
from ardlora_ext.errors import InputError
from ardlora_ext.native.dispatch import best_device

Task = Literal["classification", "regression", "token-classification", "lm", "sft"]
TASKS: tuple[Task, ...] = get_args(Task)

COLUMNS: dict[Task, tuple[tuple[str, ...], ...]] = {  # the first of several sets that is there
    "classification": (("text", "label"),),
    "regression": (("text", "label"),),
    "token-classification": (("tokens", "tags"),),
    "lm": (("text",),),
    "sft": (("messages",), ("prompt", "completion"), ("text",)),
}
OPTIONAL = ("text_pair",)
NAMES = tuple(dict.fromkeys(name for sets in COLUMNS.values() for names in sets for name in names)) + OPTIONAL

METRICS: dict[Task, str] = {
    "classification": "accuracy",
    "regression": "correlation",
    "token-classification": "accuracy",
    "lm": "perplexity",
    "sft": "perplexity",
}

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OF_THIS_START = ("resume", "overwrite")  # they begin a run, and do not change it


def metric_of(task: Task, metrics: Mapping[str, float]) -> tuple[float, float]:
    """Return loss and metric of an evaluation by Trainer."""
    loss, name = metrics["eval_loss"], METRICS[task]
    return loss, math.exp(min(loss, 700.0)) if name == "perplexity" else metrics[f"eval_{name}"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is asked to do; the defaults are the command line's.

    Attributes:
        out: Folder for the adapter, the records and the report.
        method: "ard", "elalora" and "adalora" learn the ranks, "lora" and "dora" keep them at `r`.
        model: Local folder of a transformers model, or its id on the hub; None for all-MiniLM-L6-v2.
        data: The user's file, folder or id, see `load_corpus`; None for the TREC questions.
        task: What is learned, or "auto" by the columns of `data`.
        split: Split of a folder or a data set of the hub.
        columns: The data's own names of columns, as in ("text=sentence", "label=kind").
        eval_data: Data to test on; None for `eval_split`, or a share of `data`.
        eval_split: Split to test on.
        eval_share: Share of `data` that is held out to test on.
        max_length: Tokens at which a text is cut, or of a block of text; None for 128, or what the model can read.
        packing: Several short chats in one sequence (sft).
        answers_only: The loss counts what the assistant says alone (sft); of `prompt` and `completion` it always does.
        dtype: Of the frozen weights; below float32 the products are computed in it, too.
        load_in_4bit: Quantise the frozen weights to NF4 (bitsandbytes).
        load_in_8bit: Quantise them to int8 (bitsandbytes).
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        attn: Implementation of attention, as in `from_pretrained`.
        r: Rank of every unit at the start (adalora: at the end, it starts at 1.5 times that).
        lora_dropout: Dropout of the adapters' input.
        budget: Most live adapter parameters at the end; None for what plain LoRA with `r` has.
        mode: Of the method: "anneal" or "paper" (ard), "paper" or "code" (elalora); None for the method's default.
        granularity: What has a rank of its own: "head", "matrix" or "layer"; None for the method's default.
        factoring: Of heads: "shared" or "independent", see `AdapterConfig`; None for the method's default.
        target_modules: Suffixes of the modules to adapt, as in PEFT, or ("all-linear",).
        lr: Peak learning rate of the adapters.
        head_lr: Peak learning rate of the classification head and pooler.
        batch_size: Examples, or blocks of text, that a process takes at once.
        gradient_accumulation_steps: Batches in an optimizer step.
        epochs: Passes over the training examples.
        max_steps: Steps to take instead of `epochs`.
        eval_steps: Steps between evaluations; None for a fifth of the run.
        early_stopping: Evaluations without progress after which training ends, with the best weights; None for never.
        save_steps: Steps between checkpoints, which are then kept; None for a fifth of the run, deleted at its end.
        resume: "auto" goes on from the last whole checkpoint in `out` if there is one, a folder from that checkpoint.
        overwrite: Delete the checkpoints of an earlier run in `out`, and begin anew.
        report_to: Trackers, as in TrainingArguments.
        training_arg: Any other of TrainingArguments (of TRL's SFTConfig for sft), as in ("weight_decay=0.1",).
        seed: Of everything random but the split.
        threads: CPU threads; None leaves torch's choice.
        device: Where to train; None for the first CUDA device where torch and this build can use one, else the CPU.
    """

    out: Path
    method: Method = "ard"
    model: str | None = None
    data: str | None = None
    task: Task | Literal["auto"] = "auto"
    split: str = "train"
    columns: tuple[str, ...] = ()
    eval_data: str | None = None
    eval_split: str | None = None
    eval_share: float = 0.1
    max_length: int | None = None
    packing: bool = False
    answers_only: bool = False
    dtype: str = "float32"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    gradient_checkpointing: bool = False
    attn: str | None = None
    r: int = 8
    lora_dropout: float = 0.0
    budget: int | None = None
    mode: Literal["anneal", "paper", "code"] | None = None
    granularity: Literal["head", "matrix", "layer"] | None = None
    factoring: Literal["shared", "independent"] | None = None
    target_modules: tuple[str, ...] = ("all-linear",)
    lr: float = 1e-3
    head_lr: float = 1e-2
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    epochs: int = 3
    max_steps: int | None = None
    eval_steps: int | None = None
    early_stopping: int | None = None
    save_steps: int | None = None
    resume: str | None = None
    overwrite: bool = False
    report_to: tuple[str, ...] = ()
    training_arg: tuple[str, ...] = ()
    seed: int = 0
    threads: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.data is None and self.task != "sft":
            raise InputError("finetune: --model must come with --data, got no --data")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"finetune: --{name.replace('_', '-')} must be positive, got {value}")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"finetune: --max-length must be at least 2, got {self.max_length}")
        if not 0 < self.eval_share < 1:
            raise InputError(f"finetune: --eval-share must be between 0 and 1, got {self.eval_share}")
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("finetune: --load-in-4bit must not come with --load-in-8bit, got both")
        for name in ("packing", "answers_only"):
            if getattr(self, name) and self.task not in ("sft", "auto"):
                raise InputError(f"finetune: --{name.replace('_', '-')} must come with --task sft, got {self.task}")
        if self.device is not None and not _usable(self.device):
            raise InputError(
                f"finetune: --device must be cpu or a GPU that torch and this build can use, got '{self.device}'"
            )
        self.column_names()
        try:
            self.adapter_config()
        except ValueError as error:
            raise InputError(f"finetune: {error}") from error

    def column_names(self) -> dict[str, str]:
        """Return the data's own names of columns by ours."""
        pairs = [entry.partition("=")[::2] for entry in self.columns]
        for ours, theirs in pairs:
            if ours not in NAMES or not theirs:
                raise InputError(
                    f"finetune: --columns must be {'|'.join(NAMES)}=NAME, got {ours}{'=' * bool(theirs)}{theirs}"
                )
        return dict(pairs)

    def adapter_config(self, heads: tuple[str, ...] = ()) -> AdapterConfig:
        """Return the method's config for a model with these heads; the number of steps is Trainer's.

        Raises:
            ValueError: the method lacks an option that was given, or a value is out of range.
        """
        options: dict[str, Any] = {
            "target_modules": "all-linear" if self.target_modules == ("all-linear",) else self.target_modules,
            "modules_to_save": heads,
            "lora_dropout": self.lora_dropout,
            "mode": self.mode,
            "granularity": self.granularity,
            "factoring": self.factoring,
            "budget": self.budget,
        }
        return config_for(self.method, self.r, options)

    def command(self) -> str:
        """Return the command line that repeats the run (options at their default are left out)."""
        words = ["python", "-m", "ardlora_ext", "finetune"]
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value != entry.default and entry.name not in _OF_THIS_START:
                values = () if value is True else value if isinstance(value, tuple) else (value,)
                words += [f"--{entry.name.replace('_', '-')}", *map(str, values)]
        return shlex.join(words)


_POSITIVE = (
    *("batch_size", "gradient_accumulation_steps", "epochs", "max_steps", "eval_steps", "early_stopping", "save_steps"),
    *("threads", "lr", "head_lr"),
)


def _usable(name: str) -> bool:
    try:
        device = torch.device(name)
    except RuntimeError:
        return False
    return device.type in {"cpu", best_device().type} and (device.index or 0) < max(torch.cuda.device_count(), 1)
