"""Adapters that a model would leave out are called after all, or named."""

from __future__ import annotations

import dataclasses
import warnings

import peft
import pytest
import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext.config import AdapterConfig

from helpers.experts import tiny_experts


@pytest.mark.filterwarnings("ignore:wrap. no adapter covers")  # nn.MultiheadAttention
@pytest.mark.parametrize("padded", [False, True])
def test_transformer_encoder_calls_its_adapters_in_eval(padded: bool) -> None:
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True), 2)
    model = ard.wrap(base, ard.LoraConfig(r=2))
    with torch.no_grad():
        for layer in ard.adapters(model).values():
            layer.lora_B.normal_()
    x, mask = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    more = {"src_key_padding_mask": mask} if padded else {}
    expected = model.train()(x, **more).detach()[~mask]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, **more)[~mask], expected, rtol=1e-4, atol=1e-5)
    assert ard.unwrap(model).use_nested_tensor  # the fused path is back


class Functional(nn.Module):
    """Reads one weight itself and calls the other layer."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.called(nn.functional.linear(x, self.read.weight))
        return y


def test_an_adapter_that_is_never_called_is_named_at_the_first_step() -> None:
    model = ard.wrap(Functional(), ard.ArdConfig(mode="paper", r0=2, granularity="matrix"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ard.attach(model, optimizer, total_steps=10)
    model(torch.randn(4, 8)).square().mean().backward()
    with pytest.warns(UserWarning, match="no gradient reached the adapters of 'read':"):
        optimizer.step()
    model(torch.randn(4, 8)).square().mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


class Parts(nn.Module):
    """A part that is not called, and one layer in each of two blocks that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)))
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8), "skip": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block["up"](x)  # type: ignore[index, operator]
        return x


def test_adapters_that_are_not_called_are_named_in_few_words() -> None:
    model = ard.wrap(Parts(), ard.LoraConfig(r=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ard.attach(model, optimizer)
    model(torch.randn(4, 8)).square().mean().backward()
    said = r"reached the adapters of 'tower' \(6 of them\), 'blocks\.\*\.skip' \(2 of them\): the model did not call"
    with pytest.warns(UserWarning, match=said):
        optimizer.step()


def test_experts_without_adapters_are_named_with_what_to_write() -> None:
    attention = ["q_proj", "v_proj"]
    with pytest.warns(
        UserWarning, match=r"no adapter covers \d+ % .*'model.layers.0.mlp.experts.gate_up_proj'"
    ) as told:
        ard.wrap(tiny_experts("qwen3_moe"), ard.LoraConfig(r=2, target_modules=attention))
    assert "add ['down_proj', 'gate_up_proj'] to target_modules" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = ["gate_up_proj", "down_proj"]
        model = ard.wrap(tiny_experts("qwen3_moe"), ard.LoraConfig(r=2, target_modules=[*attention, *both]))
        ard.wrap(tiny_experts("qwen3_moe"), ard.LoraConfig(r=2, target_modules=attention, exclude_modules=["experts"]))
    assert {name.rpartition(".")[2] for name in ard.adapters(model)} == {*attention, *both}


def test_what_no_adapter_reaches_of_other_layers_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8))
    with pytest.warns(UserWarning, match="'1.weight_ih_l0', '1.weight_hh_l0'; train some whole by modules_to_save"):
        ard.wrap(model, ard.LoraConfig(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ard.wrap(ard.unwrap(model), ard.LoraConfig(r=2, modules_to_save=["1"]))


def test_codes_of_quantised_experts_are_named_and_refused() -> None:
    model = tiny_experts("gpt_oss")
    for layer in model.model.layers:
        codes = layer.mlp.experts.gate_up_proj.detach().to(torch.uint8)
        layer.mlp.experts.gate_up_proj = nn.Parameter(codes, requires_grad=False)
    with pytest.warns(UserWarning, match=r"gate_up_proj.* hold codes, load the model without quantisation"):
        ard.unwrap(ard.wrap(model, ard.LoraConfig(r=2)))
    with pytest.raises(ValueError, match=r"gate_up_proj.* hold codes: experts must not be quantised"):
        ard.wrap(model, ard.LoraConfig(r=2, target_modules=["gate_up_proj"]))


@pytest.mark.parametrize(
    ("config", "option"),
    [(ard.DoraConfig(r=2), "DoRA"), (ard.LoraConfig(r=2, init="pissa"), "init='pissa'")],
    ids=["dora", "pissa"],
)
def test_what_has_no_form_for_experts_says_so(config: AdapterConfig, option: str) -> None:
    with pytest.warns(UserWarning, match=f"{option} has no form for experts"):
        model = ard.wrap(tiny_experts("mixtral"), config)
    assert all(layer.layout.kind != "experts" for layer in ard.adapters(model).values())
    named = dataclasses.replace(config, target_modules=["gate_up_proj"])
    with pytest.raises(ValueError, match=f"{option} has no form for experts"):
        ard.wrap(tiny_experts("mixtral"), named)


def test_a_peft_model_is_refused_untouched() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"]))
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"must not have PEFT adapters, got PeftModel; .*load_peft"):
        ard.wrap(model, ard.LoraConfig(r=2))
    assert before == [p.requires_grad for p in model.parameters()]
