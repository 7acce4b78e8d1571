"""Checkpoints: a plain PEFT LoRA adapter that every loader scales right, and beside it what a resumed run needs.

Units, gates and scaling are folded into B. `portable` form: every module is zero-padded to one rank R and
`r = lora_alpha = R`, so PEFT, vLLM and llama.cpp all compute a scale of 1. `compact` form: every module keeps its rank
r_i and patterns tell it, so PEFT and vLLM compute 1, but llama.cpp R / r_i.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from ardlora_ext.config import AdapterConfig, ArdConfig, DoraConfig
from ardlora_ext.files import recover, write_set
from ardlora_ext.inject import adapters, injection, wrap
from ardlora_ext.layers import Conv1D, LoraLinear
from ardlora_ext.methods import config_from_dict, config_to_dict
from ardlora_ext.resize import RankUpdate, UnitUpdate, apply
from ardlora_ext.targets import plan_targets
from ardlora_ext.units import UnitLayout

Model = TypeVar("Model", bound=nn.Module)
Form = Literal["portable", "compact"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
STATE_WEIGHTS = "ardlora_state.safetensors"
STATE = "ardlora_state.json"

_FORMAT = 1
_SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM accepts as max_lora_rank
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True)
class Exported:
    """What `save_pretrained` wrote for PEFT and servers.

    Attributes:
        r: rank in adapter_config.json, the largest a server must hold.
        ranks: of each module's tensors.
        errors: by module, ||dW' - dW|| / ||dW|| (Frobenius) that `compress` left; 0 where nothing was cut.
    """

    r: int
    ranks: dict[str, int]
    errors: dict[str, float]

    @property
    def error(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values(), default=0.0)


def _truncated(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the best factors of B A of this rank, and what is lost: QR of both, SVD of the small core."""
    (qa, ra), (qb, rb) = torch.linalg.qr(a.double().T), torch.linalg.qr(b.double())
    u, values, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    root = values[:rank].sqrt()
    lost = float(values[rank:].norm() / values.norm().clamp(min=1e-300))
    return (root[:, None] * (vh[:rank] @ qa.T)).float(), ((qb @ u[:, :rank]) * root).float(), lost


def _padded(rows: torch.Tensor, rank: int) -> torch.Tensor:
    out = rows.new_zeros(rank, rows.shape[1])
    out[: rows.shape[0]] = rows
    return out


def _peft_files(
    model: nn.Module, layers: dict[str, LoraLinear], form: Form, limit: int | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor], Exported]:
    """Return PEFT's adapter_config and tensors, with no module above rank `limit`."""
    record = injection(model)
    dora = isinstance(record.config, DoraConfig)
    folded = {name: layer.fold() for name, layer in layers.items()}
    magnitudes = {name: layers[name].extras["lora_magnitude_vector"].detach().clone() for name in layers if dora}
    kind = type(model).__name__
    base = getattr(model, "config", None)
    live = [layer for name, layer in layers.items() if dora or len(folded[name][0])]
    about: dict[str, Any] = {
        "task_type": next((task for suffix, task in _TASKS.items() if kind.endswith(suffix)), None),
        "base_model_name_or_path": getattr(base, "_name_or_path", None) or None,
        "lora_dropout": record.config.lora_dropout,
        "fan_in_fan_out": bool(live) and all(isinstance(layer.base_layer, Conv1D) for layer in live),
        "modules_to_save": list(record.modules_to_save) or None,
    }
    return peft_files(folded, magnitudes, _saved_modules(model), about, form, limit)


def peft_files(
    folded: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    magnitudes: Mapping[str, torch.Tensor],
    saved: Mapping[str, torch.Tensor],
    about: Mapping[str, Any],
    form: Form,
    limit: int | None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], Exported]:
    """Return PEFT's adapter_config, its tensors, and what became of the ranks.

    Args:
        folded: plain factors (A [r, in_features], B [out_features, r]) by module, their product the update.
        magnitudes: DoRA's, by module; none for other methods.
        saved: tensors of `modules_to_save` by full name.
        about: what the config says of the base model.
        form: see `save_pretrained`.
        limit: largest rank of a module, or None.
    """
    dora = bool(magnitudes)
    live = {name: factors for name, factors in folded.items() if dora or len(factors[0]) > 0}
    errors = dict.fromkeys(live, 0.0)
    for name, (a, b) in live.items():
        if limit is not None and len(a) > limit:
            a, b, errors[name] = _truncated(a, b, limit)
            live[name] = a, b
    ranks = {name: max(1, len(a)) for name, (a, _) in live.items()}
    rank = max((1, *ranks.values()))
    if form == "portable":
        served = next((r for r in _SERVED_RANKS if r >= rank), rank)
        rank = served if limit is None else min(served, limit)
        ranks = dict.fromkeys(ranks, rank)
    patterns = {"^" + re.escape(name): r for name, r in ranks.items() if r != rank}
    tensors = {}
    for name, (a, b) in live.items():
        prefix = f"base_model.model.{name}"
        if dora:  # PEFT takes the norm of W + B A itself, at a scale of 1
            tensors[f"{prefix}.lora_magnitude_vector"] = magnitudes[name]
        tensors[f"{prefix}.lora_A.weight"] = _padded(a, ranks[name])
        tensors[f"{prefix}.lora_B.weight"] = _padded(b.T, ranks[name]).T.contiguous()
    tensors |= {f"base_model.model.{name}": value for name, value in saved.items()}
    config: dict[str, Any] = {
        **about,
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "use_dora": dora,
        "bias": "none",
        "target_modules": sorted(live),
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
    }
    return config, tensors, Exported(rank, ranks, errors)


