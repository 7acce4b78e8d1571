"""What a fine-tuning run is asked to do, checked before anything is loaded; the columns and scores of its tasks."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ardlora_ext import processes
from ardlora_ext.config import AdapterConfig
from ardlora_ext.config.registry import Method, config_for
from ardlora_ext.errors import InputError
from ardlora_ext.native.dispatch import best_device
from ardlora_ext.subcommands import FACTORING, GRANULARITY, RANK

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


def option(default: Any, help: str, *names: str, **keywords: Any) -> Any:
    """Return a field that is an option of the command line as well, see `subcommands.add_options`."""
    return field(default=default, metadata={"help": help, "names": names, **keywords})


def _parameters(text: str) -> int | str:
    if text != "auto" and not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number or auto, got {text!r}")
    return text if text == "auto" else int(text)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model."""

    model: str | None = option(
        None,
        "folder of a model, or its id on the hub (default: all-MiniLM-L6-v2; of text and chats SmolLM2-135M-Instruct)",
        metavar="DIR|ID",
    )
    dtype: Literal["float32", "bf16", "fp16"] = option(
        "float32", "of the frozen weights; below float32 the products are computed in it, too"
    )
    load_in_4bit: bool = option(False, "quantise the frozen weights to NF4 (bitsandbytes)")
    load_in_8bit: bool = option(False, "quantise them to int8 (bitsandbytes)")
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass, keep few")
    attn: str | None = option(None, "attention: sdpa, eager, flash_attention_2 (default: the model's)", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data."""

    data: str | None = option(
        None,
        ".csv, .tsv, .json, .jsonl, .parquet or .txt file, a folder of such, or a data set on the hub "
        "(default: the TREC questions, as chats for --task sft)",
        metavar="FILE|DIR|ID",
    )
    task: Task | Literal["auto"] = option("auto", "what to learn; auto: by the columns, see below")
    columns: tuple[str, ...] = option((), "names of columns: text=sentence label=kind", metavar="OURS=YOURS")
    split: str = option("train", "split of a folder or a data set on the hub", metavar="NAME")
    eval_data: str | None = option(
        None, "data to test on (default: --eval-split, or a share of --data)", metavar="FILE|DIR|ID"
    )
    eval_split: str | None = option(None, "split to test on", metavar="NAME")
    eval_share: float = option(0.1, "share of --data to test on, at most 2 000 rows", metavar="X")
    max_length: int | None = option(
        None,
        "length of a text or block at most (default: 128, of a chat 1024, or what the model can read)",
        metavar="TOKENS",
    )
    packing: bool = option(False, "several short chats in one sequence")
    answers_only: bool = option(
        False, "of chats, learn what the assistant says alone; of prompt and completion that is always so"
    )


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Adapters and ranks."""

    method: Method = option("ard", "what decides the ranks; lora and dora keep them at --r")
    mode: Literal["anneal", "paper", "code"] | None = option(
        None, "ard: anneal (fat start, thin end; the default) or paper; elalora: paper or code"
    )
    r: int = option(8, RANK, metavar="RANK")
    budget: int | Literal["auto"] | None = option(
        None,
        "adapter parameters at the end (default: as plain LoRA with --r has; auto: as few as cost little)",
        metavar="PARAMETERS|auto",
        type=_parameters,
        choices=None,
    )
    tolerance: float | None = option(
        None, "with --budget auto: share of the gain that halving the parameters may cost (default: 0.02)", metavar="X"
    )
    serve_rank: int | None = option(
        None, "ard: largest rank of a module at the end, so that a server need not hold more", metavar="RANK"
    )
    granularity: Literal["head", "matrix", "layer"] | None = option(None, GRANULARITY)
    factoring: Literal["shared", "independent"] | None = option(None, FACTORING)
    target_modules: tuple[str, ...] = option(
        ("all-linear",), "suffixes of the modules to adapt (default: all-linear)", metavar="NAME"
    )
    lora_dropout: float = option(0.0, "share of the adapters' input that is dropped", metavar="P")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Training."""

    epochs: int = option(3, "passes over the training examples", "--num-train-epochs", metavar="N")
    max_steps: int | None = option(None, "optimizer steps to take, instead of --epochs", metavar="N")
    batch_size: int = option(16, "examples that a process takes at once", "--per-device-train-batch-size", metavar="N")
    gradient_accumulation_steps: int = option(1, "batches in an optimizer step", metavar="N")
    lr: float = option(1e-3, "peak learning rate of the adapters", "--learning-rate", metavar="X")
    head_lr: float = option(1e-2, "peak learning rate of a new head, and of the pooler below it", metavar="X")
    seed: int = option(0, "of all that is random but the data split", metavar="N")
    training_arg: tuple[str, ...] = option(
        (),
        "any other of transformers' TrainingArguments (TRL's SFTConfig for chats): weight_decay=0.1",
        metavar="NAME=VALUE",
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Evaluations, checkpoints and where it runs."""

    eval_steps: int | None = option(None, "steps between evaluations (default: a fifth of all)", metavar="N")
    early_stopping: int | None = option(
        None, "stop after N evaluations without progress, with the best weights (default: never)", metavar="N"
    )
    save_steps: int | None = option(
        None, "steps between checkpoints (default: a fifth of all; deleted when the run has ended)", metavar="N"
    )
    resume: str | None = option(
        None,
        "go on from the last whole checkpoint in --out, if there is one, or from DIR",
        metavar="auto|DIR",
        nargs="?",
        const="auto",
    )
    overwrite: bool = option(False, "delete the checkpoints of an earlier run in --out, and begin anew")
    report_to: tuple[str, ...] = option((), "trackers: tensorboard, wandb, ... (default: none)", metavar="NAME")
    fsdp: bool = option(
        False, "shard the frozen weights over the processes (FSDP2); what trains is whole on each of them"
    )
    device: str | None = option(
        None, "cpu, cuda or cuda:1 (default: a GPU where torch and this build can use one)", metavar="NAME"
    )
    threads: int | None = option(None, "CPU threads (default: torch's choice)", metavar="N")


GROUPS = (ModelOptions, DataOptions, RankOptions, TrainingOptions, RunOptions)


@dataclass(frozen=True, kw_only=True)
class Settings(RunOptions, TrainingOptions, RankOptions, DataOptions, ModelOptions):
    """What a run is asked to do: every field is an option of the command line, with its help and its default.

    Attributes:
        out: Folder for the adapter, the records and the report.
    """

    out: Path

    def __post_init__(self) -> None:
        if self.model is not None and self.data is None and self.task != "sft":
            raise InputError("finetune: --model must come with --data, got no --data")
        if self.data is None and self.task not in ("auto", "classification", "sft"):
            raise InputError(f"finetune: --task {self.task} must come with --data, got no --data")
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
        if self.fsdp and (processes.size() == 1 or self.load_in_4bit or self.load_in_8bit):
            without = "--load-in-4bit or --load-in-8bit" if processes.size() > 1 else "one process alone: use torchrun"
            raise InputError(f"finetune: --fsdp must have several processes and float weights, got {without}")
        for name in ("packing", "answers_only"):
            if getattr(self, name) and self.task not in ("sft", "auto"):
                raise InputError(f"finetune: --{name.replace('_', '-')} must come with --task sft, got {self.task}")
        if self.device is not None and not _usable(self.device):
            raise InputError(
                f"finetune: --device must be cpu or a GPU that torch and this build can use, got '{self.device}'"
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"finetune: --seed must be in [0, 2**32), got {self.seed}")
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
        named = [theirs for _, theirs in pairs]
        if len(set(named)) < len(named):
            raise InputError(f"finetune: --columns must name different columns, got {' '.join(self.columns)}")
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
            "tolerance": self.tolerance,
            "serve_rank": self.serve_rank,
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
