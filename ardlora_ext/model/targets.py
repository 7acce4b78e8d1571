"""What a config means on a model: which layers get adapters, how these are cut, what else is trained."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ardlora_ext.config import AdapterConfig, ArdConfig
from ardlora_ext.config.patterns import check_expression, in_layers, pattern_key
from ardlora_ext.layers.expert_stacks import Stack, expert_stacks
from ardlora_ext.layers.linear import Conv1D, LoraLinear
from ardlora_ext.model.heads import uncut, unit_layout
from ardlora_ext.model.peft.guard import check_foreign
from ardlora_ext.model.saved_modules import HEADS, heads, inside, with_tied
from ardlora_ext.model.token_rows import plan_tokens
from ardlora_ext.model.unheard import adaptable, is_router, listed, matches, output_head, say_uncovered, why_no_stacks
from ardlora_ext.native.compiled import DTYPE_CODES
from ardlora_ext.native.dispatch import device_rule
from ardlora_ext.native.units import UnitLayout

# PEFT refuses these by their last name: fused kernels of Mamba read the weight itself.
_REFUSED = ("out_proj", "conv1d")
_REFUSING = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def plan_targets(
    model: nn.Module, config: AdapterConfig
) -> tuple[dict[str, nn.Module], dict[str, UnitLayout], tuple[str, ...]]:
    """Return what `wrap` would adapt: modules and layouts by name, and `modules_to_save`. Nothing changes.

    Raises:
        ValueError: as `wrap` does.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ValueError("wrap: model must not be wrapped already; call ardlora_ext.unwrap(model) first")
    check_foreign(model)
    for option in ("target_modules", "exclude_modules"):
        check_expression(f"wrap: {option}", getattr(config, option))
    saved = _modules_to_save(model, config)
    chosen = _select(model, config, saved)
    plan_tokens(model, config, chosen, saved)
    _check_tensors(chosen)
    layouts = {}
    stacks = expert_stacks(model)
    for name, module in chosen.items():
        if (stack := stacks.get(name)) is not None:
            layouts[name] = UnitLayout("experts", "independent", stack.experts, stack.in_features, stack.out_features)
            continue
        sizes = _features(module)
        assert sizes is not None
        layouts[name] = unit_layout(model, name, *sizes, config)
    _check_head_dim(config, layouts)
    _check_budget(config, layouts)
    if whole := uncut(model, layouts, config):
        warnings.warn(
            f"wrap: no head width is stated that divides {listed(whole)}: adapted as whole matrices; pass "
            "head_dim={name: width} to cut them",
            stacklevel=4,
        )
    say_uncovered(model, config, chosen, saved)
    _say_statistics(model, saved)
    return chosen, layouts, saved


def _taken(name: str, config: AdapterConfig) -> bool:
    """Tell whether PEFT's rule for layers_to_transform takes `name`, which `target_modules` has named."""
    targets = config.target_modules
    patterns = config.layers_pattern
    lists = [patterns] if isinstance(patterns, str) else patterns
    exact = targets != "all-linear" and name in targets
    return exact or in_layers(name, config.layers_to_transform, lists)


def _takes(name: str, patterns: str | Sequence[str], stacks: Mapping[str, Stack]) -> bool:
    """Tell whether patterns take a target: a stack of experts also by the name of its module."""
    return matches(name, patterns) or (name in stacks and matches(name.rpartition(".")[0], patterns))


