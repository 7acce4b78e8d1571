"""Configs hold plain values of their types, whatever collections and numbers they were given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ardlora_ext as ard
from ardlora_ext.config.registry import config_from_dict, config_to_dict

from helpers.models import Attention, bert


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ({"target_modules": {"q_proj", "down"}}, {"target_modules": ("down", "q_proj")}),
        ({"target_modules": ["q_proj"], "exclude_modules": frozenset({"up"})},
         {"target_modules": ("q_proj",), "exclude_modules": ("up",)}),
        ({"modules_to_save": "down"}, {"modules_to_save": ("down",)}),
        ({"r": np.int64(4), "lora_alpha": np.float32(2.5), "seed": np.int8(3)}, {"r": 4, "lora_alpha": 2.5, "seed": 3}),
        ({"lora_alpha": 16}, {"lora_alpha": 16.0}),
        ({"use_rslora": np.bool_(True)}, {"use_rslora": True}),
    ],
)  # fmt: skip
def test_values_are_plain(given: dict[str, Any], held: dict[str, Any], tmp_path: Path) -> None:
    config = ard.LoraConfig(**given)
    assert {name: getattr(config, name) for name in held} == held
    assert all(type(getattr(config, name)) is type(value) for name, value in held.items())
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    model = ard.wrap(Attention(), config)
    ard.save_pretrained(model, tmp_path)
    ard.load_pretrained(Attention(), tmp_path)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (ard.ArdConfig, {"r0": 8.0}, r"ArdConfig: r0 must be a whole number, got 8\.0"),
        (ard.LoraConfig, {"r": "8"}, "LoraConfig: r must be a whole number, got '8'"),
        (ard.LoraConfig, {"r": True}, "LoraConfig: r must be a whole number, got True"),
        (ard.LoraConfig, {"lora_alpha": "8"}, "LoraConfig: lora_alpha must be a number, got '8'"),
        (ard.LoraConfig, {"packed": "no"}, "LoraConfig: packed must be True or False, got 'no'"),
        (ard.LoraConfig, {"target_modules": [1]}, r"LoraConfig: target_modules must be names of modules, got \[1\]"),
        (ard.LoraConfig, {"modules_to_save": 3}, "LoraConfig: modules_to_save must be names of modules, got 3"),
    ],
)
def test_what_cannot_be_is_named(kind: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**given)


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_broken_patterns_name_their_option(option: str) -> None:
    model = Attention()
    with pytest.raises(ValueError, match=rf"wrap: {option} must be .* expression, got '\*_proj': .*'\.\*_proj'"):
        ard.wrap(model, ard.LoraConfig(**{option: "*_proj"}))
    assert ard.adapters(model) == {}


def test_exclusions_that_exclude_nothing_are_said() -> None:
    with pytest.warns(UserWarning, match=r"exclude_modules matches no linear layer by 'q_prj'; near misses: q_proj"):
        ard.wrap(Attention(), ard.LoraConfig(exclude_modules=["q_prj"]))


def test_blocks_without_the_adapter_may_nest() -> None:
    model, batch = bert()
    model.eval()
    plain = model(**batch).logits
    ard.wrap(model, ard.LoraConfig(r=2))
    for layer in ard.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B)
    adapted = model(**batch).logits
    with ard.disable_adapter(model):
        with ard.disable_adapter(model):
            assert torch.equal(model(**batch).logits, plain)
        assert torch.equal(model(**batch).logits, plain)
    assert torch.equal(model(**batch).logits, adapted)
