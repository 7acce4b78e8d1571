"""Put adapters into a model, let them rest, and take them out again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from ardlora_ext import processes
from ardlora_ext.config import AdapterConfig, ArdConfig, DoraConfig, SvdConfig
from ardlora_ext.layers.dora import DoraLinear
from ardlora_ext.layers.expert_stacks import is_transposed
from ardlora_ext.layers.experts import ExpertStack, LoraExperts
from ardlora_ext.layers.linear import Capacity, Gate, LoraLinear
from ardlora_ext.layers.pissa import PissaLinear
from ardlora_ext.layers.start.orthogonal import start_orthogonal
from ardlora_ext.layers.start.svd import start_svd
from ardlora_ext.layers.tokens import TokenRows
from ardlora_ext.model.peft.convert import PeftLoraConfig, own_config
from ardlora_ext.model.peft.guard import guard_from_peft
from ardlora_ext.model.record import (
    ATTRIBUTE,
    Injection,
    Model,
    adapters,
    check_module,
    check_unmerged,
    home,
    injection,
    uncompiled,
)
from ardlora_ext.model.saved_modules import inside
from ardlora_ext.model.targets import plan_targets
from ardlora_ext.model.token_rows import plan_tokens, say_new_rows, token_layers
from ardlora_ext.model.unheard import close_fast_paths, open_fast_paths
from ardlora_ext.native.packing import Readers
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.unbroken import nothing, unbroken, undone_by

_TRAINABLE = "_hf_peft_config_loaded"  # transformers' own mark
RESIZE = "resize_token_embeddings"
SAVE = "save_pretrained"  # both of a transformers model; `wrap` gives it some of its own
GIVEN = (SAVE, RESIZE, "push_to_hub", "create_or_update_model_card", "print_trainable_parameters")


def part_to_wrap(model: nn.Module) -> nn.Module:
    """Return what `wrap` adapts: the model, or the one transformers model inside a larger object that saves its parts.

    Such an object (a SentenceTransformer) calls `save_pretrained` of its parts and loads them from what that wrote.
    """
    check_module("wrap", model)
    model = uncompiled(model)
    if _is_pretrained(model) or not hasattr(model, SAVE):
        return model
    parts = [m for m in model.modules() if _is_pretrained(m)]
    inner = {id(m) for part in parts for m in part.modules() if m is not part}
    outermost = [part for part in parts if id(part) not in inner]
    return outermost[0] if len(outermost) == 1 else model


def _is_pretrained(module: nn.Module) -> bool:
    """Tell whether it is a transformers model; by name, because importing the class takes a second."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__)


def inject(model: Model, config: AdapterConfig | PeftLoraConfig, adapter_name: str = "default") -> Model:
    """Freeze the model and put an adapter on every target, in place: `wrap` but for the model's own `save_pretrained`.

    Raises:
        ValueError: as `wrap` does. The model is unchanged then.
    """
    activate(model, new_record(model, config, adapter_name))
    return model


def new_record(model: nn.Module, config: AdapterConfig | PeftLoraConfig, adapter_name: str) -> Injection:
    """Return an adapter for `activate`; the model does not change, and knows nothing of it yet.

    Raises:
        ValueError: as `wrap` does.
    """
    config = own_config("wrap", config, model)
    guard_from_peft()
    chosen, layouts, saved = plan_targets(model, config)
    capacity = _capacity(config)
    generator = torch.Generator().manual_seed(config.seed)
    layers = [_adapter(name, module, layouts[name], config, capacity, generator) for name, module in chosen.items()]
    _join_stacks(layers)
    if config.packed:
        _pack(dict(zip(chosen, layers, strict=True)))
    plans = plan_tokens(model, config, chosen, saved)
    say_new_rows(model, plans, saved)
    tokens = token_layers(model, plans, config)
    record = Injection(config, {}, {}, saved, layers, tokens, {})
    record.values = _saved_values(model, record)
    record.named[adapter_name] = record
    return record


def _join_stacks(layers: Sequence[LoraLinear]) -> None:
    """Give the adapters of one experts module their common owner."""
    groups: dict[int, list[ExpertStack]] = {}
    for layer in layers:
        if isinstance(layer, ExpertStack):
            groups.setdefault(id(layer.base_layer), []).append(layer)
    for stacks in groups.values():
        LoraExperts(stacks[0].base_layer, stacks)  # each stack knows it


