"""Adapted layers and models of any kind, in any state."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import ardlora_ext as ard
from ardlora_ext.layers.linear import Gate, LoraLinear
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.ranks import resize

K, N = 24, 20
LAYOUTS = [
    UnitLayout("matrix", "shared", 1, K, N),
    UnitLayout("out_heads", "shared", 4, K, N),
    UnitLayout("in_heads", "shared", 4, K, N),
    UnitLayout("out_heads", "independent", 4, K, N),
    UnitLayout("in_heads", "independent", 4, K, N),
]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda lay: f"{lay.kind}-{lay.factoring}")


def set_ranks(
    model: nn.Module, choose: Callable[[LoraLinear, int], int], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Give unit u of every adapter the rank `choose(layer, u)`."""
    modules = {}
    for name, layer in ard.adapters(model).items():
        pairs = [(now, choose(layer, u)) for u, now in enumerate(layer.ranks)]
        modules[name] = tuple(ard.UnitUpdate(tuple(range(min(now, to))), max(to - now, 0)) for now, to in pairs)
    resize.apply(model, ard.RankUpdate(modules), optimizer)


@torch.no_grad()
def scramble(model: nn.Module, seed: int = 0) -> None:
    """Give every adapter ragged ranks (0 among them), random factors and random gates."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    set_ranks(model, lambda layer, _: rng.randint(0, layer.max_rank))
    for layer in ard.adapters(model).values():
        for factor, rows in zip((layer.lora_A, layer.lora_B), layer.layout.rows(layer.ranks), strict=True):
            factor[:rows] = torch.randn(rows, factor.shape[1], generator=generator) / 4
        if layer.gate is not None:
            layer.gate[: sum(layer.ranks)] = torch.rand(sum(layer.ranks), generator=generator)


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Which modules and parameters a model is made of, what it trains, and every bit it holds."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modules": {name: id(module) for name, module in model.named_modules(remove_duplicate=False)},
        "parameters": {n: (id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)},
        "bits": {name: t.detach().clone().view(torch.uint8).tolist() for name, t in tensors.items() if not t.is_meta},
    }


class Affine(nn.Linear):
    """Not a plain linear layer, so the adapter must call it."""


class Scaled(nn.Linear):
    """A base whose backward needs its own output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(super().forward(x).mul(0.1))


def make_layer(
    layout: UnitLayout, path: str = "plain", dtype: torch.dtype = torch.float32, gate: Gate = "controlled"
) -> LoraLinear:
    base: nn.Module
    if path == "conv1d":
        base = Conv1D(N, K)
        nn.init.normal_(base.bias)
    else:
        base = (Affine if path == "subclass" else nn.Linear)(K, N)
    if path == "hooked":
        base.register_forward_hook(lambda _module, _args, _out: None)
    base.to(dtype).requires_grad_(path == "trainable")
    layer = LoraLinear(base, layout, 2, 0.7, max_rank=6, gate=gate)
    scramble(layer)
    return layer
