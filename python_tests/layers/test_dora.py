"""DoRA against PEFT's and against a dense oracle; LoRA+ and rsLoRA beside it."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import ardlora_ext as ard
from ardlora_ext.layers.dora import DoraLinear
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.ranks import resize
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate

from helpers.models import Attention, Batch, trainable

# PEFT warns that it will stop setting `is_gradient_checkpointing`; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LAYOUTS = [
    UnitLayout("matrix", "shared", 1, 12, 20),
    *(UnitLayout("out_heads", f, 4, 12, 20) for f in ("shared", "independent")),  # type: ignore[arg-type]
    *(UnitLayout("in_heads", f, 4, 12, 20) for f in ("shared", "independent")),  # type: ignore[arg-type]
]
RANKS = {1: [[0], [1], [5]], 4: [[0, 0, 0, 0], [1, 0, 3, 2], [3, 3, 3, 3]]}
CASES = [(layout, ranks) for layout in LAYOUTS for ranks in RANKS[layout.units]]


def linear(layout: UnitLayout, conv1d: bool = False) -> nn.Module:
    """A frozen base."""
    base = Conv1D(layout.out_features, layout.in_features) if conv1d else nn.Linear(12, 20)
    nn.init.normal_(base.bias)
    return base.requires_grad_(False)


def dora_layer(layout: UnitLayout, ranks: list[int], gate: str = "none", conv1d: bool = False) -> DoraLinear:
    """A layer at these ranks with every value random."""
    model = nn.ModuleDict({"x": DoraLinear(linear(layout, conv1d), layout, 5, 0.7, gate=gate)})  # type: ignore[arg-type]
    layer = model["x"]
    assert isinstance(layer, DoraLinear)
    before = layer.ranks
    resize.apply(
        model, RankUpdate({"x": tuple(UnitUpdate(tuple(range(r))) for r in ranks)})
    ) if ranks != before else None
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            parameter.normal_()
        if layer.gate is not None:
            layer.gate.uniform_(0.2, 1.0)
    return layer


def dense(layer: DoraLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle in float64: output and row norm, from the dense update."""
    base = layer.base_layer
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    full = weight.double() + LoraLinear.get_delta_weight(layer).double()
    norm = full.norm(dim=1)
    scale = layer.lora_magnitude_vector.double() / norm
    return x.double() @ (scale[:, None] * full).T + base.bias.double(), norm


@pytest.mark.parametrize("gate", ["none", "controlled", "trained"])
@pytest.mark.parametrize(("layout", "ranks"), CASES)
def test_norm_and_output_equal_the_dense_form(layout: UnitLayout, ranks: list[int], gate: str) -> None:
    layer = dora_layer(layout, ranks, gate)
    x = torch.randn(3, 7, 12)
    y, norm = dense(layer, x)
    torch.testing.assert_close(layer.weight_norm().double(), norm, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(layer(x).double(), y, rtol=2e-5, atol=2e-5)
    weight = layer.weight.double() + layer.get_delta_weight().double()
    y = x.double() @ weight.T + (0.0 if layer.bias is None else layer.bias.double())
    torch.testing.assert_close(layer(x).double(), y, rtol=2e-5, atol=2e-5)
    a, b, scale = layer.merge_terms()
    assert scale is not None
    torch.testing.assert_close(scale[:, None] * (layer.weight + b @ a), weight.float(), rtol=2e-5, atol=2e-5)


def test_conv1d_base() -> None:
    layer = dora_layer(LAYOUTS[0], [5], conv1d=True)
    x = torch.randn(7, 12)
    y, norm = dense(layer, x)
    torch.testing.assert_close(layer.weight_norm().double(), norm, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(layer(x).double(), y, rtol=2e-5, atol=2e-5)


def test_start_is_the_base_bit_for_bit_also_for_rows_of_zeros() -> None:
    base = linear(LAYOUTS[0])
    base.weight[3] = 0.0
    layer = DoraLinear(base, LAYOUTS[0], 5, 1.0)
    x = torch.randn(9, 12)
    assert torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.trained.values() if p.grad is not None)


def test_norm_is_computed_once_per_change_of_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = dora_layer(LAYOUTS[0], [5])
    calls = []
    compute = DoraLinear._compute_norm
    monkeypatch.setattr(DoraLinear, "_compute_norm", lambda self: calls.append(1) or compute(self))
    x = torch.randn(7, 12)
    for _ in range(3):  # micro-batches of one step
        layer(x).sum().backward()
    assert len(calls) == 1
    for fused in (True, False):  # a fused step leaves the version counters where they were
        optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1, fused=fused)
        optimizer.step()
        torch.testing.assert_close(layer.weight_norm().double(), dense(layer, x)[1], rtol=2e-6, atol=2e-6)
    assert len(calls) == 3
    layer.lora_B.data.mul_(2.0)  # nor does a write through .data
    torch.testing.assert_close(layer.weight_norm().double(), dense(layer, x)[1], rtol=2e-6, atol=2e-6)
    assert len(calls) == 4


