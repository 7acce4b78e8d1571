"""What PEFT makes of our files where it reads names otherwise than they are meant; layers that only look linear."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import ardlora_ext as ard
from ardlora_ext.model.peft.loads import task_type

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:attach")
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Headed(nn.Module):
    """Heads whose names PEFT finds elsewhere, too, or cannot save whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"head": nn.Linear(8, 8), "up": nn.Linear(8, 8)})
        self.head = nn.ModuleDict({"head": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "out": nn.Linear(8, 8)})
        self.many = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.bare = nn.ModuleList([nn.Flatten(), nn.Tanh()])  # nothing to keep
        self.norm, self.inner = nn.LayerNorm(8), nn.ModuleDict({"prenorm": nn.LayerNorm(8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.body["head"], self.body["up"], self.inner["prenorm"], self.norm, self.head["head"]):
            x = layer(torch.tanh(x))
        out: torch.Tensor = self.many[1](self.many[0](self.head["out"](x)))
        return out


def trained(saved: list[str]) -> nn.Module:
    model = ard.wrap(Headed(), ard.LoraConfig(r=2, modules_to_save=saved))
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 4)
    return model


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved", [["many"], ["head.head", "many"], ["head.out"], ["bare", "head.out"]])
def test_modules_kept_whole_load_in_peft_whatever_they_are_called(saved: list[str], tmp_path: Path) -> None:
    model = trained(saved)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = model(X)
        ard.save_pretrained(model, tmp_path)
        other = peft.PeftModel.from_pretrained(Headed(), tmp_path)
        torch.testing.assert_close(other(X), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            ard.load_peft(Headed(), tmp_path, ard.LoraConfig())(X), expected, rtol=1e-4, atol=1e-5
        )
    assert torch.equal(ard.load_pretrained(Headed(), tmp_path)(X), expected)


@pytest.mark.parametrize("name", ["norm", "head"])
def test_a_name_that_peft_takes_twice_is_said(name: str, tmp_path: Path) -> None:
    model = trained([n for n, _ in Headed().named_children() if n == name])
    taken = {"norm": "inner.prenorm"}.get(name)
    if name == "head":
        ard.save_pretrained(model, tmp_path)  # its parts have names of their own
        torch.testing.assert_close(
            peft.PeftModel.from_pretrained(Headed(), tmp_path)(X), model(X), rtol=1e-4, atol=1e-5
        )
        return
    with pytest.warns(UserWarning, match=f"PEFT will not load what was trained, for it takes '{taken}' for '{name}'"):
        ard.save_pretrained(model, tmp_path)


def test_the_task_type_asks_for_a_decoder() -> None:
    def named(kind: str, forward: Any) -> nn.Module:
        return type(kind, (nn.Module,), {"forward": forward})()

    assert task_type(named("XForConditionalGeneration", lambda self, input_ids, decoder_input_ids: 0)) == "SEQ_2_SEQ_LM"
    assert task_type(named("XForConditionalGeneration", lambda self, input_ids, pixel_values: 0)) is None
    assert task_type(named("XForCausalLM", lambda self, input_ids: 0)) == "CAUSAL_LM"


def test_statistics_that_move_in_training_are_said() -> None:
    def base() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))

    with pytest.warns(UserWarning, match="wrap: running statistics of '1' move in training and are in no adapter file"):
        ard.wrap(base(), ard.LoraConfig(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ard.wrap(base(), ard.LoraConfig(r=2, modules_to_save=["1"]))
        still = base()
        still[1].momentum = 0.0  # type: ignore[index]
        ard.wrap(still, ard.LoraConfig(r=2)).train()(X)
        assert not still[1].running_mean.any()  # type: ignore[index]


def test_a_tied_head_that_the_model_does_not_name_is_left_out() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.up = nn.Embedding(9, 8), nn.Linear(8, 8)
            self.decoder = nn.Linear(8, 9)
            self.decoder.weight = self.words.weight

    model = ard.wrap(Tied(), ard.LoraConfig(r=2))
    assert list(ard.adapters(model)) == ["up"]
    ard.merge(model)
    assert list(ard.adapters(ard.wrap(Tied(), ard.LoraConfig(r=2, target_modules=["decoder"])))) == ["decoder"]


@pytest.mark.filterwarnings("ignore:wrap. no adapter covers")
def test_layers_that_only_look_linear() -> None:
    config = transformers.PhimoeConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ard.wrap(transformers.PhimoeForCausalLM(config), ard.LoraConfig(r=2))
    experts = {"gate_up_proj", "down_proj"}
    assert {name.split(".")[-1] for name in ard.adapters(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"} | experts

    class Grouped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[..., :4]

    wrapped = ard.wrap(nn.Sequential(Grouped(8, 8), nn.Linear(4, 4)), ard.LoraConfig(r=2))
    with pytest.raises(TypeError, match=r"must return one tensor \[..., 8\], got \[3, 4\] from Grouped; leave"):
        wrapped(X)
    empty = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1, bias=False))
    empty[1].out_features = 0
    assert list(ard.adapters(ard.wrap(empty, ard.LoraConfig(r=2)))) == ["0"]
