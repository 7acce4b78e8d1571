"""`save_pretrained`: a plain PEFT adapter, and beside it what a run needs to go on exactly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import nn

from ardlora_ext.checkpoint.adapter_state import (
    FORMAT,
    STATE,
    STATE_WEIGHTS,
    layer_state,
    raw_tensors,
    saved_modules,
    stack_place,
)
from ardlora_ext.checkpoint.peft_write import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PEFT_ROWS,
    Exported,
    Form,
    check_form,
    check_json,
    peft_files,
    to_json,
)
from ardlora_ext.config import AdapterConfig, ArdConfig, DoraConfig
from ardlora_ext.config.registry import config_to_dict, name_of
from ardlora_ext.file_set import write_set
from ardlora_ext.json_file import checksums
from ardlora_ext.layers.expert_stacks import expert_stacks
from ardlora_ext.layers.experts import ExpertStack
from ardlora_ext.layers.linear import Conv1D, LoraLinear
from ardlora_ext.model.parameters import parameters_report
from ardlora_ext.model.peft.loads import (
    peft_saved,
    say_what_peft_adapts_once,
    say_what_peft_leaves_untied,
    say_what_peft_takes_for_experts,
    task_type,
)
from ardlora_ext.model.record import adapters, home, injection
from ardlora_ext.model.saved_modules import inside
from ardlora_ext.model.token_rows import own_rows
from ardlora_ext.report.model_card import CARD, may_write_card, model_card


def _peft_files(
    model: nn.Module, layers: dict[str, LoraLinear], form: Form, limit: int | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor], Exported]:
    """Return PEFT's adapter_config and tensors, with no module above rank `limit`."""
    record = injection(model)
    dora = isinstance(record.config, DoraConfig)
    folded = {name: layer.fold() for name, layer in layers.items()}
    magnitudes = {name: layers[name].extras["lora_magnitude_vector"].detach().clone() for name in layers if dora}
    base = getattr(model, "config", None)
    live = {name: layer for name, layer in layers.items() if dora or folded[name][0].shape[-2]}
    stacks = {
        name: stack_place(layer.base_layer, layer.parameter, layer.transposed)
        for name, layer in layers.items()
        if isinstance(layer, ExpertStack)
    }
    about: dict[str, Any] = {
        "task_type": task_type(model),
        "base_model_name_or_path": getattr(base, "_name_or_path", None) or None,
        # PEFT takes no dropout with experts; it plays no part once training is over
        "lora_dropout": 0.0 if stacks else record.config.lora_dropout,
        "fan_in_fan_out": bool(live) and all(isinstance(layer.base_layer, Conv1D) for layer in live.values()),
        "modules_to_save": peft_saved(model, record.modules_to_save, live) or None,
    }
    tokens = own_rows(record.tokens)
    about["trainable_token_indices"] = {name: rows.indices for name, rows in tokens.items()} or None
    say_what_peft_leaves_untied(model, record.tokens)
    whole = saved_modules(model) | {f"{name}{PEFT_ROWS}": rows.token_rows.detach() for name, rows in tokens.items()}
    return peft_files(folded, magnitudes, whole, about, form, limit, stacks)


def _say_what_is_not_saved(model: nn.Module, saved: Sequence[str]) -> None:
    """Warn of what a user unfroze beside the adapters: it trains, and no adapter file holds it."""
    layers = [*adapters(model).values(), *injection(model).tokens.values()]
    own = {id(p) for layer in layers for p in layer.parameters()}
    lost = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own and not inside(n, saved)]
    if lost:
        warnings.warn(
            f"save_pretrained: '{lost[0]}' trains and is not saved ({len(lost)} such parameters); name its module in "
            "modules_to_save",
            stacklevel=4,
        )


