"""Write what `save_pretrained` saved once more in another PEFT form, from its files alone: no base model is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors

from ardlora_ext.checkpoint.adapter_state import STATE, STATE_WEIGHTS, read_state
from ardlora_ext.checkpoint.peft_write import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PEFT_ROWS,
    Exported,
    Form,
    StackPlace,
    check_form,
    peft_files,
    to_json,
)
from ardlora_ext.checkpoint.save_pretrained import card_of, without_users_card
from ardlora_ext.config import AdapterConfig
from ardlora_ext.config.registry import config_from_dict
from ardlora_ext.errors import written_by_strangers
from ardlora_ext.file_set import write_set
from ardlora_ext.json_file import checksums, parse_json
from ardlora_ext.layers.experts import fold_stack
from ardlora_ext.layers.linear import fold
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.plan.memory import live_parameters
from ardlora_ext.report.model_card import CARD

Tensors = dict[str, torch.Tensor]


def reexport(
    source: str | Path, directory: str | Path, *, form: Form = "portable", compress: int | None = None
) -> Exported:
    """Write the checkpoint in `source` to `directory` as `save_pretrained` would have with these options.

    `ardlora_state.*` holds the live factors as they were trained, so nothing that an earlier `compress` cut is lost.

    Args:
        source: what `save_pretrained` wrote.
        directory: where to write, may be `source`; made if missing.
        form: `portable` or `compact`, see `save_pretrained`.
        compress: largest rank of the PEFT checkpoint.

    Returns:
        The ranks written, and the relative error of each module that `compress` cut.

    Raises:
        FileNotFoundError: `source` holds no such checkpoint.
        ValueError: its files are corrupt or foreign, or an option is out of range; nothing is written then.
        OSError: the directory cannot be written; what is there stays (the message tells).
    """
    check_form("reexport", form, compress)
    source = Path(source)
    state, tensors, old = read_state(source, (ADAPTER_CONFIG,))
    with written_by_strangers(f"reexport: {STATE} must be one that save_pretrained wrote"):
        config = config_from_dict(state["config"])
        folded = {name: stored_factors(name, entry, config, tensors) for name, entry in state["modules"].items()}
        magnitudes = _of(tensors, "", ".lora_magnitude_vector")
        whole = _of(tensors, "saved.", "")
        whole |= {f"{name}{PEFT_ROWS}": rows for name, rows in _of(tensors, "", ".token_rows").items()}
        stacks = {name: StackPlace(**entry["stack"]) for name, entry in state["modules"].items() if "stack" in entry}
        about = _about(source, old)
        ranks = {name: list(entry["ranks"]) for name, entry in state["modules"].items()}
        layouts = {name: stored_layout(entry) for name, entry in state["modules"].items()}
        peft_config, peft_tensors, exported = peft_files(folded, magnitudes, whole, about, form, compress, stacks)
        card = card_of(config, peft_config, ranks, live_parameters(layouts, ranks, config))
    state["sha256"] = checksums(state, STATE, {STATE_WEIGHTS: old[STATE_WEIGHTS]})  # older ones had none of the state
    files = {
        CARD: card,
        ADAPTER_WEIGHTS: save_tensors(peft_tensors, {"format": "pt"}),
        ADAPTER_CONFIG: to_json(peft_config),
        STATE_WEIGHTS: old[STATE_WEIGHTS],
        STATE: to_json(state),
    }
    write_set(Path(directory), without_users_card(files, Path(directory)))
    return exported


def _about(source: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the old adapter_config.json: what it says of the base model stays."""
    if ADAPTER_CONFIG not in files:
        raise FileNotFoundError(f"reexport: directory must hold {ADAPTER_CONFIG}, got '{source}' without it")
    about = parse_json(files[ADAPTER_CONFIG], f"reexport: {source / ADAPTER_CONFIG}")
    if not isinstance(about, dict):
        raise ValueError(f"reexport: {source / ADAPTER_CONFIG} must hold an object, got {type(about).__name__}")
    return about


def _of(tensors: Tensors, prefix: str, suffix: str) -> Tensors:
    """Return the tensors whose names have this prefix and suffix, without them."""
    return {
        name.removeprefix(prefix).removesuffix(suffix): value
        for name, value in tensors.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }


def stored_layout(entry: Mapping[str, Any]) -> UnitLayout:
    """Return the units of a module, from what `ardlora_state.json` says about it."""
    sizes = len(entry["ranks"]), entry["in_features"], entry["out_features"]
    return UnitLayout(entry["kind"], entry["factoring"], *sizes)


def stored_factors(
    name: str, entry: Mapping[str, Any], config: AdapterConfig, tensors: Tensors
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return plain factors (A [r, in_features], B [out_features, r]) of a module's trained update, stacked of experts.

    Args:
        name: of the module.
        entry: about it in `ardlora_state.json`.
        config: of the run.
        tensors: of `ardlora_state.safetensors`.

    Raises:
        ValueError: they do not fit together.
    """
    try:
        ranks, layout = list(entry["ranks"]), stored_layout(entry)
        a, b = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
    except KeyError as cause:
        raise ValueError(f"'{name}' must have factors and ranks in the saved state, got no {cause}") from cause
    shapes, (a_rows, b_rows) = (a.shape, b.shape), layout.rows(ranks)
    if shapes != ((a_rows, layout.a_width), (b_rows, layout.b_width)):
        raise ValueError(f"factors of '{name}' must fit its ranks {ranks}, got shapes {[list(s) for s in shapes]}")
    gate = tensors.get(f"{name}.gate")
    if gate is not None and gate.numel() != sum(ranks):
        raise ValueError(f"gate of '{name}' must have {sum(ranks)} entries, got {gate.numel()}")
    scaling = config.scaling(name)
    if layout.kind == "experts":
        return fold_stack(layout, ranks, a, b, gate, scaling)
    a, b = fold(layout, ranks, a, b, gate, scaling)
    if f"{name}.initial_A" in tensors:  # PiSSA trains what is left after its start
        start = [min(config.start_rank(name), layout.max_rank)] * layout.units
        a0, b0 = (tensors.get(f"{name}.initial_{half}", a) for half in "AB")
        if (a0.shape, b0.shape) != tuple(zip(layout.rows(start), (layout.a_width, layout.b_width), strict=True)):
            raise ValueError(f"initial_A and initial_B of '{name}' must have rank {start}, got {list(a0.shape)}")
        a0, b0 = fold(layout, start, a0, b0, None, -scaling)
        a, b = torch.cat([a, a0]), torch.cat([b, b0], dim=1)
    return a, b