def _features(module: nn.Module) -> tuple[int, int] | None:
    """Return (in_features, out_features) of anything that acts like a linear layer."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int) and not isinstance(module, LoraLinear):
        return (sizes[0], sizes[1]) if min(sizes[0], sizes[1]) > 0 else None
    return None


def _acts_otherwise(module: nn.Module, sizes: tuple[int, int]) -> bool:
    """Tell whether a layer that a model of transformers defines itself gives something else than one [..., out].

    Routers and layers of several groups look like linear ones; what they give is tried out.
    """
    kind = type(module)
    if not kind.__module__.startswith("transformers.models.") or kind.forward is nn.Linear.forward:
        return False
    weight = next(module.parameters(), None)
    if weight is None or not weight.is_floating_point():
        return True
    try:
        with torch.no_grad():
            found = module(weight.new_zeros(1, 2, sizes[0]))
    except Exception:  # it wants other inputs than a linear layer
        return True
    return not isinstance(found, torch.Tensor) or found.shape != (1, 2, sizes[1])


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    otherwise: dict[type, bool] = {}
    inside_mha = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    for name, module in model.named_modules():
        # nn.MultiheadAttention reads out_proj.weight itself and would never call the adapter.
        sizes = _features(module)
        if not name or sizes is None or any(name.startswith(p + ".") or not p for p in inside_mha):
            continue
        if type(module) not in otherwise:
            otherwise[type(module)] = _acts_otherwise(module, sizes)
        if not otherwise[type(module)]:
            yield name, module


def _modules_to_save(model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    names = [name for name, _ in model.named_modules() if name]
    if config.modules_to_save is None:
        return with_tied(model, heads(model))
    saved: list[str] = []
    for pattern in config.modules_to_save:
        found = [n for n in names if matches(n, [pattern])]
        if not found:
            raise ValueError(
                f"wrap: modules_to_save must name modules of the model, got '{pattern}'{_near(pattern, names)}"
            )
        saved += found
    return with_tied(model, saved)


def _say_statistics(model: nn.Module, saved: Sequence[str]) -> None:
    """Warn of normalisations that keep statistics: training moves them, and no adapter file holds them."""
    moving = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        and module.running_mean is not None
        and module.momentum != 0.0
        and not inside(name, saved)
    ]
    if moving:
        warnings.warn(
            f"wrap: running statistics of {listed(moving)} move in training and are in no adapter file; set the "
            "momentum of these layers to 0.0, or name them in modules_to_save",
            stacklevel=4,
        )


def _near(patterns: str | Sequence[str], names: Sequence[str]) -> str:
    leaves = sorted({n.split(".")[-1] for n in names} | set(names))
    asked = [patterns] if isinstance(patterns, str) else patterns
    close = [near for p in asked for near in difflib.get_close_matches(p.split(".")[-1], leaves, n=5, cutoff=0.5)]
    return f"; near misses: {', '.join(dict.fromkeys(close))}" if close else ""


def _select(model: nn.Module, config: AdapterConfig, saved: Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers that `target_modules` names.

    Raises:
        ValueError: there is nothing to adapt; near misses are listed.
    """
    stacks = expert_stacks(model)
    linears = dict(_linears(model)) | adaptable(stacks, config)
    if not linears:
        raise ValueError(f"wrap: model must have linear layers, got {type(model).__name__} without any")
    named = (
        _all_linear(model, linears, stacks)
        if config.target_modules == "all-linear"
        else _by_name(model, linears, stacks, config)
    )
    chosen = {n: m for n, m in named.items() if _taken(n, config)}
    if not chosen:
        raise ValueError(
            f"wrap: layers_to_transform must be numbers of layers, got {config.layers_to_transform} and no layer; "
            f"target_modules takes {listed(list(named))}"
        )
    excluded = config.exclude_modules
    for pattern in [excluded] if isinstance(excluded, str) else excluded:
        if not any(_takes(n, pattern if isinstance(excluded, str) else [pattern], stacks) for n in linears):
            warnings.warn(
                f"wrap: exclude_modules matches no linear layer by {pattern!r}{_near(pattern, list(linears))}",
                stacklevel=5,
            )
    chosen = {
        n: m for n, m in chosen.items() if not inside(n, saved) and not (excluded and _takes(n, excluded, stacks))
    }
    if not chosen:
        raise ValueError(
            "wrap: target_modules must leave something to adapt after exclude_modules and modules_to_save"
            f"{f' ({listed(list(saved))})' if saved else ''}; the linear layers are {listed(list(linears))}"
        )
    _check_chosen(model, config, list(chosen))
    return chosen


def _all_linear(model: nn.Module, linears: dict[str, nn.Module], stacks: Mapping[str, Stack]) -> dict[str, nn.Module]:
    head, left_out = output_head(model), ("lm_head", *HEADS, *_refused(model))
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # tied: heads that are not told
    heads_too = {n for n, m in linears.items() if m is head or id(getattr(m, "weight", None)) in embedded}
    heads_too |= {n for n, m in linears.items() if n not in stacks and is_router(n, m, stacks)}
    chosen = {n: m for n, m in linears.items() if n not in heads_too and n.rpartition(".")[2] not in left_out}
    return chosen or linears  # a model that is nothing but its head


def _by_name(
    model: nn.Module, linears: dict[str, nn.Module], stacks: Mapping[str, Stack], config: AdapterConfig
) -> dict[str, nn.Module]:
    targets = config.target_modules
    patterns: list[str | list[str]] = [targets] if isinstance(targets, str) else [[name] for name in targets]
    unmatched = [p for p in patterns if not any(_takes(n, p, stacks) for n in linears)]
    if unmatched:
        asked = [p if isinstance(p, str) else p[0] for p in unmatched]
        names = ", ".join(sorted({n.split(".")[-1] for n in linears}))
        raise ValueError(
            f"wrap: target_modules must match linear layers, got no match for {', '.join(map(repr, asked))}"
            f"{_other_kinds(model, unmatched) or _near(asked, ['all-linear', *linears])}; "
            f"linear layers are named: {names}{why_no_stacks(stacks, config)}"
        )
    return {n: m for n, m in linears.items() if _takes(n, targets, stacks)}


