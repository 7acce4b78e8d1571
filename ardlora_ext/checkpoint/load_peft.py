"""Go on with an adapter that PEFT trained: the same function, now with ranks that can move."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ardlora_ext.checkpoint.adapter_state import stack_place
from ardlora_ext.checkpoint.peft_read import PeftAdapter, read_peft
from ardlora_ext.checkpoint.peft_write import PEFT_ROWS, stack_prefixes, truncated, unpack_stack
from ardlora_ext.checkpoint.wrap import or_unwrapped, wrap
from ardlora_ext.config import AdapterConfig, ArdConfig, DoraConfig
from ardlora_ext.errors import written_by_strangers
from ardlora_ext.layers.dora import DoraLinear
from ardlora_ext.layers.expert_stacks import expert_stacks
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.inject import part_to_wrap
from ardlora_ext.model.peft.convert import PeftLoraConfig, own_config
from ardlora_ext.model.record import Model, adapters, injection
from ardlora_ext.model.targets import plan_targets
from ardlora_ext.model.token_rows import own_rows
from ardlora_ext.model.unheard import matches
from ardlora_ext.native import reference
from ardlora_ext.ranks.controllers import make_controller
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate, apply

# Options of PEFT that change what an adapter computes, and that nothing here computes.
_UNKNOWN = (
    "lora_bias",
    "use_qalora",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
)
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # these starts subtract something from the base weights


def load_peft(model: Model, directory: str | Path, config: AdapterConfig | PeftLoraConfig) -> Model:
    """Wrap a base model with the adapter of a PEFT LoRA checkpoint, in place, to go on training it by any method.

    The function is PEFT's: scales (patterns, rsLoRA) are folded into lora_B, every unit of a module starts with the
    module's rank and may then grow or shrink as `config` says. `modules_to_save` are taken over.

    Args:
        model: the base model, not wrapped.
        directory: what PEFT's `save_pretrained` wrote.
        config: the method to go on with. Modules of the checkpoint are always adapted, and with them those that
            `target_modules` names, unless it is the default. `init` plays no part.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: there is no PEFT checkpoint.
        ValueError: the adapter does not fit the model or the config, or holds what cannot be continued: embeddings,
            convolutions, biases, DoRA without `DoraConfig`. The model is unchanged then.

    Example:
        model = ard.load_peft(base, "peft-adapter/", ard.ArdConfig(r0=8))
    """
    part = part_to_wrap(model)
    config = own_config("load_peft", config, part)
    adapter = read_peft(Path(directory), "load_peft")
    with written_by_strangers("load_peft: adapter_config.json must be one of PEFT's LoRA"):
        _check_options(adapter, config)
        adapter = _with_stacks(part, adapter)
        saved = _saved_modules(part, adapter)
        _check_others(part, adapter, saved)
        rows = _token_rows(adapter, config)
    names = [*(() if config.modules_to_save is None else config.modules_to_save), *saved]
    config = dataclasses.replace(
        config,
        init="default",
        trainable_token_indices={name: indices for name, (indices, _) in rows.items()}
        or config.trainable_token_indices,
        target_modules=_targets(adapter.factors, config),
        modules_to_save=tuple(dict.fromkeys(names)) if names else config.modules_to_save,
    )
    _check_layers(part, adapter, config)
    values = {key: value for key, value in adapter.others.items() if _inside(key, saved)}
    with or_unwrapped(part):
        wrap(part, config)
        _take_over(part, adapter)
        _fill_rows(part, {name: values for name, (_, values) in rows.items()})
        part.load_state_dict(values, strict=False)
    return model


def _check_options(adapter: PeftAdapter, config: AdapterConfig) -> None:
    """Check that the adapter computes what this package can, and that `config` can start there."""
    options = adapter.config
    for name in _UNKNOWN:
        if options.get(name):
            raise ValueError(f"load_peft: adapter must be plain LoRA, got {name}={options[name]!r:.60}")
    if options.get("bias", "none") != "none":
        raise ValueError(
            f"load_peft: adapter must have bias='none', got {options['bias']!r}: merge it with PEFT instead"
        )
    start = options.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGED_BASE):
        raise ValueError(
            f"load_peft: adapter must belong to the original base weights, got init_lora_weights={start!r}; save it "
            "with PEFT's path_initial_model_for_weight_conversion first"
        )
    if options.get("use_dora") and not isinstance(config, DoraConfig):
        raise ValueError(f"load_peft: config must be DoraConfig for a DoRA adapter, got {type(config).__name__}")
    if isinstance(config, ArdConfig) and config.gate not in ("ramp", "ste"):
        raise ValueError(f"load_peft: gate must be 'ramp' or 'ste', which start fully open, got {config.gate!r}")


def _with_stacks(model: nn.Module, adapter: PeftAdapter) -> PeftAdapter:
    """Return the adapter with its stacks of experts among the factors, [experts, r, in] and [experts, out, r].

    PEFT before 0.19 took the outputs of [experts, out, in] for inputs; the sizes tell.
    """
    targets = list(adapter.config.get("target_parameters") or ())
    found = {n: s for n, s in expert_stacks(model).items() if any(f".{n}".endswith(f".{t}") for t in targets)}
    places = {n: stack_place(s.module, s.parameter, s.transposed) for n, s in found.items()}
    prefixes = stack_prefixes(places)
    strange = sorted(adapter.stacks.keys() ^ set(prefixes.values()))
    if strange or (targets and not found):
        raise ValueError(
            f"load_peft: model must have the stacks of experts of target_parameters, got {strange[:1] or targets[:1]}"
        )
    factors = dict(adapter.factors)
    for name, prefix in prefixes.items():
        (a, b), stack = adapter.stacks[prefix], found[name]
        if len(a) != stack.experts * adapter.rank(name):
            raise ValueError(
                f"load_peft: lora_A of '{name}' must have {stack.experts} experts times rank {adapter.rank(name)} "
                f"rows, got {len(a)}"
            )
        sizes, own = (a.shape[1], b.shape[0]), (stack.in_features, stack.out_features)
        exchanged = places[name].exchanged if own[0] == own[1] else sizes == own[::-1]
        factors[name] = unpack_stack(a, b, stack.experts, exchanged)
    return dataclasses.replace(adapter, factors=factors, stacks={})


def _saved_modules(model: nn.Module, adapter: PeftAdapter) -> list[str]:
    """Return the modules that the checkpoint holds whole."""
    entries = adapter.config.get("modules_to_save") or []
    names = [name for name, _ in model.named_modules() if name and matches(name, list(entries))]
    return [name for name in names if any(key.startswith(name + ".") for key in adapter.others)]


def _inside(key: str, modules: Iterable[str]) -> bool:
    return any(key.startswith(module + ".") for module in modules)


def _check_others(model: nn.Module, adapter: PeftAdapter, saved: list[str]) -> None:
    """Check that every tensor besides the factors has a place."""
    own = model.state_dict()
    embedded = [key.partition(".lora_embedding")[0] for key in adapter.others if ".lora_embedding" in key]
    if embedded:
        raise ValueError(
            f"load_peft: adapter must be on linear layers only, got the embedding '{embedded[0]}': merge it with PEFT"
        )
    for key, value in adapter.others.items():
        if key.endswith(PEFT_ROWS) or (key.endswith(".lora_magnitude_vector") and adapter.config.get("use_dora")):
            continue
        if key not in own or own[key].shape != value.shape:
            raise ValueError(f"load_peft: model must have '{key}' of shape {list(value.shape)}, as the adapter does")
        if own[key].is_floating_point() != value.is_floating_point():
            raise ValueError(f"load_peft: '{key}' must be {own[key].dtype} as in the model, got {value.dtype}")
        if not _inside(key, saved) and not torch.equal(own[key], value.to(own[key].dtype)):
            raise ValueError(
                f"load_peft: '{key}' of the adapter must be that of the model or in modules_to_save, got other values; "
                "load them into the base model first"
            )


def _token_rows(adapter: PeftAdapter, config: AdapterConfig) -> dict[str, tuple[tuple[int, ...], torch.Tensor]]:
    """Return the trained rows of embeddings in the checkpoint, (their numbers, [rows, width]) by name."""
    asked = adapter.config.get("trainable_token_indices")
    found: dict[str, tuple[tuple[int, ...], torch.Tensor]] = {}
    for key, value in adapter.others.items():
        if not key.endswith(PEFT_ROWS):
            continue
        name = key.removesuffix(PEFT_ROWS)
        indices = asked
        if isinstance(asked, dict):
            indices = next((numbers for end, numbers in asked.items() if name.endswith(end)), None)
        if not isinstance(indices, list) or value.dim() != 2 or len(value) != len(indices):
            raise ValueError(
                f"load_peft: rows of '{name}' must be as many as its trainable_token_indices, got {list(value.shape)} "
                f"for {indices!r:.60}"
            )
        found[name] = tuple(indices), value
    if asked and not found:
        raise ValueError("load_peft: adapter must hold the rows of its trainable_token_indices, got none")
    if found and config.trainable_token_indices is not None:
        raise ValueError("load_peft: trainable_token_indices must be left to the adapter, which has its own")
    return found


@torch.no_grad()
def _fill_rows(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    tokens = own_rows(injection(model).tokens)
    for name, rows in values.items():
        if name not in tokens or tokens[name].token_rows.shape != rows.shape:
            raise ValueError(f"load_peft: model must have an embedding '{name}' with rows of {rows.shape[1]}")
        tokens[name].token_rows.copy_(rows)


def _targets(names: Iterable[str], config: AdapterConfig) -> str:
    """Return one regular expression for the modules of the checkpoint and those that the config adds."""
    patterns = [re.escape(name) for name in names]
    if isinstance(config.target_modules, str):
        patterns += [] if config.target_modules == "all-linear" else [f"(?:{config.target_modules})"]
    else:
        patterns += [rf"(?:.*\.)?{re.escape(name)}" for name in config.target_modules]
    return "|".join(patterns)


def _check_layers(model: nn.Module, adapter: PeftAdapter, config: AdapterConfig) -> None:
    """Check that every module of the checkpoint will be wrapped and has room for it."""
    modules = dict(model.named_modules()).keys() | expert_stacks(model).keys()
    missing = [name for name in adapter.factors if name not in modules]
    layouts = {} if missing else plan_targets(model, config)[1]
    for name, (a, b) in adapter.factors.items():
        lay = layouts.get(name)
        if lay is None:
            name = missing[0] if missing else name
            raise ValueError(f"load_peft: model must have the linear layer '{name}', and config must not exclude it")
        if (a.shape[-1], b.shape[-2]) != (lay.in_features, lay.out_features):
            raise ValueError(
                f"load_peft: '{name}' must have {a.shape[-1]} inputs and {b.shape[-2]} outputs, got "
                f"{lay.in_features} and {lay.out_features}"
            )
        magnitude = adapter.others.get(f"{name}.lora_magnitude_vector")
        if magnitude is not None and magnitude.numel() != lay.out_features:
            raise ValueError(
                f"load_peft: lora_magnitude_vector of '{name}' must have {lay.out_features} entries, got "
                f"{magnitude.numel()}"
            )
        limit, r = min(config.limit(name), lay.max_rank), a.shape[-2]
        if min(r, lay.max_rank if lay.units == 1 else r) > limit:  # a small matrix has no more than its size
            cure = "granularity='matrix'" if limit == lay.max_rank else "a config with a larger rank limit"
            raise ValueError(f"load_peft: rank of '{name}' must be at most {limit} per unit, got {r}; use {cure}")


@torch.no_grad()
def _take_over(model: nn.Module, adapter: PeftAdapter) -> None:
    """Give every layer of the checkpoint its rank and values."""
    layers = {name: layer for name, layer in adapters(model).items() if name in adapter.factors}
    update = {}
    for name, layer in layers.items():
        r = _factors(adapter, layer, name)[0].shape[-2]
        update[name] = tuple(UnitUpdate(tuple(range(min(r, now))), max(r - now, 0)) for now in layer.ranks)
    apply(model, RankUpdate(update))
    for name, layer in layers.items():
        a, b = _factors(adapter, layer, name)
        _fill(layer, a, b.mT * (adapter.scale(name) / layer.scaling))
        if isinstance(layer, DoraLinear):
            magnitude = adapter.others.get(f"{name}.lora_magnitude_vector")
            layer.lora_magnitude_vector.copy_(layer.weight_norm() if magnitude is None else magnitude.flatten())
    record = injection(model)
    if isinstance(record.config, ArdConfig):
        controller = make_controller(model, record.config, None)
        controller.begin_anew()
        record.controller_state = {**controller.state_dict(), "total_steps": None}  # attach tells


def _factors(adapter: PeftAdapter, layer: LoraLinear, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [r, in_features] and B [out_features, r], brought down to the rank that the matrix can have."""
    a, b = (factor.float() for factor in adapter.factors[name])
    if layer.layout.units == 1 and len(a) > layer.layout.max_rank:
        a, b, _ = truncated(a, b, layer.layout.max_rank)
    return a, b