def _saved_modules(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of `modules_to_save` by full name."""
    found = {}
    for name in injection(model).modules_to_save:
        for key, value in model.get_submodule(name).state_dict().items():
            found[f"{name}.{key}"] = value.detach().contiguous()
    return found


def _raw_tensors(model: nn.Module, layers: dict[str, LoraLinear]) -> dict[str, torch.Tensor]:
    """Return live rows as they are: what the folded form cannot give back bit for bit."""
    raw = {}
    for name, layer in layers.items():
        a_rows, b_rows = layer.layout.rows(layer.ranks)
        raw[f"{name}.lora_A"] = layer.lora_A.detach()[:a_rows].contiguous()
        raw[f"{name}.lora_B"] = layer.lora_B.detach()[:b_rows].contiguous()
        if layer.gate is not None:
            raw[f"{name}.gate"] = layer.gate.detach()[: sum(layer.ranks)].contiguous()
        raw |= {f"{name}.{key}": value.detach().contiguous() for key, value in layer.extras.items()}
    return raw | {f"saved.{name}": value for name, value in _saved_modules(model).items()}


def to_json(value: Any) -> bytes:
    """Return the bytes of a JSON file."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def save_pretrained(
    model: nn.Module, directory: str | Path, *, form: Form = "portable", compress: int | None = None
) -> Exported:
    """Write the adapters as a PEFT LoRA checkpoint plus `ardlora_state.*` to resume from.

    Files: `adapter_config.json` and `adapter_model.safetensors` (load with `peft.PeftModel.from_pretrained`),
    `ardlora_state.json` (config, ranks, controller) and `ardlora_state.safetensors` (live rows). A crash leaves the
    previous checkpoint or the new one.

    Args:
        model: a wrapped model.
        directory: where to write; made if missing, other files in it stay.
        form: `portable` is scaled right by every loader; `compact` is smaller, and wrong in llama.cpp.
        compress: largest rank of the PEFT checkpoint, for servers that have a limit; heads' ranks add up, so it may be
            less than they need. Each module's update is then cut to its best approximation. `ardlora_state.*` is not.

    Returns:
        The ranks written, and the relative error of each module that `compress` cut.

    Raises:
        ValueError: the model is not wrapped, an adapter holds NaN or Inf, an option is out of range.
        OSError: the directory cannot be written.
    """
    check_form("save_pretrained", form, compress)
    record = injection(model)
    layers = adapters(model)
    raw = _raw_tensors(model, layers)
    broken = [name for name, value in raw.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"save_pretrained: adapters must be finite, got NaN or Inf in '{broken[0]}'")
    if isinstance(record.config, ArdConfig) and record.controller is None and not record.controller_state:
        warnings.warn(
            "save_pretrained: ardlora_ext.attach(model, optimizer) was never called, so ranks did not change",
            stacklevel=2,
        )
    config, tensors, exported = _peft_files(model, layers, form, compress)
    weights, raw_weights = save_tensors(tensors, {"format": "pt"}), save_tensors(raw, {"format": "pt"})
    controller = record.controller.state_dict() if record.controller is not None else record.controller_state
    state = {
        "format": _FORMAT,
        "config": config_to_dict(record.config),
        "modules_to_save": list(record.modules_to_save),
        "modules": {name: _layer_state(layer) for name, layer in layers.items()},
        "controller": controller,
        "sha256": {STATE_WEIGHTS: hashlib.sha256(raw_weights).hexdigest()},
    }
    files = {
        ADAPTER_WEIGHTS: weights,
        ADAPTER_CONFIG: to_json(config),
        STATE_WEIGHTS: raw_weights,
        STATE: to_json(state),
    }
    write_set(Path(directory), files)
    return exported


def check_form(op: str, form: str, compress: int | None) -> None:
    """Check the options of an export.

    Raises:
        ValueError: one is out of range.
    """
    if form not in ("portable", "compact"):
        raise ValueError(f"{op}: form must be 'portable' or 'compact', got {form!r}")
    if compress is not None and compress < 1:
        raise ValueError(f"{op}: compress must be >= 1, got {compress}")


