"""Plain torch models as PEFT supports them: the same factors give PEFT's outputs, in files both ways, and merged.

What PEFT has and this package has not (embeddings and convolutions as targets, parameters, biases) is refused by name:
docs/recipes.md.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import ardlora_ext as ard

from helpers.peft_adapters import assert_same

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(6, 10, generator=torch.Generator().manual_seed(3))


class Mlp(nn.Module):
    """Two layers, the second so narrow that ranks do not fit."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20, bias=bias), nn.Linear(20, 2, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lin1(torch.tanh(self.lin0(x)))
        return out


class Nested(nn.Module):
    """Lists, dicts and sequences, with names that end alike."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.ModuleDict({"fc": nn.Linear(10, 10), "in_fc": nn.Linear(10, 10)}) for _ in "ab"]
        self.model = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.fc = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.model["blocks"]:  # type: ignore[attr-defined]
            x = x + block["fc"](torch.tanh(block["in_fc"](x)))
        out: torch.Tensor = self.fc(x)
        return out


class Repeated(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.out = nn.Linear(10, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(torch.tanh(self.again(torch.tanh(self.again(x)))))
        return out


class TwoNames(Repeated):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.second = self.again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(torch.tanh(self.second(torch.tanh(self.again(x)))))
        return out


class Tied(nn.Module):
    """Two layers that share their weight, as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 10), nn.Linear(10, 10)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.b(torch.tanh(self.a(x)))
        return out


class Turned(nn.Module):
    """transformers' Conv1D, whose weight is turned, beside an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(100, 5), Conv1D(7, 5), nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lin0(torch.tanh(self.conv1d(self.emb((10 * x).long().abs() % 100))))
        return out


class Recurrent(nn.Module):
    """Layers of other kinds around a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.norm = nn.GRU(10, 8, batch_first=True), nn.LayerNorm(8)
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.gru(x[None])[0])
        out: torch.Tensor = self.out(x + self.attention(x, x, x)[0])[0]
        return out


CASES: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (Mlp, {"target_modules": "lin0"}),
    (Mlp, {"target_modules": ["lin0"]}),
    (Mlp, {"target_modules": ["lin1"]}),
    (Mlp, {"target_modules": ["lin0", "lin1"], "r": 3, "lora_alpha": 32}),
    (Mlp, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    (Mlp, {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),
    (Mlp, {"target_modules": ["lin0"], "use_dora": True}),
    (Mlp, {"target_modules": ["lin0", "lin1"], "use_dora": True, "lora_alpha": 32}),
    (Mlp, {"target_modules": "lin1", "use_dora": True}),
    (lambda: Mlp(bias=False), {"target_modules": "all-linear", "use_rslora": True}),
    (Mlp, {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin0": 2}, "alpha_pattern": {"lin1": 5}}),
    (Nested, {"target_modules": ["fc.0", "blocks.0.fc"]}),
    (Nested, {"target_modules": ["in_fc", "fc.0"], "exclude_modules": ["model.blocks.0.in_fc"]}),
    (Nested, {"target_modules": r"model\.blocks\.\d\..*", "modules_to_save": ["fc.2"]}),
    (Nested, {"target_modules": ["in_fc"], "layers_to_transform": 1, "layers_pattern": "blocks", "use_dora": True}),
    (Repeated, {"target_modules": ["again"]}),
    (Repeated, {"target_modules": ["again", "out"], "use_dora": True}),
    (Tied, {"target_modules": ["a", "b"]}),
    (Tied, {"target_modules": ["a"]}),
    (Turned, {"target_modules": ["conv1d"], "fan_in_fan_out": True}),
    (Turned, {"target_modules": ["conv1d"], "fan_in_fan_out": True, "use_dora": True}),
    (Turned, {"target_modules": ["conv1d"], "fan_in_fan_out": True, "trainable_token_indices": {"emb": [0, 10]}}),
    (Recurrent, {"target_modules": ["out"], "modules_to_save": ["norm"]}),
    (Recurrent, {"target_modules": ["out"], "modules_to_save": ["gru", "attention"], "use_dora": True}),
]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n} {getattr(CASES[n][0], '__name__', 'Mlp')}")
def test_outputs_are_those_of_peft(number: int, tmp_path: Path) -> None:
    make, options = CASES[number]
    torch.manual_seed(number)
    base = make().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    fill(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    config = ard.DoraConfig() if options.get("use_dora") else ard.LoraConfig()
    ours = ard.load_peft(copy.deepcopy(base), tmp_path / "theirs", config)
    assert_same(out(ours), out(theirs))
    for model in (ours, theirs):
        step(model)
    assert_same(out(ours), out(theirs))
    ard.save_pretrained(ours, tmp_path / "ours")
    assert_same(out(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()), out(ours))
    assert torch.equal(out(ard.load_pretrained(copy.deepcopy(base), tmp_path / "ours")), out(ours))
    if make is not Tied:
        assert_same(out(ard.merge(ours)), out(theirs))


def out(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(X)
    return found


def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) / 4
            parameter.data = parameter.data + noise if "lora_A" not in name else noise


def step(model: Any) -> None:
    """Take a step of plain gradient descent on what is trained whole, whose gradients do not depend on how factors are
    scaled."""
    model(X).square().mean().backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter -= 0.1 * parameter.grad


def test_a_layer_under_two_names_is_said(tmp_path: Path) -> None:
    model = ard.wrap(TwoNames(), ard.LoraConfig(r=2, target_modules=["again"]))
    assert model.second is model.again
    with pytest.warns(UserWarning, match="PEFT will compute something else, for it adapts 'again' but not 'second'"):
        ard.save_pretrained(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ard.save_pretrained(ard.wrap(Repeated(), ard.LoraConfig(r=2)), tmp_path / "fine")


REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (
        Turned,
        {"target_modules": ["emb"]},
        "'emb' is an embedding, which gets no low-rank adapter; train",
    ),
    (
        Turned,
        {"target_modules": ["emb", "conv1d"]},
        r"rows by trainable_token_indices={'emb': \[...\]}, or",
    ),
    (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)),
        {"target_modules": ["0"]},
        "'0' is a convolution, which",
    ),
    (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(4, 4)),
        {"target_modules": "0"},
        r"whole by modules_to_save=\['0'\]",
    ),
    (
        Mlp,
        {"target_modules": ["lin"]},
        "got no match for 'lin'; near misses: lin1, lin0; linear layers",
    ),
    (Mlp, {"target_modules": ["lin2", "lin3"]}, "'lin2', 'lin3'; near misses: lin., lin.; linear"),
    (lambda: nn.MultiheadAttention(8, 2), {"target_modules": "all-linear"}, "model must have linear layers"),
    (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.Linear(2, 2)),
        {"target_modules": ["0"], "use_dora": True},
        "'0' is a convolution, which",
    ),
    (
        Recurrent,
        {"target_modules": ["attention", "out"]},
        r"'attention' is a MultiheadAttention, which .*=\['attention'\]",
    ),
    (Recurrent, {"target_modules": ["gru"]}, "'gru' is a GRU, which gets no low-rank adapter; train it whole"),
    (Recurrent, {"target_modules": ["norm"]}, "'norm' is a LayerNorm, which"),
    (
        Mlp,
        {"target_parameters": ["lin1.weight"]},
        "must name stacks of experts, got 'lin1.weight'; name layers in target_",
    ),
    (Mlp, {"target_modules": ["lin0"], "bias": "lora_only"}, "leave bias at 'none', got 'lora_only'; modules_to_save"),
    (Mlp, {"target_modules": ["lin0"], "lora_bias": True}, "leave lora_bias at False"),
    (Mlp, {"target_modules": ["lin0"], "init_lora_weights": "gaussian"}, "must be True or 'pissa', got 'gaussian'"),
]


