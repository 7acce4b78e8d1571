"""`ardlora_state.json` and `.safetensors`: what folding into PEFT's form loses, and how it is read back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import nn

from ardlora_ext.checkpoint.peft_write import ADAPTER_CONFIG, StackPlace
from ardlora_ext.errors import written_by_strangers
from ardlora_ext.file_set import read_set
from ardlora_ext.json_file import check_checksums, non_finite, parse_json
from ardlora_ext.layers.experts import ExpertStack
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.record import home, injection
from ardlora_ext.model.token_rows import own_rows

STATE_WEIGHTS = "ardlora_state.safetensors"
STATE = "ardlora_state.json"
FORMAT = 1


class Saved(NamedTuple):
    """A checkpoint as `save_pretrained` wrote it: `ardlora_state.*`, read, and the bytes of the files asked for."""

    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    files: dict[str, bytes]


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
    for name, rows in own_rows(injection(model).tokens).items():
        raw[f"{name}.token_rows"] = rows.token_rows.detach().contiguous()
    return raw | {f"saved.{name}": value for name, value in saved_modules(model).items()}


def stack_place(module: nn.Module, parameter: str, transposed: bool) -> StackPlace:
    """Return how PEFT sees a stack: it knows no transposed one but where the module says so."""
    stacks = [key for key, value in module.named_parameters(recurse=False) if value.ndim == 3]
    return StackPlace(stacks.index(parameter), transposed and getattr(module, "is_transposed", False) is not True)


def layer_state(layer: LoraLinear) -> dict[str, Any]:
    """Return what of a layer is no tensor."""
    lay = layer.layout
    place: dict[str, Any] = {}
    if isinstance(layer, ExpertStack):
        place = {"stack": asdict(stack_place(layer.base_layer, layer.parameter, layer.transposed))}
    return place | {
        "kind": lay.kind,
        "factoring": lay.factoring,
        "in_features": lay.in_features,
        "out_features": lay.out_features,
        "ranks": layer.ranks,
    }


def read_state(directory: Path, others: Iterable[str] = ()) -> Saved:
    """Read and check both state files, and read `others` of the same save; nothing is written.

    Raises:
        FileNotFoundError: there is no `ardlora_state.json`.
        ValueError: a file is corrupt, foreign or from a newer version, or holds NaN or Inf.
    """
    files = read_set(directory, (STATE, STATE_WEIGHTS, *others), STATE)
    if STATE not in files:
        peft = "; ardlora_ext.load_peft takes what PEFT wrote" if (directory / ADAPTER_CONFIG).is_file() else ""
        raise FileNotFoundError(f"load_pretrained: directory must hold {STATE}, got '{directory}' without it{peft}")
    state = parse_state(files, "load_pretrained")
    tensors = parse_tensors(files[STATE_WEIGHTS], f"load_pretrained: {STATE_WEIGHTS}")
    check_numbers(tensors, "load_pretrained", lambda name: not name.startswith("saved."))
    return Saved(state, tensors, files)


def parse_state(files: Mapping[str, bytes], op: str) -> dict[str, Any]:
    """Return the content of `ardlora_state.json`, checked as far as the model does not matter; raises ValueError."""
    must = f"{op}: {STATE} must be one that save_pretrained wrote"
    with written_by_strangers(must):
        try:
            state: dict[str, Any] = parse_json(files[STATE], STATE)
        except ValueError as cause:
            raise ValueError(f"{must}, got {cause}") from cause
        version, _ = state["format"], state["sha256"][STATE_WEIGHTS]
        missing = {"config", "modules", "controller"} - state.keys()
        ranks = [m["ranks"] for m in state["modules"].values()]
        if version != FORMAT:
            raise ValueError(f"{op}: format of {STATE} must be {FORMAT}, got {version}")
        if missing:
            raise ValueError(f"{must}, got no {sorted(missing)}")
        if not all(isinstance(r, int) and r >= 0 for unit_ranks in ranks for r in unit_ranks):
            raise ValueError(f"{op}: ranks in {STATE} must be whole numbers >= 0")
        try:
            check_checksums(state, STATE, {STATE_WEIGHTS: files.get(STATE_WEIGHTS, b"")})
        except ValueError as cause:
            raise ValueError(f"{op}: {cause}") from cause
        where = non_finite(state)
        if where is not None:
            raise ValueError(f"{op}: {where} in {STATE} must be finite, got NaN or Inf")
    return state


def parse_tensors(data: bytes, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ValueError: it is none, or is not whole.
    """
    try:
        tensors: dict[str, torch.Tensor] = load_tensors(data)
    except (SafetensorError, ValueError, LookupError, TypeError, OverflowError, RuntimeError) as cause:
        raise ValueError(f"{name} must be a whole safetensors file, got {cause}") from cause
    return dict(sorted(tensors.items()))


def check_numbers(tensors: Mapping[str, torch.Tensor], op: str, of_adapter: Callable[[str], bool]) -> None:
    """Check that weights are numbers to compute with: finite, and those of adapters in a floating-point type.

    Raises:
        ValueError: one is not.
    """
    for name, value in tensors.items():
        if of_adapter(name) and not value.is_floating_point():
            raise ValueError(f"{op}: '{name}' must be a floating-point tensor, got {value.dtype}")
        wide = value.float() if value.is_floating_point() and value.itemsize == 1 else value  # float8 has no isfinite
        if not bool(torch.isfinite(wide).all()):
            raise ValueError(f"{op}: '{name}' must be finite, got NaN or Inf")
