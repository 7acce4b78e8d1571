"""Configs: what they refuse, and their form in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

import ardlora_ext as ard
from ardlora_ext.config import AdapterConfig
from ardlora_ext.config.registry import config_from_dict, config_to_dict

from helpers.adapters import scramble
from helpers.models import Attention


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (ard.LoraConfig, {"r": 0}, "LoraConfig: r must be >= 1, got 0"),
        (ard.LoraConfig, {"lora_alpha": 0.0}, "lora_alpha must be > 0, got 0.0"),
        (ard.LoraConfig, {"lora_alpha": float("nan")}, "lora_alpha must be > 0, got nan"),
        (ard.LoraConfig, {"target_modules": []}, "target_modules must name something, got nothing"),
        (ard.LoraConfig, {"granularity": "row"}, "granularity must be one of 'head', 'matrix', 'layer', got 'row'"),
        (ard.LoraConfig, {"factoring": "qr"}, "factoring must be one of 'shared', 'independent', got 'qr'"),
        (ard.LoraConfig, {"capacity": "big"}, "capacity must be one of 'auto', 'elastic', 'fixed', got 'big'"),
        (ard.LoraConfig, {"adapter_dtype": "half"}, "adapter_dtype must be one of 'float32', 'auto', got 'half'"),
        (ard.ArdConfig, {"r0": 0}, "ArdConfig: r0 must be >= 1, got 0"),
        (ard.ArdConfig, {"r0": 4, "r_max": 3}, "r_max must be >= r0, got 3"),
        (ard.ArdConfig, {"budget": 10, "l1": 1.0}, "budget and l1 must not both be given"),
        (ard.ArdConfig, {"budget": 0}, "budget must be >= 1 or 'auto', got 0"),
        (ard.ArdConfig, {"l1": -1.0}, r"l1 must be >= 0, got -1\.0"),
        (ard.ArdConfig, {"tv": -1.0}, r"tv must be >= 0, got -1\.0"),
        (ard.ArdConfig, {"slope": "chord"}, "slope must be one of 'secant', 'tangent', got 'chord'"),
        (ard.ArdConfig, {"lr_alpha": 0.0}, r"lr_alpha must be > 0, got 0\.0"),
        (ard.ArdConfig, {"lr_price": 0.0}, r"lr_price must be > 0, got 0\.0"),
        (ard.ArdConfig, {"warmup_ratio": 0.8}, r"warmup_ratio \+ harden_ratio \+ freeze_ratio must be < 1"),
        (ard.ArdConfig, {"total_steps": 0}, "total_steps must be >= 1, got 0"),
        (ard.ArdConfig, {"update_interval": 0}, "update_interval must be >= 1, got 0"),
        (ard.ArdConfig, {"gate_floor": 1.0}, r"gate_floor must be in \(0, 1\), got 1\.0"),
        (ard.ArdConfig, {"hysteresis": -0.1}, r"hysteresis must be >= 0, got -0\.1"),
    ],
)
def test_impossible_configs(cls: type[AdapterConfig], options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


@pytest.mark.parametrize(
    ("cls", "name", "hint"),
    [
        (ard.ArdConfig, "r", "near misses: r0, r_max, r_min"),
        (ard.AdaConfig, "r", ".*target_r.*"),
        (ard.LoraConfig, "dropout", "near misses: lora_dropout"),
        (ard.LoraConfig, "colour", r"see help\(LoraConfig\)"),
    ],
)
def test_unknown_options(cls: type[AdapterConfig], name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__}: options must be those of the method, got '{name}'; {hint}"):
        cls(**{name: 1})


@pytest.mark.parametrize(
    "config",
    [
        ard.LoraConfig(r=4, use_rslora=True),
        ard.ArdConfig(mode="paper", granularity="head", r0=3, l1=0.1, head_dim={"up": ("in", 8)}),
    ],
)
def test_configs_survive_json(config: AdapterConfig) -> None:
    values = config_to_dict(config)
    assert config_from_dict(values) == config
    with pytest.raises(ValueError, match="method must be one of"):
        config_from_dict({**values, "method": "other"})
    with pytest.raises(ValueError, match=r"fields must be those of .* 'colour'"):
        config_from_dict({**values, "colour": 1})


@pytest.mark.parametrize(("rslora", "expected"), [(False, 16 / 4), (True, 16 / 4**0.5)])
def test_scaling_is_fixed_by_the_initial_rank(rslora: bool, expected: float) -> None:
    for config in (
        ard.LoraConfig(r=4, lora_alpha=16, use_rslora=rslora),
        ard.ArdConfig(mode="paper", granularity="head", r0=4, lora_alpha=16, use_rslora=rslora),
    ):
        model = ard.wrap(Attention(), config)
        scramble(model)
        assert {layer.scaling for layer in ard.adapters(model).values()} == {expected}
