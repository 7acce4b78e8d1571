"""A PEFT LoRA checkpoint as PEFT reads it: factors, the rank and scale of every module, and whatever else is in it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ardlora_ext.checkpoint.adapter_state import STATE, check_numbers, parse_tensors
from ardlora_ext.checkpoint.peft_write import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ardlora_ext.config.patterns import check_pattern, pattern_key
from ardlora_ext.errors import written_by_strangers
from ardlora_ext.file_set import read_set
from ardlora_ext.json_file import parse_json

PICKLED = "adapter_model.bin"  # read without pickle's code
PEFT_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED)

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<name>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class PeftAdapter:
    """What `read_peft` found.

    Attributes:
        config: adapter_config.json.
        factors: by module, (A [r, in_features], B [out_features, r]).
        others: all other tensors by their name in the model.
        stacks: factors of `target_parameters` as they are written, by `module[.base_layer]*`.
    """

    config: Mapping[str, Any]
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    others: Mapping[str, torch.Tensor]
    stacks: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    def rank(self, name: str) -> int:
        """Return the rank that PEFT gives a module; its tensors must have it."""
        return int(self._value("rank_pattern", name, self.config["r"]))

    def scale(self, name: str) -> float:
        """Return what PEFT multiplies B A of a module by."""
        return self._scale(self._value("alpha_pattern", name, self.config["lora_alpha"]), self.rank(name))

    def _value(self, option: str, name: str, default: float) -> float:
        patterns = self.config.get(option) or {}
        key = pattern_key(patterns, name)
        return default if key is None else patterns[key]

    @property
    def global_scale(self) -> float:
        """The scale of a loader that reads no patterns."""
        return self._scale(self.config["lora_alpha"], self.config["r"])

    def _scale(self, alpha: float, rank: float) -> float:
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def read_peft(directory: Path, op: str) -> PeftAdapter:
    """Read a PEFT checkpoint of type LoRA.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors (or .bin, read without pickle's code).
        op: who asks, for messages.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is not LoRA, a file is broken, or its tensors do not fit together.
    """
    return parse_peft(read_set(directory, PEFT_FILES, STATE), directory, op)


def parse_peft(files: Mapping[str, bytes], directory: Path, op: str) -> PeftAdapter:
    """Return what the files of a checkpoint hold; raises as `read_peft` does."""
    if ADAPTER_CONFIG not in files:
        raise FileNotFoundError(f"{op}: directory must hold {ADAPTER_CONFIG}, got '{directory}' without it")
    must = f"{op}: {ADAPTER_CONFIG} must be one of PEFT's LoRA"
    with written_by_strangers(must):
        config = _parse_config(files[ADAPTER_CONFIG], op, must)
        halves: dict[str, dict[str, torch.Tensor]] = {}
        others: dict[str, torch.Tensor] = {}
        for key, value in _tensors(files, directory, op).items():
            found = _FACTOR.fullmatch(key.removeprefix(_PREFIX))
            if found:
                halves.setdefault(found["name"], {})[found["factor"]] = value
            else:
                others[key.removeprefix(_PREFIX)] = value
        pairs = {n: (h.get("A", _NONE), h.get("B", _NONE)) for n, h in halves.items()}
        stacks = {n: pairs.pop(n) for n in list(pairs) if _is_stack(n, config.get("target_parameters") or ())}
        adapter = PeftAdapter(config, pairs, others, stacks)
        for name, (a, b) in stacks.items():
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not len(a):
                raise ValueError(
                    f"{op}: lora_A and lora_B of '{name}' must be [experts r, in] and [out, r experts], got "
                    f"{list(a.shape)} and {list(b.shape)}"
                )
        for name, (a, b) in adapter.factors.items():
            if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == adapter.rank(name):
                raise ValueError(
                    f"{op}: lora_A and lora_B of '{name}' must be [r, in] and [out, r] with r = {adapter.rank(name)}, "
                    f"got {list(a.shape)} and {list(b.shape)}"
                )
    if not adapter.factors and not adapter.stacks:
        raise ValueError(f"{op}: adapter must hold lora_A and lora_B of linear layers, got none")
    return adapter


_NONE = torch.empty(0)


def _is_stack(name: str, parameters: Sequence[str]) -> bool:
    """Tell whether factors belong to a parameter of a module that PEFT's wrappers nest around."""
    module = re.sub(r"(\.base_layer)+$", "", name)
    return any(f".{module}".endswith(f".{parent}") for parent in (p.rpartition(".")[0] for p in parameters) if parent)


def _parse_config(data: bytes, op: str, must: str) -> Mapping[str, Any]:
    """Return adapter_config.json with every number in it that a scale comes from checked."""
    try:
        config: dict[str, Any] = parse_json(data, ADAPTER_CONFIG)
    except ValueError as cause:
        raise ValueError(f"{must}, got {cause}") from cause
    kind, r, alpha = config["peft_type"], config["r"], config["lora_alpha"]
    if kind != "LORA" or not (_is_rank(r) and _is_number(alpha)):
        raise ValueError(f"{op}: adapter must be PEFT's LORA with a rank and a scale, got {kind}, r={r}, alpha={alpha}")
    for option, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        for pattern, value in (config.get(option) or {}).items():
            check_pattern(pattern, f"{op}: {option} in {ADAPTER_CONFIG}")
            if not fits(value):
                raise ValueError(f"{must}: {option} must map names to numbers, got {value!r:.60} for {pattern!r:.60}")
    return config


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 2**31


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e30


def _tensors(files: Mapping[str, bytes], directory: Path, op: str) -> dict[str, torch.Tensor]:
    if ADAPTER_WEIGHTS in files:
        tensors = parse_tensors(files[ADAPTER_WEIGHTS], f"{op}: {directory / ADAPTER_WEIGHTS}")
    elif PICKLED in files:
        try:
            tensors = torch.load(io.BytesIO(files[PICKLED]), map_location="cpu", weights_only=True)
        except Exception as cause:  # a broken archive fails in as many ways as pickle has
            text = " ".join(str(cause).split())[:200]
            raise ValueError(f"{op}: {directory / PICKLED} must be a whole file of tensors, got {text}") from cause
        if not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise ValueError(f"{op}: {directory / PICKLED} must hold tensors by name")
    else:
        raise FileNotFoundError(f"{op}: directory must hold {ADAPTER_WEIGHTS} or .bin, got '{directory}'")
    check_numbers(tensors, op, lambda name: ".lora_" in name)
    return tensors
