"""A small Trainer run in which ranks pass every phase, and the same in a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler

import ardlora_ext as ard

from helpers.models import VOCABULARY, bert, trainable

STEPS = 24
MICRO = 2  # examples in a micro-batch


def config(**options: Any) -> ard.ArdConfig:
    """Every phase in 24 steps: warmup to 2, adapt to 16, harden to 19, then frozen.

    Not packed: under checkpointing layers do not share a sum, whose order is in the last bits.
    """
    fast = {"r0": 2, "update_interval": 2, "lr_alpha": 0.1, "warmup_ratio": 0.1, "freeze_ratio": 0.2}
    return ard.ArdConfig(
        **{"mode": "paper", "granularity": "head", "harden_ratio": 0.13, "packed": False, **fast, **options}
    )


def examples(n: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, VOCABULARY, (n, 8), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def classifier(dropout: float = 0.1, **options: Any) -> nn.Module:
    """A small BERT with adapters. With dropout, an equal trajectory also means equal random numbers."""
    torch.manual_seed(0)
    model = bert()[0]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return ard.wrap(model, config(**options))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    common = {
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": MICRO,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 4,
    }
    return TrainingArguments(output_dir=str(folder), **{**common, **options})


def trainer(folder: Path, model: nn.Module, *callbacks: TrainerCallback, n: int = 40, **options: Any) -> Trainer:
    """A Trainer that says nothing on the terminal."""
    made = Trainer(
        model,
        arguments(folder, **options),
        train_dataset=examples(n),
        callbacks=[ard.RankCallback(), *callbacks],
    )
    made.pop_callback(PrinterCallback)
    return made


def _forever(loader: DataLoader[Any]) -> Iterator[Any]:
    """Epoch after epoch; a new epoch draws from torch's generator, as it does in Trainer."""
    while True:
        yield from loader


def plain_loop(
    model: nn.Module,
    accumulate: int = 1,
    clip: float = 0.0,
    autocast: bool = False,
    schedule: str = "constant",
    n: int = 40,
    holdout: Callable[[], torch.Tensor] | None = None,
) -> nn.Module:
    """What `Trainer` is held against: plain torch, `attach`, the same examples in the same order."""
    batches = _forever(DataLoader(examples(n), batch_size=MICRO))  # type: ignore[arg-type]
    model.train()
    decayed, plain = Trainer.get_decay_parameter_names(None, model), trainable(model)  # type: ignore[arg-type]
    groups: list[dict[str, Any]] = [
        {"params": [p for m, p in model.named_parameters() if p.requires_grad and m in decayed], "weight_decay": 0.01},
        {"params": [p for m, p in model.named_parameters() if p.requires_grad and m not in decayed], "weight_decay": 0},
    ]
    assert sum(len(g["params"]) for g in groups) == len(plain)
    optimizer = AdamW(groups, lr=1e-2, fused=True)
    scheduler = get_scheduler(schedule, optimizer, 5 if schedule != "constant" else 0, STEPS)
    ard.attach(model, optimizer, STEPS, holdout)
    for _ in range(STEPS):
        for _ in range(accumulate):
            inputs = next(batches)
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                loss = model(**inputs).loss
            loss.backward()  # BERT takes, and ignores, the number of items: Trainer adds up micro-batches
        if clip:
            nn.utils.clip_grad_norm_(plain, clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model
