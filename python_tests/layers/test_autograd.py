"""What may follow an adapted layer in a graph: changes in place, second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ardlora_ext as ard

from helpers.adapters import LAYOUTS, K, make_layer, scramble


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 5, K), (2, 0, K), (2, 3, 4, K)])
@pytest.mark.parametrize("path", ["plain", "hooked", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_may_be_changed_in_place(shape: tuple[int, ...], path: str, dtype: torch.dtype) -> None:
    layer = make_layer(LAYOUTS[1], path).to(dtype)
    x = torch.randn(*shape, dtype=dtype)
    found = []
    for in_place in (False, True):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        assert not y._is_view()
        y = y.mul_(2) if in_place else y * 2
        y = nn.functional.relu(y, inplace=in_place)
        layer.zero_grad()
        y.square().sum().backward()
        found.append((y.detach(), leaf.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda lay: f"{lay.kind}-{lay.factoring}")
@pytest.mark.parametrize("gate", ["none", "controlled", "trained"])
@pytest.mark.parametrize("path", ["plain", "hooked"])
def test_second_derivatives_are_those_of_the_dense_layer(layout: object, gate: str, path: str) -> None:
    layer = make_layer(layout, path, gate=gate)
    x = torch.randn(3, 4, K)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]

    def penalty(dense: bool) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        base = layer.base_layer
        if dense:
            eye = torch.eye(K)
            weight = (layer(eye) - layer(torch.zeros(1, K))).T  # exact, and a function of the factors
            y = nn.functional.linear(leaf, weight, base.bias)
        else:
            y = layer(leaf)
        (slope,) = torch.autograd.grad(y.tanh().sum(), leaf, create_graph=True)
        loss = slope.square().sum() + y.square().sum()
        return list(torch.autograd.grad(loss, [leaf, *(layer.get_parameter(name) for name in names)]))

    for ours, theirs in zip(penalty(False), penalty(True), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_a_second_derivative_with_dropout_is_refused() -> None:
    model = ard.wrap(nn.Sequential(nn.Linear(8, 8)), ard.LoraConfig(r=2, lora_dropout=0.5)).train()
    scramble(model)
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match="without lora_dropout"):
        torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_second_derivatives_with_a_frozen_factor(frozen: str) -> None:
    layer = make_layer(LAYOUTS[0], "plain")
    layer.get_parameter(frozen).requires_grad_(False)
    x = torch.randn(3, K, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
    slope.square().sum().backward()
    other = layer.lora_B if frozen == "lora_A" else layer.lora_A
    assert other.grad is not None
    assert layer.get_parameter(frozen).grad is None
