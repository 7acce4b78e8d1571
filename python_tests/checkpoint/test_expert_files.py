"""Experts in files: PEFT's target_parameters form, our own state, and what check-adapter says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import ardlora_ext as ard
from ardlora_ext.checkpoint.check_adapter import check_adapter
from ardlora_ext.checkpoint.peft_write import pack_stack, unpack_stack
from ardlora_ext.checkpoint.reexport import reexport
from ardlora_ext.commands.cli import main
from ardlora_ext.config import AdapterConfig
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate, apply

from helpers.experts import tiny_experts, tokens
from helpers.sealing import edit_json

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT's

MODELS = ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "jetmoe"]


def trained(family: str, config: AdapterConfig, steps: int = 6) -> Any:
    model = ard.wrap(tiny_experts(family), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    ard.attach(model, optimizer, total_steps=steps)
    ids = tokens(2, 24)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=tokens(2, 24)).logits
    return found


def experts_only(r: int) -> ard.LoraConfig:
    return ard.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["gate_up_proj", "down_proj"])


def make_ragged(model: Any) -> None:
    """Leave one expert of each stack with nothing."""
    update = {}
    for name, layer in ard.adapters(model).items():
        if layer.layout.kind == "experts":
            update[name] = tuple(UnitUpdate(tuple(range(r if e else 0))) for e, r in enumerate(layer.ranks))
    apply(model, RankUpdate(update))


@pytest.mark.parametrize("form", ["portable", "compact"])
@pytest.mark.parametrize("family", MODELS)
def test_peft_and_our_own_loader_give_the_same_logits(family: str, form: Any, tmp_path: Path) -> None:
    model = trained(family, ard.ArdConfig(mode="paper", r0=2, r_max=4, lora_dropout=0.1))
    make_ragged(model)
    expected = logits(model)
    exported = ard.save_pretrained(model, tmp_path, form=form)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    names = [name for name, layer in ard.adapters(model).items() if layer.layout.kind == "experts"]
    assert config["target_parameters"] == sorted(names)
    assert not set(names) & set(config["target_modules"])
    assert exported.error == 0.0
    loaded = peft.PeftModel.from_pretrained(tiny_experts(family), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    again = ard.load_pretrained(tiny_experts(family), tmp_path)
    assert torch.equal(logits(again), expected)
    reexport(tmp_path, tmp_path / "again", form=form)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("family", MODELS[:3])
def test_a_peft_checkpoint_goes_on_with_ranks_that_move(family: str, tmp_path: Path) -> None:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=parameters)
    theirs = peft.get_peft_model(tiny_experts(family), config)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs)
    for ours in (ard.ArdConfig(mode="paper", r0=2, r_max=6), ard.ElaConfig(r=3), ard.LoraConfig(r=3)):
        model = ard.load_peft(tiny_experts(family), tmp_path, ours)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        assert all(set(layer.ranks) == {3} for layer in ard.adapters(model).values())
    with pytest.raises(ValueError, match="model must have the stacks of experts of target_parameters"):
        ard.load_peft(tiny_experts("jetmoe"), tmp_path, ard.LoraConfig(r=3))


def test_the_older_form_of_peft_is_told_by_its_sizes(tmp_path: Path) -> None:
    """Before 0.19 PEFT took the outputs of [experts, out, in] for its inputs."""
    model = trained("mixtral", experts_only(2))
    expected = logits(model)
    ard.save_pretrained(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    old = {}
    for key in [key for key in tensors if ".lora_A." in key]:
        a, b = unpack_stack(tensors[key], tensors[key.replace("lora_A", "lora_B")], 4, False)
        old[key], old[key.replace("lora_A", "lora_B")] = pack_stack(a, b, True)
    save_file(old, path)
    loaded = ard.load_peft(tiny_experts("mixtral"), tmp_path, experts_only(8))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


def test_packing_puts_the_expert_slowest_in_a_and_fastest_in_b() -> None:
    a, b = torch.arange(12.0).view(2, 3, 2), torch.arange(24.0).view(2, 4, 3)
    for exchanged in (False, True):
        packed = pack_stack(a, b, exchanged)
        back = unpack_stack(*packed, 2, exchanged)
        assert torch.equal(back[0], a)
        assert torch.equal(back[1], b)
    lora_A, lora_B = pack_stack(a, b, False)
    assert torch.equal(lora_A[3], a[1, 0])
    assert torch.equal(lora_B[:, 1], b[1, :, 0])


def test_compressed_experts_keep_their_best_components(tmp_path: Path) -> None:
    model = trained("mixtral", experts_only(4))
    exported = ard.save_pretrained(model, tmp_path, compress=2)
    assert exported.r == 2
    assert 0.0 < exported.error < 1.0
    layer = ard.adapters(model)["model.layers.0.mlp.experts.down_proj"]
    u, s, v = torch.linalg.svd(layer.get_delta_weight())
    best = (u[..., :2] * s[:, None, :2]) @ v[:, :2]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.mlp.experts"
    a, b = unpack_stack(tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"], 4, False)
    torch.testing.assert_close(b @ a, best, rtol=1e-3, atol=1e-5)


def test_check_adapter_knows_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ard.save_pretrained(trained("mixtral", experts_only(2)), tmp_path)
    found = check_adapter(tmp_path)
    assert {module.name.rpartition(".")[2] for module in found} == {"gate_up_proj", "down_proj"}
    assert all(not module.wrong for module in found)
    assert main(["check-adapter", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "vLLM reads them in models that it marks as 3-D" in said
    assert "llama.cpp's converter has no names for them" in said


def test_a_state_resumes_bitwise(tmp_path: Path) -> None:
    def start() -> tuple[Any, Any]:
        model = ard.wrap(tiny_experts("mixtral").train(), ard.ArdConfig(mode="paper", r0=2, r_max=4, update_interval=2))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ard.attach(model, optimizer, total_steps=12)
        return model, optimizer

    def go(model: Any, optimizer: Any, steps: int) -> None:
        ids = tokens(2, 24)
        for _ in range(steps):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = start()
    go(*whole, 5)
    ard.save_state(*whole, tmp_path)
    go(*whole, 7)
    other = start()
    ard.load_state(*other, tmp_path)
    go(*other, 7)
    for (name, a), (_, b) in zip(whole[0].named_parameters(), other[0].named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["modules"]["model.layers.0.mlp.experts.down_proj"]["ranks"].pop(), "units of .*experts"),
        (lambda state: state["modules"].pop("model.layers.0.mlp.experts.down_proj"), "targets must be those"),
    ],
)
def test_a_state_of_other_experts_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    ard.save_pretrained(trained("mixtral", experts_only(2)), tmp_path)
    edit_json(tmp_path / "ardlora_state.json", change)
    model = tiny_experts("mixtral")
    with pytest.raises(ValueError, match=message):
        ard.load_pretrained(model, tmp_path)
    assert not ard.adapters(model)
