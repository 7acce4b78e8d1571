"""What `LoraLinear` keeps for backward beyond its frozen base, and that recomputation and autocast change nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.native.units import UnitLayout

M, K, N, R = 96, 64, 48, 4
LAYOUT = UnitLayout("out_heads", "shared", 4, K, N)
Forward = Callable[[torch.Tensor], torch.Tensor]


def make_layer(dtype: torch.dtype, dropout: float = 0.0, path: str = "plain") -> LoraLinear:
    base = nn.Linear(K, N).to(dtype).requires_grad_(False)
    if path == "hooked":  # so that the adapter accumulates into what the base returns
        base.register_forward_hook(lambda _module, _args, _out: None)
    layer = LoraLinear(base, LAYOUT, R, 0.7, lora_dropout=dropout, gate="controlled")
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer.train()


def saved_bytes(forward: Forward, x: torch.Tensor, own: list[torch.Tensor]) -> int:
    """Return the bytes of the storages that autograd holds for backward, without x's and those in `own`."""
    known = {t.untyped_storage().data_ptr() for t in [x, *own]}
    held: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # alive, so that an address is not used twice

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward(x)
    return sum(held.values())


def autocast(enabled: bool) -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16) if enabled else nullcontext()


@pytest.mark.parametrize("path", ["plain", "hooked"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_h_is_saved_beyond_the_input(dtype: torch.dtype, dropout: float, path: str) -> None:
    layer = make_layer(dtype, dropout, path)
    own = [*layer.parameters(), *layer.buffers(), layer.rank_table]
    x = torch.randn(M, K).to(dtype).requires_grad_()
    base = saved_bytes(layer.base_layer, x, own)
    assert saved_bytes(layer, x, own) - base == 4 * M * layer.table.hidden


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_autocast_saves_the_input_once_in_bfloat16(dropout: float) -> None:
    layer = make_layer(torch.float32, dropout)
    own = [*layer.parameters(), *layer.buffers(), layer.rank_table]
    x = torch.randn(M, K, requires_grad=True)
    with autocast(enabled=True):
        base = saved_bytes(layer.base_layer, x, own)
        ours = saved_bytes(layer, x, own)
    assert ours - base <= 2 * M * K + 4 * M * layer.table.hidden + 8  # a seed


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_checkpointing_saves_nothing(dropout: float, use_reentrant: bool) -> None:
    layer = make_layer(torch.float32, dropout)
    own = [*layer.parameters(), *layer.buffers(), layer.rank_table]
    x = torch.randn(M, K, requires_grad=True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(layer, x, use_reentrant=use_reentrant)
        return out

    rng = torch.get_rng_state().nbytes  # it restores the dropout's seed
    assert saved_bytes(forward, x, own) <= rng


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("path", ["plain", "hooked"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_checkpointing_under_autocast_is_bitwise_the_same(
    use_reentrant: bool, mixed: bool, dropout: float, path: str
) -> None:
    layer = make_layer(torch.float32, dropout, path)
    x, dy = torch.randn(M, K), torch.randn(M, N)

    def run(forward: Forward) -> list[torch.Tensor]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        with autocast(mixed):
            y = forward(leaf)
        y.backward(dy.to(y.dtype))
        grads = [leaf.grad, layer.lora_A.grad, layer.lora_B.grad]
        assert all(g is not None for g in grads)
        return [y.detach(), *(g.clone() for g in grads if g is not None)]

    expected = run(layer)
    ours = run(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    for name, a, b in zip(("y", "dx", "dA", "dB"), ours, expected, strict=True):
        assert torch.equal(a, b), name
