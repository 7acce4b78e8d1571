"""Nothing unchecked reaches a kernel: what is read by address has the dtype, length and layout that it is read with."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext.native import dispatch, ops
from ardlora_ext.native.compiled import core, matrix
from ardlora_ext.native.units import UnitLayout

from helpers.models import Attention, trainable

LAYOUT = UnitLayout("out_heads", "shared", 2, 8, 6)
RANKS = [2, 1]


def call(**changes: torch.Tensor) -> Any:
    """One product whose gate or factors are not as they should be."""
    given: dict[str, torch.Tensor] = {
        "lora_A": torch.randn(4, 8),
        "lora_B": torch.randn(4, 3),
        "gate": torch.rand(4),
        **changes,
    }
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8)
    return ops.lora_linear(x, weight, None, *given.values(), LAYOUT.encode(RANKS), 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": torch.rand(4).double()}, "gate must be contiguous float32 .* got torch.float64"),
        ({"gate": torch.rand(4).bfloat16()}, "gate must be contiguous float32 .* got torch.bfloat16"),
        ({"gate": torch.rand(8)[::2]}, r"gate must be contiguous float32 .* strides \(2,\)"),
        ({"gate": torch.rand(2)}, "gate must have at least 3 entries, got 2"),
        ({"lora_A": torch.randn(8, 4).T}, "lora_A and lora_B must be contiguous"),
        ({"lora_A": torch.randn(4, 16)[:, ::2]}, "lora_A and lora_B must be contiguous"),
        ({"lora_A": torch.randn(1, 8)}, "lora_A must have at least 2 rows, got 1"),
        ({"lora_B": torch.randn(4, 3).double()}, "dtype must be float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_buffers_are_refused_before_they_are_read(changes: dict[str, torch.Tensor], message: str) -> None:
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_the_core_refuses_numbers_that_no_unit_has() -> None:
    for ranks, message in (([1 << 40], "ranks must be at most"), ([-1], "ranks must be >= 0")):
        with pytest.raises(ValueError, match=message):
            core.UnitTable(0, 0, 8, 8, ranks)
    for codes, message in (((7, 0), "kind must be 0 to 3, got 7"), ((0, 9), "factoring must be 0 or 1, got 9")):
        with pytest.raises(ValueError, match=message):
            core.UnitTable(*codes, 8, 8, [1])
    with pytest.raises(ValueError, match="sizes must be at most"):
        core.UnitTable(0, 0, 1 << 40, 8, [1])
    empty, x = core.UnitTable(0, 0, 8, 8, [0]), torch.zeros(2, 8)
    with pytest.raises(ValueError, match="h must have columns, got -1"):
        core.shrink(empty, True, matrix(torch.zeros(0, 8)), 0, 1.0, matrix(x), (0, 2, -1, 0, 0), 1)


@pytest.mark.parametrize("rho", [float("nan"), float("inf"), -float("inf")])
def test_soft_ranks_must_be_finite(rho: float) -> None:
    gates = np.zeros(4, dtype=np.float32)
    blocks = np.array([[gates.ctypes.data, 4]], dtype=np.int64)
    for native in (core.set_gates, lambda *given: dispatch.set_gates(*given, torch.device("cpu"))):
        with pytest.raises(ValueError, match="soft ranks must be finite"):
            native(blocks, np.array([rho]), 0, 0.1, 0.5)
    with pytest.raises(ValueError, match="counts must be >= 0"):
        core.set_gates(np.array([[gates.ctypes.data, -1]], dtype=np.int64), np.array([1.0]), 0, 0.1, 0.5)
    live, one = np.array([4], dtype=np.int64), np.ones((1, 4))
    with pytest.raises(ValueError, match="soft ranks must be finite"):
        core.secant_slopes(np.zeros(4, np.float32), live, np.array([rho]), one, np.zeros(1), 0.9)
    assert not gates.any()


METHODS: dict[str, Callable[[], ard.AdapterConfig]] = {
    "ard": lambda: ard.ArdConfig(mode="paper", granularity="head", r0=2, head_dim=8),
    "elalora": lambda: ard.ElaConfig(r=2, b=1, total_steps=30),
    "adalora": lambda: ard.AdaConfig(init_r=3, target_r=2, total_steps=30),
    "dora": lambda: ard.DoraConfig(r=2, init="orthogonal"),
}


@pytest.fixture
def defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def trained(method: str, before: Callable[[], object], cast: Callable[[nn.Module], object]) -> torch.Tensor:
    """What a model computes that three steps have changed."""
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 32)
    before()
    ard.wrap(model, METHODS[method]())
    cast(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    ard.attach(model, optimizer, total_steps=30)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    found: torch.Tensor = model(x).detach()
    return found


def nothing(*_: object) -> None: ...


@pytest.mark.usefixtures("defaults")
@pytest.mark.parametrize("method", METHODS)
def test_defaults_of_torch_change_nothing(method: str) -> None:
    expected = trained(method, nothing, nothing)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(trained(method, lambda dtype=dtype: torch.set_default_dtype(dtype), nothing), expected)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(trained(method, lambda: torch.set_default_device("meta"), nothing), expected)


def cast_all(model: nn.Module) -> None:
    for p in trainable(model):
        p.data = p.data.to(torch.bfloat16)


def assign_all(model: nn.Module) -> None:
    state = {name: value.to(torch.bfloat16) if value.is_floating_point() else value
             for name, value in model.state_dict().items()}  # fmt: skip
    model.load_state_dict({name: v for name, v in state.items() if "base_layer" not in name}, strict=False, assign=True)


@pytest.mark.filterwarnings("ignore:attach. adapters in torch.bfloat16 lose updates")
@pytest.mark.parametrize("cast", [cast_all, assign_all])
@pytest.mark.parametrize("method", ["ard", "elalora", "adalora"])
def test_adapters_cast_to_bfloat16_compute_what_they_hold(method: str, cast: Callable[[nn.Module], object]) -> None:
    expected = trained(method, nothing, nothing)
    found = trained(method, nothing, cast)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


def test_threads_that_share_a_model_share_no_gradients() -> None:
    torch.manual_seed(0)
    model = ard.wrap(Branches(), ard.LoraConfig(r=2))
    inputs = [torch.randn(8, 32) for _ in range(4)]
    expected = [gradient(model, x) for x in inputs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(100):
            if not torch.equal(gradient(model, inputs[i]), expected[i]):
                wrong.append(i)

    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


class Branches(nn.Module):
    """Three layers that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = (self.q(x).tanh() + self.k(x).tanh()) * self.v(x)
        return found


def gradient(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x.tanh()).sum(), x)[0]