def _pack(layers: Mapping[str, LoraLinear]) -> None:
    """Tell layers with the same parent and input size of each other: they may read the same tensor."""
    groups: dict[tuple[str, int], Readers] = {}
    for name, layer in layers.items():
        layer.readers = groups.setdefault((name.rpartition(".")[0], layer.layout.in_features), Readers())


def activate(model: nn.Module, record: Injection, then: Callable[[], None] = nothing) -> None:
    """Put the adapter of `record` into a model that has none in it, all or nothing; call `then` in the same piece."""
    for layer in record.layers:
        _follow(layer, layer.lora_A)
    for rows in record.tokens.values():
        _follow(rows, rows.token_rows)
    for name, parameter in model.named_parameters():
        if _trains(record, name) and not parameter.is_floating_point():
            raise ValueError(
                f"wrap: modules_to_save must be of floating-point numbers, got {parameter.dtype} in '{name}'"
            )
    own = _saved_values(model, record)
    with unbroken():
        _put_in(model, record, own)
        then()


def rest(op: str, model: nn.Module, then: Callable[[], None] = nothing) -> Injection:
    """Take the active adapter out for `op`: the model is the plain base, until `activate` puts one in again.

    All or nothing; `then` is called in the same piece.
    """
    record = injection(model)
    for name, layer in adapters(model).items():
        check_unmerged(op, name, layer)
    learned = _saved_values(model, record)
    with unbroken():
        _take_out(model, record, learned)
        then()
    return record


def as_before(model: nn.Module, first: Callable[[], None] = nothing) -> undone_by:
    """Bring back the adapter that is in the model now, and call `first` before, if the `with` block is not kept."""
    record, own = injection(model), injection(model).values

    def back() -> None:
        first()
        now = getattr(model, ATTRIBUTE, None)
        if now is not None and now is not record:
            _take_out(model, now, now.values)
        if now is not record:
            _put_in(model, record, own)

    return undone_by(back)


def withdraw(model: nn.Module) -> None:
    """Take out an adapter that is not to stay, and what it brought for `modules_to_save`; this allocates nothing."""
    record = injection(model)
    _take_out(model, record, record.values)


def _parts(record: Injection) -> tuple[LoraLinear | TokenRows, ...]:
    return (*record.layers, *record.tokens.values())


def _trains(record: Injection, name: str) -> bool:
    """Tell whether a parameter of the base trains while an adapter is in the model."""
    return record.trains.get(name, inside(name.rpartition(".")[0], record.modules_to_save))


def _put_in(model: nn.Module, record: Injection, own: dict[str, torch.Tensor]) -> None:
    """Assign what `activate` has made: `own` are copies of what is in `modules_to_save` now."""
    record.requires_grad = _flags(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_trains(record, name))
    _write_values(model, record)
    record.values = own
    for layer in record.layers:
        layer.replacement.train(layer.base_layer.training)
    replace_modules(model, {id(layer.base_layer): replacement(layer) for layer in _parts(record)})
    close_fast_paths(model)
    setattr(model, ATTRIBUTE, record)
    _tell_transformers(model, True)


def _take_out(model: nn.Module, record: Injection, learned: dict[str, torch.Tensor] | None) -> None:
    """Take the adapter of `record` out; `learned` are copies of what it has in `modules_to_save`, None: that stays."""
    replace_modules(model, {id(replacement(layer)): layer.base_layer for layer in _parts(record)})
    record.trains = _flags(model)
    open_fast_paths(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.requires_grad.get(name, True))
    if learned is not None:
        _write_values(model, record)
        record.values = learned
    vars(model).pop(ATTRIBUTE, None)
    _tell_transformers(model, False)


def _saved_values(model: nn.Module, record: Injection) -> dict[str, torch.Tensor]:
    """Return copies of what is in `modules_to_save` now."""
    state = {f"{n}.{k}": v for n in record.modules_to_save for k, v in model.get_submodule(n).state_dict().items()}
    return {name: value.detach().clone() for name, value in state.items()}


