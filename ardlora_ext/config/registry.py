"""The methods by name: what a command line, a checkpoint and a config file call the config classes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from ardlora_ext.config import AdaConfig, AdapterConfig, ArdConfig, DoraConfig, ElaConfig, LoraConfig

Method = Literal["ard", "elalora", "adalora", "lora", "dora"]
METHODS: tuple[Method, ...] = get_args(Method)

_CONFIGS: dict[str, type[AdapterConfig]] = {
    "ard": ArdConfig,
    "elalora": ElaConfig,
    "adalora": AdaConfig,
    "lora": LoraConfig,
    "dora": DoraConfig,
}


_TITLES = {"ard": "ARD-LoRA", "elalora": "ElaLoRA", "adalora": "AdaLoRA", "lora": "LoRA", "dora": "DoRA"}


def method_of(config: AdapterConfig) -> str:
    """Return the method's name for programs."""
    return next(name for name, cls in _CONFIGS.items() if cls is type(config))


def title_of(method: str) -> str:
    """Return a method's name for people; one that is not known is returned as it is."""
    return _TITLES.get(method, method)


def name_of(config: AdapterConfig) -> str:
    """Return the method's name for people."""
    return title_of(method_of(config))


def has_option(method: Method, name: str) -> bool:
    """Tell whether a method's config has a field of this name."""
    return name in {entry.name for entry in dataclasses.fields(_CONFIGS[method])}


def config_for(method: Method, r: int, options: Mapping[str, Any]) -> AdapterConfig:
    """Return the config of a method at its own defaults, but for `options`.

    Args:
        method: its name.
        r: rank of every unit at the start; of AdaLoRA at the end, it starts at 1.5 times that, as in PEFT.
        options: fields of the config by name; None stands for the method's default.

    Raises:
        ValueError: the method has no such option, or a value is out of range.
    """
    kind = _CONFIGS[method]
    ranks: dict[str, Any] = {"ard": {"r0": r}, "adalora": {"target_r": r, "init_r": math.ceil(1.5 * r)}}.get(
        method, {"r": r}
    )
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if not has_option(method, name):
            others = [other for other in METHODS if has_option(other, name)]
            raise ValueError(f"{name} must come with method {' or '.join(others)}, got {method}")
    return kind(**ranks, **given)


def config_to_dict(config: AdapterConfig) -> dict[str, Any]:
    """Return the JSON form of a config: its fields and `method`."""
    values = dataclasses.asdict(config)
    for option in ("rank_pattern", "alpha_pattern"):  # the first that fits counts, and objects in JSON have no order
        values[option] = None if values[option] is None else [list(pair) for pair in values[option].items()]
    return {"method": method_of(config), **values}


def config_from_dict(values: Mapping[str, Any]) -> AdapterConfig:
    """Rebuild a config from `config_to_dict`; raises ValueError on an unknown method or field."""
    fields = dict(values)
    method = fields.pop("method", None)
    if method not in _CONFIGS:
        raise ValueError(f"config: method must be one of {', '.join(_CONFIGS)}, got {method!r}")
    if method == "ard":
        fields.setdefault("mode", "paper")  # files from before there was another
    for entry in dataclasses.fields(_CONFIGS[method]):
        _check_kind(entry, fields.get(entry.name, entry.default))
    try:
        return _CONFIGS[method](**fields)
    except TypeError as cause:
        raise ValueError(f"config: fields must be those of {_CONFIGS[method].__name__} ({cause})") from cause


def _check_kind(entry: dataclasses.Field[Any], value: object) -> None:
    """Check that a number from a file is one where the field's default is; ValueError otherwise."""
    kinds = {bool: (bool,), int: (int,), float: (int, float)}.get(type(entry.default))
    if kinds is None or value is None:
        return
    number = isinstance(value, kinds) and (isinstance(value, bool) == (kinds == (bool,)))
    if not number or not -(2**63) <= value < 2**63:  # type: ignore[operator]
        raise ValueError(f"config: {entry.name} must be of type {type(entry.default).__name__}, got {value!r:.60}")
