"""Which scale will each loader give a LoRA checkpoint? PEFT reads patterns, vLLM does not, llama.cpp divides by the
tensor's own rank: a checkpoint with mixed ranks that is right in one can be wrong in another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ardlora_ext.checkpoint.adapter_state import STATE, STATE_WEIGHTS, check_numbers, parse_state, parse_tensors
from ardlora_ext.checkpoint.peft_read import PEFT_FILES, PeftAdapter, parse_peft, read_peft
from ardlora_ext.checkpoint.peft_write import StackPlace, stack_prefixes, unpack_stack
from ardlora_ext.checkpoint.reexport import stored_factors
from ardlora_ext.config.registry import config_from_dict
from ardlora_ext.errors import written_by_strangers
from ardlora_ext.file_set import read_set

LOADERS = ("PEFT", "vLLM", "llama.cpp")

_TOLERANCE = 1e-3  # relative; checkpoints in bfloat16 round to 4e-3 per entry, but the scale averages over all of them


@dataclass(frozen=True)
class ModuleScale:
    """What B A of one module is multiplied by.

    Attributes:
        name: of the module.
        rank: of its tensors.
        trained: by whoever trained it.
        used: by each of `LOADERS`.
    """

    name: str
    rank: int
    trained: float
    used: tuple[float, float, float]

    @property
    def wrong(self) -> tuple[str, ...]:
        """The loaders that will use another scale than the trained one."""
        pairs = zip(LOADERS, self.used, strict=True)
        return tuple(loader for loader, scale in pairs if not math.isclose(scale, self.trained, rel_tol=_TOLERANCE))


def check_adapter(directory: str | Path) -> list[ModuleScale]:
    """Return the scales of every module of a PEFT LoRA checkpoint.

    The trained scale of a checkpoint that this package wrote is found by comparing its tensors with the trained factors
    in `ardlora_state.*`; that of any other is what PEFT computes.

    Rules of the loaders: PEFT alpha_i / r_i by its patterns; vLLM lora_alpha / r of the config for every module;
    llama.cpp lora_alpha of the config over the rank of the module's tensor. With `use_rslora` the first two divide by
    the root of the rank.

    Raises:
        FileNotFoundError: it holds no PEFT checkpoint.
        ValueError: it is not a LoRA checkpoint, or its files do not fit together.
    """
    directory = Path(directory)
    files = read_set(directory, (*PEFT_FILES, STATE, STATE_WEIGHTS), STATE)
    adapter = parse_peft(files, directory, "check_adapter")
    deltas = _Trained(files) if STATE in files else None
    found = []
    for name in sorted(adapter.factors):
        a, b = adapter.factors[name]
        scale = adapter.scale(name)
        trained = scale if deltas is None else deltas.scale(name, a.float(), b.float())
        llama = adapter.config["lora_alpha"] / len(a) if adapter.config["lora_alpha"] else 1.0
        found.append(ModuleScale(name, len(a), trained, (scale, adapter.global_scale, float(llama))))
    return found + _stacks(adapter, deltas)


def _stacks(adapter: PeftAdapter, deltas: _Trained | None) -> list[ModuleScale]:
    """Return the scales of stacks of experts: by parameter where the state names it, else by PEFT's wrapper."""
    places = {} if deltas is None else deltas.stacks()
    names = {prefix: name for name, prefix in stack_prefixes(places).items()}
    found = []
    for prefix, (a, b) in sorted(adapter.stacks.items()):
        name = names.get(prefix, prefix)
        rank = adapter.rank(name)
        scale = trained = adapter.scale(name)
        if deltas is not None and name in places:
            pair = unpack_stack(a.float(), b.float(), len(deltas.modules[name]["ranks"]), places[name].exchanged)
            trained = deltas.scale(name, *pair)
        found.append(
            ModuleScale(name, rank, trained, (scale, adapter.global_scale, adapter.config["lora_alpha"] / rank))
        )
    return found


def of_experts(directory: str | Path) -> bool:
    """Tell whether a checkpoint has stacks of experts."""
    return bool(read_peft(Path(directory), "check_adapter").stacks)


def refusals(directory: str | Path) -> list[str]:
    """Return what of a checkpoint vLLM does not load at all."""
    adapter: PeftAdapter = read_peft(Path(directory), "check_adapter")
    config = adapter.config
    reasons = [option for option in ("use_dora", "modules_to_save", "trainable_token_indices") if config.get(option)]
    return reasons + (["bias"] if config.get("bias", "none") != "none" else [])


class _Trained:
    """The trained updates that `save_pretrained` left beside the PEFT files."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        state = parse_state(files, "check_adapter")
        self.modules = state["modules"]
        with written_by_strangers(f"check_adapter: {STATE} must be one that save_pretrained wrote"):
            self.config = config_from_dict(state["config"])
        self.tensors = parse_tensors(files[STATE_WEIGHTS], f"check_adapter: {STATE_WEIGHTS}")
        check_numbers(self.tensors, "check_adapter", lambda name: not name.startswith("saved."))

    def stacks(self) -> dict[str, StackPlace]:
        """Return how PEFT sees the stacks of experts that it was given."""
        with written_by_strangers(f"check_adapter: {STATE} must be one that save_pretrained wrote"):
            return {
                name: StackPlace(**entry["stack"])
                for name, entry in self.modules.items()
                if "stack" in entry and max(entry["ranks"])
            }

    def scale(self, name: str, a: torch.Tensor, b: torch.Tensor) -> float:
        """Return the s that brings s B A nearest to the trained update; 1 for an update of zero."""
        if name not in self.modules:
            raise ValueError(f"check_adapter: '{name}' must be a module of {STATE}")
        with written_by_strangers(f"check_adapter: {STATE} must be one that save_pretrained wrote"):
            trained_a, trained_b = stored_factors(name, self.modules[name], self.config, self.tensors)
        if (b.shape[-2], a.shape[-1]) != (trained_b.shape[-2], trained_a.shape[-1]):
            raise ValueError(f"check_adapter: '{name}' must have the same features in {STATE} and in PEFT's files")
        written, trained = b @ a, trained_b @ trained_a
        square = float(written.square().sum())
        if square == 0.0:
            return 1.0 if float(trained.square().sum()) == 0.0 else math.nan
        return float((trained * written).sum()) / square