def _other_kinds(model: nn.Module, patterns: Sequence[str | list[str]]) -> str:
    """Return what a user wants who names layers of other kinds: embeddings, convolutions, attention, norms."""
    for name, module in model.named_modules():
        if not any(matches(name, pattern) for pattern in patterns):
            continue
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding):
            return (
                f": '{name}' is an embedding, which gets no low-rank adapter; train some of its rows by "
                f"trainable_token_indices={{'{leaf}': [...]}}, or all of it by modules_to_save=['{leaf}']"
            )
        if any(True for _ in module.parameters(recurse=False)):
            kind = "convolution" if isinstance(module, nn.modules.conv._ConvNd) else f"{type(module).__name__}"
            return (
                f": '{name}' is a {kind}, which gets no low-rank adapter; train it whole by modules_to_save=['{leaf}']"
            )
    return ""


def _check_chosen(model: nn.Module, config: AdapterConfig, chosen: Sequence[str]) -> None:
    """Check names that PEFT does not adapt, and patterns for the ranks and scales of what is adapted."""
    if refused := [n for n in chosen if n.rpartition(".")[2] in _refused(model)]:
        kind = getattr(getattr(model, "config", None), "model_type", "")
        raise ValueError(
            f"wrap: target_modules must not take '{refused[0]}' of a {kind} model, whose kernels read its weight "
            'themselves, and which PEFT would not load; "all-linear" leaves it out'
        )
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option) or ():
            if not any(pattern_key({pattern: 1.0}, n) for n in chosen):
                raise ValueError(f"wrap: {option} must match a layer, got {pattern!r}{_near(pattern, chosen)}")


def _refused(model: nn.Module) -> tuple[str, ...]:
    """Return the last names that PEFT does not adapt in this model."""
    return _REFUSED if getattr(getattr(model, "config", None), "model_type", None) in _REFUSING else ()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Tell whether this process holds a part of `tensor` only (a DTensor)."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def _check_tensors(chosen: dict[str, nn.Module]) -> None:
    for name, module in chosen.items():
        for tensor in module.parameters(recurse=False):  # of experts, all stacks and biases
            if is_sharded(tensor):
                raise ValueError(
                    f"wrap: parameters must be whole, got '{name}' sharded already (DTensor); wrap first, then call "
                    "ardlora_ext.fully_shard(model)"
                )
            if rule := device_rule(tensor.device):
                raise ValueError(f"wrap: parameters must {rule}, got '{name}' on {tensor.device}")
            if tensor.is_floating_point() and tensor.dtype not in DTYPE_CODES:
                raise ValueError(f"wrap: '{name}' must be float32, bfloat16 or float16, got {tensor.dtype}")


def parameter_range(layouts: dict[str, UnitLayout], max_rank: int, min_rank: int = 1) -> tuple[int, int]:
    """Return the adapter parameters at the smallest rank everywhere and at the largest rank everywhere."""
    floor = sum(lay.parameters([min(min_rank, lay.max_rank)] * lay.units) for lay in layouts.values())
    full = sum(lay.parameters([min(max_rank, lay.max_rank)] * lay.units) for lay in layouts.values())
    return floor, full


def _check_head_dim(config: AdapterConfig, layouts: dict[str, UnitLayout]) -> None:
    """Check that a head width given by hand cuts something: silence would mean whole matrices."""
    if config.granularity != "head" or config.head_dim is None:
        return
    if isinstance(config.head_dim, Mapping):
        for pattern in config.head_dim:
            if not any(matches(name, [pattern]) for name in layouts):
                raise ValueError(f"wrap: head_dim must match a layer, got '{pattern}'{_near(pattern, list(layouts))}")
    elif all(layout.kind == "matrix" for layout in layouts.values()):
        raise ValueError(
            f"wrap: head_dim must match a layer, got {config.head_dim} and no layer with the name of an attention "
            "projection; pass head_dim={name: width} or granularity='matrix'"
        )


def _check_budget(config: AdapterConfig, layouts: dict[str, UnitLayout]) -> None:
    if not isinstance(config, ArdConfig) or config.allowance is None:
        return
    floor, full = parameter_range(layouts, config.max_rank, config.min_rank)
    least = f"rank {config.min_rank} everywhere"
    if floor == 0:  # nothing would be left to train
        floor, least = min(layout.a_width + layout.b_width for layout in layouts.values()), "one component"
    if not floor <= config.allowance <= full:
        raise ValueError(
            f"wrap: budget must be between {floor:,} parameters ({least}) and {full:,} "
            f"(rank {config.max_rank} everywhere), got {config.allowance:,}"
        )