@torch.no_grad()
def _write_values(model: nn.Module, record: Injection) -> None:
    """Write what the record keeps into `modules_to_save`; parameters stay the same objects."""
    for name in record.modules_to_save:
        for key, value in model.get_submodule(name).state_dict(keep_vars=True).items():
            value.copy_(record.values[f"{name}.{key}"])


def replacement(layer: LoraLinear | TokenRows) -> nn.Module:
    """Return what stands in the place of the layer's base."""
    return layer.replacement if isinstance(layer, LoraLinear) else layer


def replace_modules(model: nn.Module, replacement: Mapping[int, nn.Module]) -> None:
    """Put new modules where the old ones stand, by id; every place of a module used twice."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if id(child) in replacement:
                setattr(parent, key, replacement[id(child)])


def _capacity(config: AdapterConfig) -> Capacity:
    """Decide `auto`.

    Raises:
        ValueError: it would be `fixed` and ranks have no bound.
    """
    if config.capacity != "auto":
        return config.capacity
    count = processes.size()
    if count == 1:
        return "elastic"
    if config.max_rank == sys.maxsize:
        raise ValueError(
            f"wrap: r_max of {type(config).__name__} must be given with {count} processes, where factors have "
            "room for the largest rank from the start (capacity='auto' is 'fixed'), got None"
        )
    return "fixed"


def _adapter(
    name: str,
    module: nn.Module,
    layout: UnitLayout,
    config: AdapterConfig,
    capacity: Capacity,
    generator: torch.Generator,
) -> LoraLinear:
    parameter = name.rpartition(".")[2] if layout.kind == "experts" else "weight"
    weight = getattr(module, parameter, None)
    auto = config.adapter_dtype == "auto" and isinstance(weight, torch.Tensor) and weight.is_floating_point()
    kind: Callable[..., LoraLinear]
    kind = DoraLinear if isinstance(config, DoraConfig) else PissaLinear if config.init == "pissa" else LoraLinear
    if layout.kind == "experts":
        kind = partial(ExpertStack, parameter=parameter, transposed=is_transposed(module, parameter))
    layer = kind(
        module,
        layout,
        config.start_rank(name),
        config.scaling(name),
        max_rank=config.limit(name),
        capacity=capacity,
        lora_dropout=config.lora_dropout,
        gate=_gate(config),
        dtype=weight.dtype if auto and isinstance(weight, torch.Tensor) else torch.float32,
        generator=generator,
    )
    if isinstance(config, SvdConfig):
        start_svd(layer, config.start == "orthonormal", generator)
    if config.init == "orthogonal":
        start_orthogonal(layer, generator)
    _follow(layer, layer.lora_A)
    return layer


def _gate(config: AdapterConfig) -> Gate:
    if isinstance(config, ArdConfig):
        return "controlled" if config.mode == "paper" else "none"
    return "trained" if isinstance(config, SvdConfig) else "none"


def _follow(layer: LoraLinear | TokenRows, own: torch.Tensor) -> None:
    """Bring an adapter, which may have rested, to the device of its base layer."""
    base = layer.base_layer
    device = next((t.device for t in (*base.parameters(), *base.buffers())), own.device)
    if own.device != device:
        layer.to(device)


def _flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def _tell_transformers(model: nn.Module, attached: bool) -> None:
    """Tell quantised models of transformers that they have trainable adapters: Trainer takes no others."""
    for module in model.modules():
        if getattr(module, "is_quantized", False) is True:
            if attached:
                setattr(module, _TRAINABLE, True)
            else:
                vars(module).pop(_TRAINABLE, None)


def detach(record: Injection) -> None:
    """Take the hooks of one adapter off its optimizer and its parameters."""
    for hooked in (record.controller, record.sync):
        if hooked is not None:
            hooked.detach()


def remove(model: Model) -> Model:
    """Take the adapters of all names out for good."""
    part = home(model)
    with unbroken():
        for record in injection(part).named.values():
            detach(record)
        _take_out(part, injection(part), None)
        for name in GIVEN:
            vars(part).pop(name, None)
    return model


def unwrap(model: Model) -> Model:
    """Take the adapters out, in place: the base layers and their `requires_grad` flags are back as before `wrap`.

    `modules_to_save` keep what they learned under the active adapter.
    """
    injection(model)
    for name, layer in adapters(model).items():
        check_unmerged("unwrap", name, layer)
    return remove(model)