@pytest.mark.parametrize(("make", "options", "said"), REFUSED, ids=[said[:40] for *_, said in REFUSED])
def test_what_only_peft_adapts_is_refused_with_the_way(make: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"wrap: .*{said}"):
        ard.wrap(make(), peft.LoraConfig(**options))


# --- what else PEFT promises for such models --------------------------------------------------------------------------


def learned(config: ard.AdapterConfig | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = ard.wrap(Mlp().to(dtype), config or ard.LoraConfig(r=2))
    for layer in ard.adapters(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    return model


@pytest.mark.parametrize(
    "config", [ard.LoraConfig(r=2), ard.DoraConfig(r=2), ard.ArdConfig(r0=2), ard.ElaConfig(r=2, b=1)]
)
def test_a_step_changes_what_trains_and_nothing_else(config: ard.AdapterConfig) -> None:
    model = learned(config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    model(X).square().mean().backward()
    optimizer.step()
    for name, value in model.named_parameters():
        assert value.requires_grad == ("base_layer" not in name)
        assert torch.equal(value, before[name]) != value.requires_grad, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_goes_in_and_comes_out(dtype: torch.dtype, autocast: bool) -> None:
    model, x = learned(dtype=dtype).eval(), X.to(dtype)
    exact = out(learned(dtype=dtype).float())
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        found = model(x)
    merged = ard.merge(model)(x)
    for value in (found, merged):
        assert value.dtype == dtype
        torch.testing.assert_close(value.float(), exact, atol=0.03, rtol=0.03)


def test_adapters_that_are_no_numbers_are_not_merged() -> None:
    model = learned()
    with torch.no_grad():
        ard.adapters(model)["lin1"].lora_A[0, 0] = torch.inf
    before = {name: value.clone() for name, value in model.named_parameters()}
    for merge in (ard.merge, ard.merge_adapter):
        with pytest.raises(ValueError, match="adapters must be finite, got NaN or Inf in 'lin1'"):
            merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("name", ["lin0", "lora_A", "weight", "base_layer", "a b"])
def test_an_adapters_name_makes_no_difference(name: str, tmp_path: Path) -> None:
    plain = learned(ard.LoraConfig(r=3))
    model = learned()
    ard.add_adapter(model, name, ard.LoraConfig(r=3))
    ard.set_adapter(model, name)
    for layer, other in zip(ard.adapters(model).values(), ard.adapters(plain).values(), strict=True):
        layer.load_state_dict(other.state_dict())
    assert torch.equal(out(model), out(plain))
    for of, folder in ((model, "named"), (plain, "plain")):
        ard.save_pretrained(of, tmp_path / folder)
    weights = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("named", "plain")]
    assert weights[0] == weights[1]
    ard.set_adapter(model, "default")
    assert torch.equal(out(model), out(learned()))


def test_a_wrapped_layer_tells_what_its_base_does() -> None:
    model, base = learned(), learned().lin0.base_layer
    assert (model.lin0.in_features, model.lin0.out_features) == (10, 20)
    assert torch.equal(model.lin0.weight, base.weight)
    assert torch.equal(model.lin0.bias, base.bias)
    assert "ranks=2" in repr(model.lin0)
    assert "(base_layer): Linear(in_features=10" in repr(model.lin0)
    with pytest.raises(TypeError, match="adapter_names"):  # PEFT's batches of several adapters
        model.lin0(X, adapter_names=["default"] * len(X))
