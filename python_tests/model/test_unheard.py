"""Adapters that a model would leave out are called after all, or named."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

import ardlora_ext as ard


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
    model = ard.wrap(Functional(), ard.ArdConfig(r0=2, granularity="matrix"))
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


def test_fused_experts_are_named_with_their_share() -> None:
    config = transformers.Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=50,
        num_experts=4,
        num_experts_per_tok=2,
    )
    with pytest.warns(UserWarning, match=r"stay frozen, \d+ % .* 'model.layers.0.mlp.experts.gate_up_proj'"):
        ard.wrap(transformers.Qwen3MoeForCausalLM(config), ard.LoraConfig(r=2))
    with pytest.raises(ValueError, match="experts are fused 3-D parameters, which cannot be adapted"):
        ard.wrap(transformers.Qwen3MoeForCausalLM(config), ard.LoraConfig(r=2, target_modules=["gate_proj"]))


def test_a_peft_model_is_refused_untouched() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"]))
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"must not have PEFT adapters, got PeftModel; .*load_peft"):
        ard.wrap(model, ard.LoraConfig(r=2))
    assert before == [p.requires_grad for p in model.parameters()]