def _layer_state(layer: LoraLinear) -> dict[str, Any]:
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
    if version != _FORMAT:
        raise ValueError(f"load_pretrained: format of {STATE} must be {_FORMAT}, got {version}")
    if missing:
        raise ValueError(f"load_pretrained: {STATE} must be one that save_pretrained wrote, got no {sorted(missing)}")
    if not all(isinstance(r, int) and r >= 0 for unit_ranks in ranks for r in unit_ranks):
        raise ValueError(f"load_pretrained: ranks in {STATE} must be whole numbers >= 0")
    weights = directory / STATE_WEIGHTS
    data = weights.read_bytes() if weights.is_file() else b""
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"load_pretrained: {STATE_WEIGHTS} must match its checksum in {STATE}; the file is corrupt")
    return state, load_tensors(data)


@torch.no_grad()
def load_pretrained(model: Model, directory: str | Path) -> Model:
    """Wrap a base model with the adapters that `save_pretrained` wrote, in place, to go on training or to evaluate.

    Ranks, weights and gates are restored exactly; the controller's state waits for `attach`.

    Args:
        model: the base model, not wrapped.
        directory: what `save_pretrained` wrote.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: no `ardlora_state.json` there.
        ValueError: the state is corrupt, foreign, or of another model; the model is unchanged then.
    """
    state, tensors = read_state(Path(directory))
    config = config_from_dict(state["config"])
    _check_model(model, config, state, tensors)
    wrap(model, config)
    layers = adapters(model)
    modules = {
        name: tuple(UnitUpdate(tuple(range(min(a, b))), max(b - a, 0)) for a, b in zip(layer.ranks, want, strict=True))
        for name, layer in layers.items()
        if (want := state["modules"][name]["ranks"]) != layer.ranks
    }
    apply(model, RankUpdate(modules))
    for name, layer in layers.items():
        for factor in ("lora_A", "lora_B"):
            value = tensors[f"{name}.{factor}"]
            getattr(layer, factor)[: len(value)] = value
        if layer.gate is not None:
            layer.gate[: sum(layer.ranks)] = tensors[f"{name}.gate"]
        for key, value in layer.extras.items():
            value.copy_(tensors[f"{name}.{key}"])
    saved = {key.removeprefix("saved."): value for key, value in tensors.items() if key.startswith("saved.")}
    model.load_state_dict(saved, strict=False)
    injection(model).controller_state = state["controller"]
    injection(model).started = True
    return model


def _check_model(
    model: nn.Module, config: AdapterConfig, state: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Check that every module and tensor of the checkpoint fits the model, before it changes."""
    if getattr(model, "_ardlora", None) is None:
        _check_features(model, state)
    layouts = plan_targets(model, config)[1]
    if layouts.keys() != state["modules"].keys():
        raise ValueError("load_pretrained: the model's targets must be those of the checkpoint")
    for name, layout in layouts.items():
        entry = state["modules"][name]
        _check_layout(name, layout, entry, min(config.max_rank, layout.max_rank))
        shapes = zip(("lora_A", "lora_B"), layout.rows(entry["ranks"]), (layout.a_width, layout.b_width), strict=True)
        for factor, rows, width in shapes:
            value = tensors.get(f"{name}.{factor}")
            if value is None or value.shape != (rows, width):
                got = "none" if value is None else list(value.shape)
                raise ValueError(f"load_pretrained: {factor} of '{name}' must be [{rows}, {width}], got {got}")
    own = model.state_dict()
    for key, value in tensors.items():
        name = key.removeprefix("saved.")
        if key.startswith("saved.") and (name not in own or own[name].shape != value.shape):
            raise ValueError(f"load_pretrained: model must have '{name}' of shape {list(value.shape)}")


def _check_features(model: nn.Module, state: dict[str, Any]) -> None:
    modules = dict(model.named_modules())
    for name, entry in state["modules"].items():
        weight = getattr(modules.get(name), "weight", None)
        sizes = sorted((entry["in_features"], entry["out_features"]))
        if not isinstance(weight, torch.Tensor) or (weight.dim() == 2 and sorted(weight.shape) != sizes):
            got = "no such layer" if weight is None else f"shape {list(weight.shape)}"
            raise ValueError(f"load_pretrained: model must have '{name}' with features {sizes}, got {got}")


def _check_layout(name: str, layout: UnitLayout, entry: dict[str, Any], limit: int) -> None:
    found = (layout.kind, layout.factoring, layout.units)
    saved = (entry.get("kind"), entry.get("factoring"), len(entry["ranks"]))
    if found != saved:
        raise ValueError(f"load_pretrained: units of '{name}' must be {saved} as in the checkpoint, got {found}")
    if max(entry["ranks"]) > limit:
        raise ValueError(f"load_pretrained: ranks of '{name}' must be at most {limit}, got {entry['ranks']}")
