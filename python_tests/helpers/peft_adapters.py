"""Adapters that PEFT trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from helpers.models import ARCHITECTURES, Batch

TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_proj"],
    "vit": ["q_proj", "v_proj", "fc1"],
}


def base(name: str) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model, batch = ARCHITECTURES[name]()
    return model.eval(), batch


def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch).logits
    return found


def trained_by_peft(folder: Path, name: str, **options: Any) -> tuple[torch.Tensor, Batch]:
    """Save an adapter with random factors as PEFT does; return what it computes."""
    model, batch = base(name)
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": TARGETS[name],
        "fan_in_fan_out": name == "gpt2",
        **options,
    }
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(2)
    for key, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) / 4
            parameter.data = parameter.data + noise if "magnitude" in key else noise
    adapted.save_pretrained(folder)
    return logits(adapted, batch), batch


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 3e-5 * theirs.abs().max()