def test_norm_of_a_row_that_the_update_cancels_stays_finite() -> None:
    layer = dora_layer(LAYOUTS[0], [1])
    with torch.no_grad():
        layer.lora_A[0] = layer.base_layer.weight[2]
        layer.lora_B[0] = 0.0
        layer.lora_B[0, 2] = -1.0 / layer.scaling
    assert torch.isfinite(layer(torch.randn(4, 12))).all()


def peft_dora(model: nn.Module, targets: list[str], **options: object) -> nn.Module:
    """PEFT's DoRA with random values, in eval mode."""
    config = peft.LoraConfig(r=5, lora_alpha=7, use_dora=True, target_modules=targets, **options)  # type: ignore[arg-type]
    wrapped = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + 0.1 * noise) if "magnitude" in name else parameter.copy_(0.2 * noise)
    return wrapped


def test_forward_and_gradients_equal_peft(architecture: tuple[nn.Module, Batch]) -> None:
    model, batch = architecture
    ours = ard.wrap(copy.deepcopy(model), ard.DoraConfig(r=5, lora_alpha=7, modules_to_save=[]))
    layers = ard.adapters(ours)
    conv = any(isinstance(layer.base_layer, Conv1D) for layer in layers.values())
    theirs = peft_dora(model, list(layers), fan_in_fan_out=conv)
    values = dict(theirs.named_parameters())
    keys = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}
    keys |= {"lora_magnitude_vector": "lora_magnitude_vector.default.weight"}
    pairs = []
    for (name, layer), (key, path) in itertools.product(layers.items(), keys.items()):
        value = values[f"base_model.model.{name}.{path}"]
        mine = layer.trained[key]
        with torch.no_grad():
            rows = value.T if key == "lora_B" else value
            (mine[: len(rows)] if mine.dim() == 2 else mine).copy_(rows)
        pairs.append((f"{name}.{key}", mine, value, key == "lora_B"))
    a, b = ours(**batch), theirs(**batch)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-5)
    a.loss.backward()
    b.loss.backward()
    for name, mine, value, transposed in pairs:
        assert mine.grad is not None
        assert value.grad is not None
        expected = value.grad.T if transposed else value.grad
        largest = expected.abs().max().item()
        torch.testing.assert_close(
            mine.grad[: len(expected)], expected, rtol=1e-4, atol=2e-5 * largest + 1e-9, msg=f"{name} differs"
        )


