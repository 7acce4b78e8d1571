"""What a fine-tuning run is asked to do, checked before anything is loaded."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ardlora_ext.config import AdapterConfig
from ardlora_ext.config.registry import Method, config_for
from ardlora_ext.errors import InputError
from ardlora_ext.native.dispatch import best_device


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is asked to do; the defaults are the command line's.

    Attributes:
        out: Folder for the adapter, the records and the report.
        method: "ard", "elalora" and "adalora" learn the ranks, "lora" and "dora" keep them at `r`.
        model: Local folder of a transformers model; None for all-MiniLM-L6-v2.
        data: The user's file, see `load_corpus`; None for the TREC questions.
        task: "classification", "lm", or "auto" by the columns of `data`.
        r: Rank of every unit at the start (adalora: at the end, it starts at 1.5 times that).
        lora_dropout: Dropout of the adapters' input.
        budget: Most live adapter parameters at the end; None for what plain LoRA with `r` has.
        granularity: What has a rank of its own: "head", "matrix" or "layer"; None for the method's default.
        factoring: Of heads: "shared" or "independent", see `AdapterConfig`; None for the method's default.
        target_modules: Suffixes of the modules to adapt, as in PEFT, or ("all-linear",).
        lr: Peak learning rate of the adapters.
        head_lr: Peak learning rate of the classification head and pooler.
        batch_size: Examples, or blocks of text, in a step.
        epochs: Passes over the training examples.
        max_steps: Steps to take instead of `epochs`.
        max_length: Tokens at which a text is cut, or of a block of text.
        seed: Of everything random but the split.
        threads: CPU threads; None leaves torch's choice.
        device: Where to train; None for the first CUDA device where torch and this build can use one, else the CPU.
    """

    out: Path
    method: Method = "ard"
    model: Path | None = None
    data: Path | None = None
    task: Literal["auto", "classification", "lm"] = "auto"
    r: int = 8
    lora_dropout: float = 0.0
    budget: int | None = None
    granularity: Literal["head", "matrix", "layer"] | None = None
    factoring: Literal["shared", "independent"] | None = None
    target_modules: tuple[str, ...] = ("all-linear",)
    lr: float = 1e-3
    head_lr: float = 1e-2
    batch_size: int = 16
    epochs: int = 3
    max_steps: int | None = None
    max_length: int = 128
    seed: int = 0
    threads: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.data is None:
            raise InputError("finetune: --model must come with --data, got no --data")
        for name in ("batch_size", "epochs", "max_steps", "threads", "lr", "head_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"finetune: --{name.replace('_', '-')} must be positive, got {value}")
        if self.max_length < 2:
            raise InputError(f"finetune: --max-length must be at least 2, got {self.max_length}")
        if self.device is not None and not _usable(self.device):
            raise InputError(
                f"finetune: --device must be cpu or a GPU that torch and this build can use, got '{self.device}'"
            )
        try:
            self.adapter_config()
        except ValueError as error:
            raise InputError(f"finetune: {error}") from error

    def adapter_config(self, heads: tuple[str, ...] = (), steps: int | None = None) -> AdapterConfig:
        """Return the method's config for a model with these heads and a run of so many optimizer steps.

        Raises:
            ValueError: the method lacks an option that was given, or a value is out of range.
        """
        options: dict[str, Any] = {
            "target_modules": "all-linear" if self.target_modules == ("all-linear",) else self.target_modules,
            "modules_to_save": heads,
            "lora_dropout": self.lora_dropout,
            "granularity": self.granularity,
            "factoring": self.factoring,
            "budget": self.budget,
            "total_steps": None if self.method in ("lora", "dora") else steps,
        }
        return config_for(self.method, self.r, options)

    def command(self) -> str:
        """Return the command line that repeats the run (options at their default are left out)."""
        words = ["python", "-m", "ardlora_ext", "finetune"]
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value != entry.default:
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{entry.name.replace('_', '-')}", *map(str, values)]
        return shlex.join(words)


def _usable(name: str) -> bool:
    try:
        device = torch.device(name)
    except RuntimeError:
        return False
    return device.type in {"cpu", best_device().type} and (device.index or 0) < max(torch.cuda.device_count(), 1)
