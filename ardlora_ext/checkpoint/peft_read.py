"""A PEFT LoRA checkpoint as PEFT reads it: factors, the rank and scale of every module, and whatever else is in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<name>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class PeftAdapter:
    """What `read_peft` found.

    Attributes:
        config: adapter_config.json.
        factors: by module, (A [r, in_features], B [out_features, r]).
        others: all other tensors by their name in the model.
    """

    config: Mapping[str, Any]
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    others: Mapping[str, torch.Tensor]

    def rank(self, name: str) -> int:
        """Return the rank that PEFT gives a module; its tensors must have it."""
        return int(pattern_value(self.config.get("rank_pattern"), name, self.config["r"]))

    def scale(self, name: str) -> float:
        """Return what PEFT multiplies B A of a module by."""
        alpha = pattern_value(self.config.get("alpha_pattern"), name, self.config["lora_alpha"])
        return self._scale(alpha, self.rank(name))

    @property
    def global_scale(self) -> float:
        """The scale of a loader that reads no patterns."""
        return self._scale(self.config["lora_alpha"], self.config["r"])

    def _scale(self, alpha: float, rank: float) -> float:
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def pattern_value(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """Return the value of the first pattern that covers `name` from its start or a dot to its end, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def read_peft(directory: Path, op: str) -> PeftAdapter:
    """Read a PEFT checkpoint of type LoRA.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors (or .bin, read without pickle's code).
        op: who asks, for messages.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is not LoRA, or its tensors do not fit together.
    """
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{op}: directory must hold adapter_config.json, got '{directory}' without it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, r, alpha = config["peft_type"], config["r"], config["lora_alpha"]
    except (ValueError, KeyError, TypeError) as cause:
        raise ValueError(f"{op}: adapter_config.json must be one of PEFT's LoRA, got {cause!r}") from cause
    if kind != "LORA" or not (isinstance(r, int) and r >= 1 and isinstance(alpha, (int, float))):
        raise ValueError(f"{op}: adapter must be PEFT's LORA with a rank and a scale, got {kind}, r={r}, alpha={alpha}")
    halves: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    for key, value in _tensors(directory, op).items():
        found = _FACTOR.fullmatch(key.removeprefix(_PREFIX))
        if found:
            halves.setdefault(found["name"], {})[found["factor"]] = value
        else:
            others[key.removeprefix(_PREFIX)] = value
    adapter = PeftAdapter(config, {n: (h.get("A", _NONE), h.get("B", _NONE)) for n, h in halves.items()}, others)
    for name, (a, b) in adapter.factors.items():
        if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == adapter.rank(name):
            raise ValueError(
                f"{op}: lora_A and lora_B of '{name}' must be [r, in] and [out, r] with r = {adapter.rank(name)}, got "
                f"{list(a.shape)} and {list(b.shape)}"
            )
    if not adapter.factors:
        raise ValueError(f"{op}: adapter must hold lora_A and lora_B of linear layers, got none")
    return adapter


_NONE = torch.empty(0)


def _tensors(directory: Path, op: str) -> dict[str, torch.Tensor]:
    safe, pickled = directory / "adapter_model.safetensors", directory / "adapter_model.bin"
    if safe.is_file():
        tensors: dict[str, torch.Tensor] = load_file(safe)
        return tensors
    if pickled.is_file():
        loaded: dict[str, torch.Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
        return loaded
    raise FileNotFoundError(f"{op}: directory must hold adapter_model.safetensors or .bin, got '{directory}'")
