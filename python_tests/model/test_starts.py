"""Starting points: orthogonal rows, PiSSA against PEFT's, gradient directions against a dense SVD."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import ardlora_ext as ard
from ardlora_ext.layers.pissa import PissaLinear
from ardlora_ext.native import reference
from ardlora_ext.ranks import resize
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate

from helpers.models import Attention, Batch, trainable

# PEFT warns that it will stop setting `is_gradient_checkpointing`; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

KINDS: list[dict[str, Any]] = [
    {},
    {"granularity": "head", "head_dim": 8},
    {"granularity": "head", "head_dim": 8, "factoring": "independent"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [1, 5])
def test_orthogonal_rows(kind: dict[str, Any], r: int) -> None:
    model = Attention()
    x = torch.randn(3, 32)
    before = model(x)
    ard.wrap(model, ard.LoraConfig(r=r, init="orthogonal", **kind))
    assert torch.equal(model(x), before)
    for layer in ard.adapters(model).values():
        for a_rows, _, _, _ in reference.unit_slices(layer.layout, layer.ranks):
            rows = layer.lora_A[a_rows]
            torch.testing.assert_close(rows @ rows.T, torch.eye(r) / 3.0, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_pissa_starts_at_the_principal_components(kind: dict[str, Any]) -> None:
    model = Attention()
    original = copy.deepcopy(model)
    x = torch.randn(3, 32)
    before = model(x)
    ard.wrap(model, ard.LoraConfig(r=5, lora_alpha=7, init="pissa", **kind))
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    for layer in ard.adapters(model).values():
        assert isinstance(layer, PissaLinear)
        assert not layer.get_delta_weight().any()
        start = reference.lora_delta(
            layer.layout, layer.ranks, layer.lora_A.detach(), layer.lora_B.detach(), None, layer.scaling
        )
        weight = layer.base_layer.weight
        whole = layer.layout.shared or layer.layout.units == 1
        for _, _, cols, out in reference.unit_slices(layer.layout, layer.ranks)[: 1 if whole else None]:
            part = (slice(None), slice(None)) if whole else (out, cols)
            u, s, vh = torch.linalg.svd(weight[part])
            torch.testing.assert_close(start[part], (u[:, :5] * s[:5]) @ vh[:5], rtol=1e-4, atol=1e-5)
    ard.unwrap(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


@pytest.mark.parametrize("kind", [{}, {"granularity": "head"}, {"granularity": "head", "factoring": "independent"}])
def test_pissa_trains_saves_loads_and_merges(
    architecture: tuple[nn.Module, Batch], kind: dict[str, Any], tmp_path: Path
) -> None:
    model, batch = architecture
    base = copy.deepcopy(model)
    ard.wrap(model, ard.LoraConfig(r=3, init="pissa", **kind))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model(**batch).logits
    assert (expected - base(**batch).logits).abs().max() > 1e-2
    ard.save_pretrained(model, tmp_path)
    again = ard.load_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(**batch).logits, expected)
    other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(other(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    merged = ard.merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_pissa_step_equals_peft() -> None:
    torch.manual_seed(4)
    base = nn.Sequential(nn.Linear(12, 20))
    ours = ard.wrap(copy.deepcopy(base), ard.LoraConfig(r=5, lora_alpha=7, init="pissa"))
    config = peft.LoraConfig(r=5, lora_alpha=7, init_lora_weights="pissa", target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    x, target = torch.randn(8, 12), torch.randn(8, 20)
    outputs = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)  # the same whatever the signs of singular vectors
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
        outputs.append(model(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_pissa_is_copied_and_refused_where_ranks_move() -> None:
    model = ard.wrap(Attention(), ard.LoraConfig(r=3, init="pissa"))
    with torch.no_grad():
        model.q_proj.lora_B.add_(0.1)
    clone = copy.deepcopy(model)
    x = torch.randn(2, 32)
    assert torch.equal(clone(x), model(x))
    with pytest.raises(ValueError, match="must not start from pissa"):
        ard.svd_prune(model, {"q_proj": [1]})
    for config in (ard.ArdConfig, ard.DoraConfig):
        with pytest.raises(ValueError, match="init must be one of 'default', 'orthogonal', 'gradient', got 'pissa'"):
            config(init="pissa")
    with pytest.raises(ValueError, match="ElaConfig: init must be one of 'default', got 'gradient'"):
        ard.ElaConfig(init="gradient")

    class Odd(nn.Module):
        in_features = out_features = 8

    with pytest.raises(ValueError, match="init='pissa' needs base layers with a dense weight, got Odd"):
        ard.wrap(nn.Sequential(Odd()), ard.LoraConfig(init="pissa"))


def dense_gradients(model: nn.Module, batches: list[Batch], names: list[str]) -> dict[str, torch.Tensor]:
    """dL/dW [N, K] of each module, summed over the batches."""
    modules = dict(model.named_modules())
    for batch in batches:
        model(**batch).loss.backward()
    found = {}
    for name in names:
        grad = modules[name].weight.grad
        found[name] = grad.T if isinstance(modules[name], Conv1D) else grad
    return found


@pytest.mark.parametrize("kind", [{}, {"granularity": "head"}, {"granularity": "head", "factoring": "independent"}])
@pytest.mark.parametrize("method", [ard.LoraConfig, ard.DoraConfig])
def test_gradient_start_is_the_dense_svd(
    architecture: tuple[nn.Module, Batch], kind: dict[str, Any], method: type[ard.LoraConfig]
) -> None:
    model, batch = architecture
    second = {k: v.flip(0) for k, v in batch.items()}
    reference_model = copy.deepcopy(model)
    ard.wrap(model, method(r=3, init="gradient", **kind))
    layers = ard.adapters(model)
    before = model(**batch).logits
    marker = next(iter(layers.values())).lora_A
    marker.grad = torch.ones_like(marker)
    with pytest.raises(ValueError, match="init='gradient' must get its directions first"):
        ard.attach(model, torch.optim.AdamW(trainable(model)))
    ard.init_from_gradients(model, [batch, second])
    assert torch.equal(model(**batch).logits, before)
    assert marker.grad is not None
    assert (marker.grad == 1).all()
    assert all(p.grad is None for p in model.parameters() if p is not marker)
    ard.attach(model, torch.optim.AdamW(trainable(model)))
    for name, gradient in dense_gradients(reference_model, [batch, second], list(layers)).items():
        layer = layers[name]
        whole = layer.layout.shared or layer.layout.units == 1
        for u, (a_rows, _, cols, out) in enumerate(reference.unit_slices(layer.layout, layer.ranks)):
            rows = layer.lora_A.detach()[a_rows]
            g = gradient if whole else gradient[out, cols]
            sigma, vh = torch.linalg.svd(g)[1:]
            if sigma[2] < 1e-3 * sigma[0]:
                continue  # directions of noise
            if layer.layout.gate_on_a:  # cut out of the directions of the whole matrix
                if u:
                    continue
                a = torch.cat(
                    [layer.lora_A.detach()[s[0]] for s in reference.unit_slices(layer.layout, layer.ranks)], 1
                )
                rows = a / math.sqrt(layer.layout.units)
            torch.testing.assert_close(rows @ rows.T, torch.eye(3) / 3.0, rtol=1e-4, atol=1e-4)
            kept = (g @ (rows.T * math.sqrt(3.0))).square().sum()
            best = sigma[:3].square().sum()
            assert kept >= 0.995 * best, f"{name}: {kept / best}"
    assert vh.shape


def test_gradient_start_with_a_loss_of_ones_own_and_errors() -> None:
    model = ard.wrap(Attention(), ard.ArdConfig(mode="paper", r0=2, granularity="matrix", init="gradient"))
    x = torch.randn(6, 32)

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = module(batch).square().mean()
        return out

    before = model.up.lora_A.clone()
    with pytest.raises(ValueError, match="gradients must be finite"):
        ard.init_from_gradients(model, [x * float("nan")], loss)
    with pytest.raises(ValueError, match="must not be all zero"):
        ard.init_from_gradients(model, [x], lambda m, b: (m(b) * 0.0).sum())
    with pytest.raises(ValueError, match="batches must not be empty"):
        ard.init_from_gradients(model, [], loss)
    assert torch.equal(model.up.lora_A, before)
    ard.init_from_gradients(model, (b for b in (x, -x)), loss)
    assert not torch.equal(model.up.lora_A, before)
    again = ard.wrap(Attention(), ard.LoraConfig(r=2))
    with pytest.warns(UserWarning, match="no gradient reached o_proj, up, down"):
        ard.init_from_gradients(again, [x], lambda m, b: m.q_proj(b).square().mean())
    nn.init.ones_(again.up.lora_B)
    with pytest.raises(ValueError, match="must not be trained yet"):
        ard.init_from_gradients(again, [x], loss)
    with pytest.raises(ValueError, match="must start from lora_B = 0, got ElaConfig"):
        ard.init_from_gradients(ard.wrap(Attention(), ard.ElaConfig(r=2)), [x], loss)


def test_gradient_start_leaves_rank_zero_units_alone() -> None:
    model = ard.wrap(Attention(), ard.LoraConfig(r=2, granularity="head", head_dim=8, factoring="independent"))
    resize.apply(model, RankUpdate({"q_proj": tuple(UnitUpdate((0,) * r) for r in (1, 0, 1, 0))}))
    ard.init_from_gradients(model, [torch.randn(6, 32)], lambda m, b: m(b).square().mean())
    torch.testing.assert_close(model.q_proj.lora_A[:2].norm(dim=1), torch.full((2,), 1 / math.sqrt(3)))
    assert not model.q_proj.lora_A[2:].any()
