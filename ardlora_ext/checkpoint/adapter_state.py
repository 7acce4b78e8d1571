"""`ardlora_state.json` and `.safetensors`: what folding into PEFT's form loses, and how it is read back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import nn

from ardlora_ext.file_set import recover
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.record import home, injection

STATE_WEIGHTS = "ardlora_state.safetensors"
STATE = "ardlora_state.json"
FORMAT = 1


def saved_modules(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of `modules_to_save` by full name."""
    found: dict[str, torch.Tensor] = {}
    held: set[int] = set()  # a tied weight has two names and is written under both: loaders untie it
    for name in injection(model).modules_to_save:
        for key, value in home(model).get_submodule(name).state_dict().items():
            taken = value.detach().contiguous()
            found[f"{name}.{key}"] = taken.clone() if taken.data_ptr() in held else taken
            held.add(taken.data_ptr())
    return found


def raw_tensors(model: nn.Module, layers: dict[str, LoraLinear]) -> dict[str, torch.Tensor]:
    """Return live rows as they are: what the folded form cannot give back bit for bit."""
    raw = {}
    for name, layer in layers.items():
        a_rows, b_rows = layer.layout.rows(layer.ranks)
        raw[f"{name}.lora_A"] = layer.lora_A.detach()[:a_rows].contiguous()
        raw[f"{name}.lora_B"] = layer.lora_B.detach()[:b_rows].contiguous()
        if layer.gate is not None:
            raw[f"{name}.gate"] = layer.gate.detach()[: sum(layer.ranks)].contiguous()
        raw |= {f"{name}.{key}": value.detach().contiguous() for key, value in layer.extras.items()}
    return raw | {f"saved.{name}": value for name, value in saved_modules(model).items()}


def layer_state(layer: LoraLinear) -> dict[str, Any]:
    lay = layer.layout
    return {
        "kind": lay.kind,
        "factoring": lay.factoring,
        "in_features": lay.in_features,
        "out_features": lay.out_features,
        "ranks": layer.ranks,
    }


def read_state(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read and check both state files.

    Raises:
        FileNotFoundError: there is no `ardlora_state.json`.
        ValueError: a file is corrupt, foreign or from a newer version.
    """
    path = directory / STATE
    if directory.is_dir():
        recover(directory, STATE)
    if not path.is_file():
        raise FileNotFoundError(f"load_pretrained: directory must hold {STATE}, got '{directory}' without it")
    try:
        state = json.loads(path.read_text())
        version, digest = state["format"], state["sha256"][STATE_WEIGHTS]
        missing = {"config", "modules", "controller"} - state.keys()
        ranks = [m["ranks"] for m in state["modules"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        raise ValueError(f"load_pretrained: {STATE} must be one that save_pretrained wrote, got {cause!r}") from cause
    if version != FORMAT:
        raise ValueError(f"load_pretrained: format of {STATE} must be {FORMAT}, got {version}")
    if missing:
        raise ValueError(f"load_pretrained: {STATE} must be one that save_pretrained wrote, got no {sorted(missing)}")
    if not all(isinstance(r, int) and r >= 0 for unit_ranks in ranks for r in unit_ranks):
        raise ValueError(f"load_pretrained: ranks in {STATE} must be whole numbers >= 0")
    weights = directory / STATE_WEIGHTS
    data = weights.read_bytes() if weights.is_file() else b""
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"load_pretrained: {STATE_WEIGHTS} must match its checksum in {STATE}; the file is corrupt")
    return state, load_tensors(data)