def save_pretrained(
    model: nn.Module, directory: str | Path, *, form: Form = "portable", compress: int | None = None
) -> Exported:
    """Write the adapters as a PEFT LoRA checkpoint plus `ardlora_state.*` to resume from.

    Files: `adapter_config.json` and `adapter_model.safetensors` (load with `peft.PeftModel.from_pretrained`),
    `ardlora_state.json` (config, ranks, controller) and `ardlora_state.safetensors` (live rows), and `README.md`, the
    model card, unless you have written one. A crash leaves the previous checkpoint or the new one.

    Args:
        model: a wrapped model.
        directory: where to write; made if missing, other files in it stay.
        form: `portable` is scaled right by every loader; `compact` is smaller, and wrong in llama.cpp.
        compress: largest rank of the PEFT checkpoint, for servers that have a limit; heads' ranks add up, so it may be
            less than they need. Each module's update is then cut to its best approximation. `ardlora_state.*` is not.

    Returns:
        The ranks written, and the relative error of each module that `compress` cut.

    Raises:
        ValueError: the model is not wrapped, an adapter or its controller's state holds NaN or Inf, an option is out of
            range.
        OSError: the directory cannot be written; the previous checkpoint is still there (the message tells).
    """
    files, exported = adapter_files(model, form, compress)
    write_set(Path(directory), without_users_card(files, Path(directory)))
    return exported


def card_of(
    config: AdapterConfig, peft_config: Mapping[str, Any], ranks: Mapping[str, Sequence[int]], parameters: int
) -> bytes:
    """Return the model card of an adapter with these ranks by module, and so many live parameters."""
    about = (peft_config.get("base_model_name_or_path"), peft_config.get("task_type"))
    return model_card(name_of(config), *about, ranks, parameters).encode()


def without_users_card(files: dict[str, bytes], directory: Path) -> dict[str, bytes]:
    """Return the files without the model card where the user has written one."""
    return files if may_write_card(directory) else {name: data for name, data in files.items() if name != CARD}


def adapter_files(
    model: nn.Module, form: Form = "portable", compress: int | None = None
) -> tuple[dict[str, bytes], Exported]:
    """Return the files that `save_pretrained` writes, the one they are committed by last; raises as it does."""
    check_form("save_pretrained", form, compress)
    record = injection(model)
    model = home(model)
    layers = adapters(model)
    raw = raw_tensors(model, layers)
    broken = [name for name, value in raw.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"save_pretrained: adapters must be finite, got NaN or Inf in '{broken[0]}'")
    if isinstance(record.config, ArdConfig) and record.controller is None and not record.controller_state:
        warnings.warn(
            "save_pretrained: ardlora_ext.attach(model, optimizer) was never called, so ranks did not change",
            stacklevel=3,
        )
    _say_what_is_not_saved(model, record.modules_to_save)
    say_what_peft_adapts_once(model, layers)
    dense = [name for name, layer in layers.items() if not isinstance(layer, ExpertStack)]
    say_what_peft_takes_for_experts(model, dense, bool(expert_stacks(model)))
    config, tensors, exported = _peft_files(model, layers, form, compress)
    weights, raw_weights = save_tensors(tensors, {"format": "pt"}), save_tensors(raw, {"format": "pt"})
    controller = record.controller.state_dict() if record.controller is not None else record.controller_state
    state = {
        "format": FORMAT,
        "config": config_to_dict(record.config),
        "modules_to_save": list(record.modules_to_save),
        "modules": {name: layer_state(layer) for name, layer in layers.items()},
        "controller": controller,
    }
    check_json("save_pretrained", state)
    state["sha256"] = checksums(state, STATE, {STATE_WEIGHTS: raw_weights})
    ranks = {name: layer.ranks for name, layer in layers.items()}
    files = {
        CARD: card_of(record.config, config, ranks, parameters_report(model).live),
        ADAPTER_WEIGHTS: weights,
        ADAPTER_CONFIG: to_json(config),
        STATE_WEIGHTS: raw_weights,
        STATE: to_json(state),
    }
    return files, exported
