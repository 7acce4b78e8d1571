"""The scale each loader will use, against rules written down here a second time, and exports that are right in all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ardlora_ext as ard
from ardlora_ext.checkpoint.check_adapter import LOADERS, check_adapter, refusals
from ardlora_ext.commands.cli import main

from helpers.adapters import scramble
from helpers.peft_adapters import assert_same, base, logits, trained_by_peft

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def exported(folder: Path, config: ard.AdapterConfig, name: str = "llama", **options: Any) -> tuple[nn.Module, Any]:
    """An export with ragged ranks, 0 among them."""
    model = ard.wrap(base(name)[0], config)
    scramble(model)
    return model.eval(), ard.save_pretrained(model, folder, **options)


@pytest.fixture(autouse=True)
def _never_attached(recwarn: pytest.WarningsRecorder) -> None:
    """Nothing is trained here."""


NOT_ATTACHED = pytest.mark.filterwarnings("ignore:save_pretrained.*was never called:UserWarning")


def vllm(folder: Path) -> dict[str, float]:
    """PEFTHelper and LoRALayerWeights of vLLM: one scaling factor, from the config alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    factor = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    return dict.fromkeys(_names(folder), factor)


def llama_cpp(folder: Path) -> dict[str, float]:
    """llama_adapter_lora_weight::get_scale: alpha / rank, where rank is ne[0] of the tensor b."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    return {name: alpha / b.shape[1] for name, b in _names(folder).items()}


def of_peft(folder: Path, model: nn.Module) -> dict[str, float]:
    """Ask PEFT."""
    loaded = peft.PeftModel.from_pretrained(model, folder)
    return {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in loaded.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and "default" in module.scaling
    }


def _names(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {re.fullmatch(r"base_model\.model\.(.*)\.lora_B\.weight", key): value for key, value in tensors.items()}
    return {match[1]: value for match, value in found.items() if match}


def used(folder: Path, loader: str) -> dict[str, float]:
    return {m.name: m.used[LOADERS.index(loader)] for m in check_adapter(folder)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "v_proj": 5}, "alpha_pattern": {"v_proj": 3, "proj": 7}},
        {"use_rslora": True, "rank_pattern": {"^model.layers.0.mlp.down_proj": 1}},
    ],
)
def test_the_rules_of_the_loaders(options: dict[str, Any], tmp_path: Path) -> None:
    trained_by_peft(tmp_path, "llama", **options)
    peft_scales = of_peft(tmp_path, base("llama")[0])
    assert used(tmp_path, "PEFT") == pytest.approx(peft_scales)
    assert used(tmp_path, "vLLM") == pytest.approx(vllm(tmp_path))
    assert used(tmp_path, "llama.cpp") == pytest.approx(llama_cpp(tmp_path))
    assert {m.name: m.trained for m in check_adapter(tmp_path)} == pytest.approx(peft_scales)


CONFIGS: dict[str, Callable[[], ard.AdapterConfig]] = {
    "heads": lambda: ard.ArdConfig(mode="paper", granularity="head", r0=3, lora_alpha=5.0),
    "own factors": lambda: ard.ArdConfig(mode="paper", granularity="head", r0=2, factoring="independent"),
    "rslora": lambda: ard.LoraConfig(r=4, use_rslora=True),
    "P Lambda Q": lambda: ard.ElaConfig(r=3),
    "dora": lambda: ard.DoraConfig(r=3),
    "pissa": lambda: ard.LoraConfig(r=3, init="pissa"),
}


@NOT_ATTACHED
@pytest.mark.parametrize("form", ["portable", "compact"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_our_exports_are_scaled_right(kind: str, form: Any, tmp_path: Path) -> None:
    model, written = exported(tmp_path, CONFIGS[kind](), form=form)
    batch = base("llama")[1]
    loaded = peft.PeftModel.from_pretrained(base("llama")[0], tmp_path).eval()
    assert_same(logits(loaded, batch), logits(model, batch))
    modules = check_adapter(tmp_path)
    assert [m for m in modules if not 0.999 < m.trained < 1.001] == []
    assert {m.name: m.rank for m in modules} == written.ranks
    assert written.error == 0.0
    wrong = {loader for m in modules for loader in m.wrong}
    assert wrong == ({"llama.cpp"} if form == "compact" else set())
    assert main(["check-adapter", str(tmp_path)]) == int(bool(wrong))


@NOT_ATTACHED
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_compact_form_on_every_architecture(name: str, tmp_path: Path) -> None:
    model, written = exported(tmp_path, ard.ArdConfig(mode="paper", r0=3, granularity="matrix"), name, form="compact")
    batch = base(name)[1]
    loaded = peft.PeftModel.from_pretrained(base(name)[0], tmp_path).eval()
    assert_same(logits(loaded, batch), logits(model, batch))
    assert written.r == max(written.ranks.values())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert len(config["rank_pattern"]) == sum(r != written.r for r in written.ranks.values()) > 0


@NOT_ATTACHED
@pytest.mark.parametrize("form", ["portable", "compact"])
def test_compress_cuts_to_the_best_approximation(form: Any, tmp_path: Path) -> None:
    model, written = exported(
        tmp_path, ard.ArdConfig(mode="paper", granularity="head", r0=3, factoring="independent"), form=form, compress=6
    )
    assert written.r == 6
    assert max(written.ranks.values()) == 6
    factors = load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in ard.adapters(model).items():
        if name not in written.ranks:
            continue
        delta = layer.get_delta_weight().double()
        a, b = (factors[f"base_model.model.{name}.lora_{f}.weight"].double() for f in "AB")
        values = torch.linalg.svdvals(delta)
        assert written.errors[name] == pytest.approx(float(values[6:].norm() / values.norm()), abs=1e-6)
        assert float((b @ a - delta).norm() / delta.norm()) == pytest.approx(written.errors[name], abs=1e-6)
    assert 0.0 < written.error < 1.0
    assert {m.trained for m in check_adapter(tmp_path) if abs(m.trained - 1.0) > 1e-5} == set()
    again = ard.load_pretrained(base("llama")[0], tmp_path)
    for name, layer in ard.adapters(again).items():
        assert torch.equal(layer.get_delta_weight(), ard.adapters(model)[name].get_delta_weight()), "state is not cut"


@NOT_ATTACHED
def test_a_wrong_export_is_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported(tmp_path, ard.ArdConfig(mode="paper", granularity="head", r0=3))
    assert main(["check-adapter", str(tmp_path)]) == 0
    path = tmp_path / "adapter_config.json"
    right = path.read_text()
    path.write_text(json.dumps({**json.loads(right), "lora_alpha": 8}))
    assert main(["check-adapter", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "PEFT: * 14 of 14 modules get a wrong scale" in printed
    path.write_text(right)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    save_file({**tensors, key: 2.0 * tensors[key]}, weights)
    assert main(["check-adapter", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"layers\.0\.mlp\.up_proj +16 +0\.5 +1\* +1\* +1\*$", printed, re.MULTILINE)
    assert "vLLM: * 1 of 14 modules" in printed


def test_what_servers_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained_by_peft(tmp_path, "bert", modules_to_save=["classifier"], bias="all")
    assert refusals(tmp_path) == ["modules_to_save", "bias"]
    assert main(["check-adapter", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "vLLM: right scales, but it does not load adapters with modules_to_save or bias" in printed
    assert re.search(r"llama\.cpp: .*, but it does not load adapters with modules_to_save or bias", printed)


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-adapter", str(tmp_path)]) == 2
    assert "check_adapter: directory must hold adapter_config.json, got" in capsys.readouterr().err
    model = ard.wrap(base("llama")[0], ard.LoraConfig())
    for options, message in (
        ({"form": "tiny"}, "save_pretrained: form must be 'portable' or 'compact', got 'tiny'"),
        ({"compress": 0}, "save_pretrained: compress must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ard.save_pretrained(model, tmp_path, **options)  # type: ignore[arg-type]
    ard.save_pretrained(model, tmp_path)
    (tmp_path / "ardlora_state.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"ardlora_state\.json must be one that save_pretrained wrote, got no 'format'"
    ):
        check_adapter(tmp_path)