@pytest.mark.parametrize("config", [ard.DoraConfig(r=3), ard.DoraConfig(r=3, granularity="head", use_rslora=True)])
def test_checkpoint_loads_in_peft_and_here(
    architecture: tuple[nn.Module, Batch], config: ard.DoraConfig, tmp_path: Path
) -> None:
    model, batch = architecture
    base = copy.deepcopy(model)
    ard.wrap(model, config)
    layers = ard.adapters(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B[: layer.layout.rows(layer.ranks)[1]].normal_(std=0.2)
            layer.lora_magnitude_vector.mul_(1.0 + 0.2 * torch.rand(layer.layout.out_features))  # type: ignore[operator]
    first = next(iter(layers))
    units = layers[first].layout.units
    resize.apply(model, RankUpdate({first: (UnitUpdate(()),) * units}))  # rank 0: only the magnitude is left
    expected = model(**batch).logits
    ard.save_pretrained(model, tmp_path)
    again = ard.load_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(**batch).logits, expected)
    other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(other(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    merged = ard.merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_magnitude_is_trained_counted_and_demanded_of_the_optimizer() -> None:
    model = ard.wrap(Attention(), ard.DoraConfig(r=2))
    out = sum(layer.layout.out_features for layer in ard.adapters(model).values())
    plain = ard.parameters_report(ard.wrap(Attention(), ard.LoraConfig(r=2)))
    report = ard.parameters_report(model)
    assert (report.live, report.trainable) == (plain.live + out, plain.trainable + out)
    with pytest.raises(ValueError, match="lora_magnitude_vector"):
        ard.attach(model, torch.optim.SGD([p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    controller = ard.attach(model, optimizer)
    before = model.q_proj.lora_magnitude_vector.detach().clone()
    model(torch.randn(3, 32)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.q_proj.lora_magnitude_vector, before)
    assert controller.summary()["phase"] == "fixed"


def test_bf16_base_keeps_an_unrounded_magnitude_and_unwrap_gives_the_base_back() -> None:
    original = Attention().bfloat16()
    model = ard.wrap(copy.deepcopy(original), ard.DoraConfig(r=2))
    x = torch.randn(3, 32).bfloat16()
    assert torch.equal(model(x), original(x))
    magnitude = model.q_proj.lora_magnitude_vector.detach().clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.q_proj.lora_magnitude_vector, magnitude)
    ard.unwrap(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_base_without_a_dense_weight_is_refused() -> None:
    class Odd(nn.Module):
        in_features = out_features = 8

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match="DoRA needs base layers with a dense weight, got Odd"):
        ard.wrap(nn.Sequential(Odd()), ard.DoraConfig())


def test_rslora_equals_peft() -> None:
    base = nn.Sequential(nn.Linear(12, 20))
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=5, lora_alpha=7, use_rslora=True, target_modules=["0"])
    )
    ours = ard.wrap(base, ard.LoraConfig(r=5, lora_alpha=7, use_rslora=True))
    layer = ard.adapters(ours)["0"]
    assert layer.scaling == pytest.approx(7 / 5**0.5)
    values = dict(theirs.named_parameters())
    with torch.no_grad():
        values["base_model.model.0.lora_B.default.weight"].normal_()
        layer.lora_A[:5] = values["base_model.model.0.lora_A.default.weight"]
        layer.lora_B[:5] = values["base_model.model.0.lora_B.default.weight"].T
    x = torch.randn(4, 12)
    torch.testing.assert_close(ours(x), theirs(x))


def test_loraplus_groups() -> None:
    model = ard.wrap(Attention(), ard.DoraConfig(r=2, modules_to_save=["up"]))
    groups = ard.loraplus_param_groups(model, 1e-3, ratio=8.0, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (8e-3, 0.1)]
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(map(id, trainable(model)))
    assert {id(p) for p in groups[1]["params"]} == {id(layer.lora_B) for layer in ard.adapters(model).values()}
    ard.attach(model, torch.optim.AdamW(groups))
    with pytest.raises(ValueError, match="lr must be > 0, got 0"):
        ard.loraplus_param_groups(model, 0.0)
    with pytest.raises(ValueError, match="ratio must be > 0, got -1"):
        ard.loraplus_param_groups(model, 1e-3, ratio=-1.0)
    with pytest.raises(ValueError, match="must be wrapped"):
        ard.loraplus_param_groups(Attention(), 1e-3)
