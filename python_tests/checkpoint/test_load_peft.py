"""An adapter that PEFT trained goes on here: same logits, then ranks that move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim import AdamW

import ardlora_ext as ard
from ardlora_ext.config import AdapterConfig

from helpers.adapters import fingerprint
from helpers.models import trainable
from helpers.peft_adapters import assert_same, base, logits, trained_by_peft

# PEFT asks transformers 5 for a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

METHODS: dict[str, AdapterConfig] = {
    "lora": ard.LoraConfig(r=6),
    "ard, heads": ard.ArdConfig(mode="paper", granularity="head", r0=2),
    "ard, own factors": ard.ArdConfig(mode="paper", r0=4, factoring="independent", granularity="head"),
    "ard, matrices, in bf16-like scale": ard.ArdConfig(mode="paper", r0=3, lora_alpha=7.0, granularity="matrix"),
    "elalora": ard.ElaConfig(r=4, total_steps=20, deltaT=2),
    "adalora": ard.AdaConfig(init_r=8, target_r=2, total_steps=20),
    "dora": ard.DoraConfig(r=6),
}


PATTERNS: dict[str, Any] = {
    "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "v_proj": 5},
    "alpha_pattern": {"v_proj": 3, r".*layers\.1\.mlp\.down_proj": 11},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", PATTERNS),
        ("llama", {"use_rslora": True, **PATTERNS}),
        ("bert", {"modules_to_save": ["classifier"]}),
        ("gpt2", {"use_rslora": True}),
        ("vit", {}),
    ],
)
@pytest.mark.parametrize("method", ["lora", "ard, heads"])
def test_logits_are_those_of_peft(name: str, options: dict[str, Any], method: str, tmp_path: Path) -> None:
    expected, batch = trained_by_peft(tmp_path, name, **options)
    plain = logits(base(name)[0], batch)
    model = base(name)[0]
    assert ard.load_peft(model, tmp_path, METHODS[method]) is model
    assert (expected - plain).abs().max() > 0.01 * plain.abs().max(), "the adapter does something"
    assert_same(logits(model, batch), expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_from_there(method: str, tmp_path: Path) -> None:
    expected, batch = trained_by_peft(tmp_path, "llama", **PATTERNS)
    model = ard.load_peft(base("llama")[0], tmp_path, METHODS[method])
    assert_same(logits(model, batch), expected)
    before = {name: list(layer.ranks) for name, layer in ard.adapters(model).items()}
    assert {r for units in before.values() for r in units} == {2, 4, 5}
    optimizer = AdamW(trainable(model), lr=1e-2)
    controller = ard.attach(model, optimizer, total_steps=20)
    assert controller.step == 0
    assert controller.ranks() == before
    assert_same(logits(model, batch), expected)
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    ard.save_pretrained(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(base("llama")[0], tmp_path / "again").eval()
    assert_same(logits(again, batch), logits(model.eval(), batch))


def test_ranks_grow_past_those_of_peft(tmp_path: Path) -> None:
    _, batch = trained_by_peft(tmp_path, "llama", r=2, lora_alpha=2)
    config = ard.ArdConfig(mode="paper", r0=2, l1=0.0, tv=0.0, update_interval=1, lr_alpha=0.2, granularity="matrix")
    model = ard.load_peft(base("llama")[0], tmp_path, config)
    optimizer = AdamW(trainable(model), lr=1e-2)
    controller = ard.attach(model, optimizer, total_steps=30)
    for _ in range(30):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert max(r for units in controller.ranks().values() for r in units) > 3


def test_targets_of_the_config_are_added(tmp_path: Path) -> None:
    expected, batch = trained_by_peft(tmp_path, "llama", target_modules=["q_proj"])
    for more, names in (
        ("all-linear", {"q_proj"}),
        (["k_proj"], {"q_proj", "k_proj"}),
        (r".*\.up_proj", {"q_proj", "up_proj"}),
    ):
        model = ard.load_peft(base("llama")[0], tmp_path, ard.LoraConfig(r=4, target_modules=more))
        assert {name.split(".")[-1] for name in ard.adapters(model)} == names
        assert_same(logits(model, batch), expected)


def test_dora(tmp_path: Path) -> None:
    expected, batch = trained_by_peft(tmp_path, "llama", use_dora=True)
    model = base("llama")[0]
    with pytest.raises(ValueError, match="config must be DoraConfig for a DoRA adapter, got LoraConfig"):
        ard.load_peft(model, tmp_path, ard.LoraConfig())
    assert_same(logits(ard.load_peft(model, tmp_path, ard.DoraConfig()), batch), expected)


def test_a_pickled_checkpoint_is_read_without_running_it(tmp_path: Path) -> None:
    expected, batch = trained_by_peft(tmp_path, "llama")
    safe = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(safe), tmp_path / "adapter_model.bin")
    safe.unlink()
    assert_same(logits(ard.load_peft(base("llama")[0], tmp_path, ard.LoraConfig()), batch), expected)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, ard.LoraConfig(), "linear layers only, got the embedding"),
        ({"bias": "all"}, ard.LoraConfig(), "adapter must have bias='none', got 'all'"),
        ({}, ard.LoraConfig(r=3), r"must be at most 3 per unit, got 4; use a config with a larger rank limit"),
        (
            {"r": 12},
            ard.ArdConfig(mode="paper", granularity="head"),
            r"at most 8 per unit, got 12; use granularity='matrix'",
        ),
        (
            {},
            ard.ArdConfig(mode="paper", granularity="head", gate="sigmoid"),
            "gate must be 'ramp' or 'ste', which start fully open, got 'sigmoid'",
        ),
        ({}, ard.LoraConfig(exclude_modules=["v_proj"]), "v_proj', and config must not exclude it"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    options: dict[str, Any], config: AdapterConfig, message: str, tmp_path: Path
) -> None:
    trained_by_peft(tmp_path, "llama", **options)
    model = base("llama")[0]
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        ard.load_peft(model, tmp_path, config)
    assert fingerprint(model) == before


def _edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_broken_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    model = base("llama")[0]
    before = fingerprint(model)
    config = ard.LoraConfig()
    with pytest.raises(FileNotFoundError, match=r"load_peft: directory must hold adapter_config\.json"):
        ard.load_peft(model, tmp_path, config)
    trained_by_peft(tmp_path, "llama")
    for values, message in (
        ({"peft_type": "ADALORA"}, "must be PEFT's LORA with a rank and a scale, got ADALORA"),
        ({"r": 0}, "got LORA, r=0"),
        ({"lora_bias": True}, "adapter must be plain LoRA, got lora_bias=True"),
        (
            {"rank_pattern": {"q_proj": 3}},
            r"q_proj' must be \[r, in\] and \[out, r\] with r = 3, got \[4, 32\] and \[32, 4\]",
        ),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "must belong to the original base weights, got init_lora_weights='pissa",
        ),
    ):
        saved = (tmp_path / "adapter_config.json").read_text()
        _edit(tmp_path, **values)
        with pytest.raises(ValueError, match=message):
            ard.load_peft(model, tmp_path, config)
        (tmp_path / "adapter_config.json").write_text(saved)
    with pytest.raises(ValueError, match=r"load_peft: model must have the linear layer 'model\.layers\.0"):
        ard.load_peft(base("bert")[0], tmp_path, config)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "base_model.model.model.norm.weight": torch.zeros(32)}, weights)
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' of the adapter must be that of the model"):
        ard.load_peft(model, tmp_path, config)
    save_file({**tensors, "base_model.model.model.conv.lora_A.weight": torch.zeros(4, 3, 1, 1)}, weights)
    with pytest.raises(ValueError, match=r"lora_A and lora_B of 'model\.conv' must be \[r, in\]"):
        ard.load_peft(model, tmp_path, config)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold adapter_model\.safetensors or \.bin"):
        ard.load_peft(model, tmp_path, config)
    assert fingerprint(model) == before