def _fill(layer: LoraLinear, a: torch.Tensor, b: torch.Tensor) -> None:
    """Write A [r, in_features] and rank-major B [r, out_features] into the units of a layer of rank r.

    Of experts [experts, r, .], each its own.
    """
    r = a.shape[-2]
    slices = reference.unit_slices(layer.layout, layer.ranks)
    for u, (a_rows, b_rows, in_cols, out_cols) in enumerate(slices):
        mine = (a[u], b[u]) if layer.layout.kind == "experts" else (a[:, in_cols], b[:, out_cols])
        if layer.lora_E is not None:
            left, values, right = _svd(*mine)
            layer.lora_E[u * r : (u + 1) * r, 0] = values
            mine = right, left
        layer.lora_A[a_rows], layer.lora_B[b_rows] = (rows.to(layer.lora_A.dtype) for rows in mine)
    if layer.lora_gate is not None:
        layer.lora_gate[: sum(layer.ranks)] = 1.0


def _svd(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (P^T [r, n], lambda [r], Q [r, k]) with P diag(lambda) Q = b^T a and orthonormal rows of P^T and Q."""
    (qa, ra), (qb, rb) = (torch.linalg.qr(rows.double().T) for rows in (a, b))
    u, values, vh = torch.linalg.svd(rb @ ra.T)
    return (qb @ u).T, values, vh @ qa.T
