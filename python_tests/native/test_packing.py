"""Layers that read the same tensor add up its gradient in one buffer: same outputs, same gradients, nothing kept."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ardlora_ext as ard

K = 24


class Block(nn.Module):
    """q, k and v read x, or k and v another tensor, as in cross-attention; o reads what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, n) for n in (K, 16, 16))
        self.o = nn.Linear(K, K, bias=False)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """Return [..., K]."""
        memory = x if other is None else other
        mixed = torch.tanh(self.q(x)) * (self.k(memory) * self.v(memory)).mean(-1, keepdim=True)
        out: torch.Tensor = self.o(mixed)
        return out


def make(packed: bool, dtype: torch.dtype = torch.float32, **options: Any) -> Block:
    """A wrapped block; blocks of the same arguments are equal."""
    torch.manual_seed(0)
    model = ard.wrap(
        Block().to(dtype), ard.LoraConfig(r=3, target_modules=["q", "k", "v", "o"], packed=packed, **options)
    )
    for layer in ard.adapters(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def gradients(
    model: nn.Module, x: torch.Tensor, run: Callable[..., torch.Tensor] | None = None, *more: torch.Tensor
) -> list[torch.Tensor]:
    """Return output, and gradients of the inputs and all parameters. The inputs are results, not leaves."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *more)]
    y = (run or model)(*(2.0 * leaf for leaf in leaves))
    y.float().square().sum().backward()
    found = [y.detach(), *(leaf.grad for leaf in leaves), *(p.grad for p in model.parameters() if p.requires_grad)]
    model.zero_grad()
    return found


def aliases(y: torch.Tensor) -> int:
    """Count the aliases in the graph of y."""
    seen, queue = set(), [y.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [following for following, _ in node.next_functions]
    return sum("Alias" in node.name() for node in seen)


def assert_same(got: list[torch.Tensor], wanted: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Outputs are equal bit for bit, gradients to rounding."""
    assert torch.equal(got[0], wanted[0])
    scale = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=scale, atol=scale * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(7, K), (2, 5, K)])
def test_same_results(dtype: torch.dtype, dropout: float, shape: tuple[int, ...]) -> None:
    found = []
    for packed in (True, False):
        model = make(packed, dtype, lora_dropout=dropout)
        torch.manual_seed(1)
        x = torch.randn(shape, dtype=dtype)
        found.append(gradients(model, x))
    assert_same(*found, dtype)


def test_one_alias_for_each_tensor() -> None:
    model, x = make(True), torch.randn(5, K, requires_grad=True)
    assert aliases(model(2.0 * x)) == 2  # of x, and of what o reads
    assert aliases(model(2.0 * x)) == 1  # o was alone with it
    assert aliases(model(x.detach())) == 0
    assert aliases(make(True)(2.0 * x, 3.0 * x)) == 3
    assert aliases(make(False)(2.0 * x)) == 0
    assert aliases(make(True, torch.bfloat16)(x.bfloat16())) == 0  # does not pay there
    with torch.no_grad():
        assert model(x).grad_fn is None


def test_a_layer_that_left_computes_the_same_bits() -> None:
    model, x = make(True), torch.randn(5, K)
    first, second = gradients(model, x), gradients(model, x)
    assert model.o.readers is None
    assert model.q.readers is model.v.readers is not None
    assert all(map(torch.equal, first, second))


def test_layers_share_one_cast_under_autocast() -> None:
    model, x = make(True), torch.randn(5, K, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        for layer in (model.q, model.k, model.v):
            assert "LoraLinear" in layer(x).grad_fn.name()
    copies = {t.data_ptr() for t in kept if t.shape == x.shape and t.dtype == torch.bfloat16}
    assert len(copies) == 1
    assert not any(t.shape == x.shape and t.dtype == torch.float32 for t in kept)


def test_cross_attention() -> None:
    x, memory = torch.randn(5, K), torch.randn(5, K)
    assert_same(*(gradients(make(packed), x, None, memory) for packed in (True, False)))


def test_a_tensor_changed_in_place_is_another_one() -> None:
    found = []
    for model in (make(True), make(False)):
        x = torch.ones(3, K, requires_grad=True)
        y = 1.0 * x
        model.q(y)
        y.mul_(2.0)
        k = model.k(y)
        k.sum().backward()
        found.append([k.detach(), x.grad])
    assert_same(*found)


def test_a_pass_that_needs_no_dx_leaves_nothing_behind() -> None:
    found = []
    for packed in (True, False):
        model, x = make(packed), torch.randn(5, K, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = model(2.0 * x).square().sum()
        factors = [model.q.lora_A, model.v.lora_B]
        torch.autograd.grad(y, factors, retain_graph=True)
        y.backward(retain_graph=True)
        y.backward()  # twice: gradients add up
        assert x.grad is not None
        found.append([y.detach(), x.grad, model.k.lora_A.grad])
    assert_same(*found)


def test_outputs_that_nobody_uses() -> None:
    found = []
    for model in (make(True), make(False)):
        x = torch.ones(4, K, requires_grad=True)
        y = 2.0 * x
        _, k, _ = model.q(y), model.k(y), model.v(y)
        (k.sum() + y.sum()).backward()
        found.append([k.detach(), x.grad])
    assert_same(*found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    model = make(True, lora_dropout=0.2)
    x = torch.randn(5, K)
    found = []
    for run in (model, lambda t: checkpoint(model, t, use_reentrant=reentrant)):
        torch.manual_seed(3)
        found.append(gradients(model, x, run))
    assert_same(*found)


def test_hooks_and_modes_see_the_whole_gradient() -> None:
    model, seen = make(True), []
    x = torch.randn(5, K, requires_grad=True)
    inner = 2.0 * x
    inner.register_hook(seen.append)  # type: ignore[no-untyped-call]
    inner.retain_grad()
    y = model(inner).square().sum() + inner.sum()
    with FlopCounterMode(display=False):
        y.backward()
    assert x.grad is not None
    assert len(seen) == 1
    assert torch.equal(2.0 * seen[0], x.grad)
    assert torch.equal(seen[0], inner.grad)
    plain = make(False)
    wanted = torch.autograd.grad(plain(t := inner.detach().requires_grad_()).square().sum() + t.sum(), t)[0]
    torch.testing.assert_close(seen[0], wanted, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_alive() -> None:
    model = make(True)
    x = 2.0 * torch.randn(5, K, requires_grad=True)
    y, gone = model(x), weakref.ref(x)
    del x, y
    gc.collect()
    assert gone() is None


def test_copies_share_among_themselves() -> None:
    model, x = make(True), torch.randn(5, K, requires_grad=True)
    with torch.no_grad():
        y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.q.readers is other.v.readers is not model.q.readers
        found = other(x)
        assert torch.equal(found, y)
        assert aliases(found) == 2
