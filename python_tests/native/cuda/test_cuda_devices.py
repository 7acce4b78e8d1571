"""What is asked of a CUDA device before it is used, tables kept there, and graphs, without a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ardlora_ext as ard
from ardlora_ext.layers import linear
from ardlora_ext.layers.adapted_weight import Call
from ardlora_ext.layers.experts import ExpertStack
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.layers.routing import Routing
from ardlora_ext.native import dispatch, transfers
from ardlora_ext.native.compiled import core
from ardlora_ext.native.transfers import DeviceTables
from ardlora_ext.native.units import UnitLayout

from helpers.experts import tiny_experts
from helpers.far_device import FAR, far_device
from helpers.models import Attention

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("facts", "rule"),
    [
        ((13000, 13000, 90, True), ""),
        ((12040, 12080, 80, True), ""),  # CUDA's minor versions go together
        ((13010, 13000, 120, True), ""),
        ((12040, 13000, 0, False), "be on the CPU, the driver is for CUDA 12.4 and this build needs 13.0 or newer"),
        ((0, 13000, 0, False), "be on the CPU, the driver is for CUDA 0.0 and this build needs 13.0 or newer"),
        (
            (13000, 13000, 75, False),
            "be on the CPU, the device has compute capability 7.5 and the kernels need 8.0",
        ),
        (
            (13000, 13000, 80, False),
            "be on the CPU, this build has no kernels for compute capability 8.0 "
            r"\(see CMAKE_CUDA_ARCHITECTURES in docs/cuda.md\)",
        ),
    ],
)
def test_a_device_is_judged_by_what_it_and_its_driver_say(facts: tuple[int, int, int, bool], rule: str) -> None:
    assert core.cuda_problem_of(*facts) == rule.replace("\\", "")


def test_wrap_refuses_a_device_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = core.cuda_problem_of(13000, 13000, 75, False)
    with far_device():
        monkeypatch.setattr(dispatch.core, "cuda_problem", lambda _device: rule)
        model = Attention().to(FAR)
        before = [name for name, _ in model.named_modules()]
        with pytest.raises(ValueError, match=r"wrap: parameters must be on the CPU.* 7\.5 .*got 'q_proj' on meta"):
            ard.wrap(model, ard.LoraConfig(r=4))
        assert [name for name, _ in model.named_modules()] == before


def test_an_unused_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        cuda_built = staticmethod(lambda: True)
        cuda_problem = staticmethod(lambda _device: core.cuda_problem_of(12040, 13000, 0, False))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "core", Core)
    with pytest.warns(
        UserWarning, match=r"the GPU is not used, tensors must be on the CPU, the driver is for CUDA 12\.4"
    ):
        assert dispatch.best_device() == CPU
    Core.cuda_problem = staticmethod(lambda _device: "")  # type: ignore[assignment]
    assert dispatch.best_device() == torch.device("cuda")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Tables that were copied to a device."""
    found: list[Any] = []

    def copied(words: Any, device: torch.device) -> tuple[torch.Tensor, object]:
        found.append(words)
        return torch.from_numpy(words), "made"

    monkeypatch.setattr(transfers, "_copied", copied)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(wait_event=lambda _event: None))
    return found


def capture(monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    monkeypatch.setattr(transfers, "is_capturing", lambda: capturing)


def test_a_graph_finds_the_tables_of_its_warm_up(copies: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tables, words = DeviceTables(2), np.arange(4)
    warm = tables.get("op", "a", lambda: words, CPU, 1)
    capture(monkeypatch, True)
    assert tables.get("op", "a", lambda: words, CPU, 2) is warm  # torch captures on a stream of its own
    assert len(copies) == 1
    with pytest.raises(RuntimeError, match="op: a graph must be captured after a warm-up with these ranks"):
        tables.get("op", "b", lambda: words, CPU, 2)
    capture(monkeypatch, False)
    for key in "bcde":
        tables.get("op", key, lambda: words, CPU, 1)
    assert tables.get("op", "a", lambda: words, CPU, 1) is warm  # the graph still reads it
    assert len(copies) == 5
    tables.get("op", "b", lambda: words, CPU, 1)  # more than two were asked for since
    assert len(copies) == 6


def test_a_table_waits_for_every_stream_that_reads_it(copies: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, waited = list[Any](), list[Any]()
    stream = SimpleNamespace(wait_event=waited.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _self, stream: recorded.append(stream))
    tables = DeviceTables(2)
    for handle in (1, 2, 2, 1):
        tables.get("op", "a", lambda: np.arange(4), CPU, handle)
    assert recorded == [stream]  # once; the one that it was made on, the allocator knows
    assert waited == ["made"]  # on the device; the host goes on
    capture(monkeypatch, True)
    tables.get("op", "a", lambda: np.arange(4), CPU, 3)
    assert waited == ["made"]  # an event of before is no part of a graph


def layer_with_dropout(kind: str) -> LoraLinear:
    model = tiny_experts("mixtral") if kind == "experts" else Attention()
    model = ard.wrap(model, ard.LoraConfig(r=4, lora_dropout=0.5))
    return next(a for a in ard.adapters(model).values() if isinstance(a, ExpertStack) == (kind == "experts"))


@pytest.mark.parametrize("kind", ["matrix", "experts"])
def test_a_captured_graph_draws_its_seed_on_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_with_dropout(kind).train()
    monkeypatch.setattr(linear, "is_capturing", lambda: True)

    def draw() -> object:
        return Call(layer, Routing([])).dropout[1] if isinstance(layer, ExpertStack) else layer._draw()[1]

    assert isinstance(draw(), int)
    with far_device():
        layer.lora_A = torch.nn.Parameter(torch.zeros(4, 8, device=FAR))
        monkeypatch.setattr(torch._subclasses.FakeTensor, "is_cuda", property(lambda t: t.device == FAR))
        seed = draw()
        assert isinstance(seed, torch.Tensor)
        assert (seed.device, seed.dtype, seed.dim()) == (FAR, torch.int64, 0)


def test_a_captured_graph_counts_tokens_in_place() -> None:
    layer = layer_with_dropout("experts").train()
    assert isinstance(layer, ExpertStack)
    call = Call(layer, Routing([]))
    rows = torch.arange(layer.layout.units)
    call._count(rows)
    counted = layer.tokens
    call._count(rows)
    assert layer.tokens is counted
    assert counted.tolist() == (2 * rows).tolist()


def test_nothing_of_the_host_follows_the_default_device() -> None:
    with torch.device("meta"):
        assert UnitLayout("matrix", "shared", 1, 8, 8).encode([4]).device == CPU
        model = ard.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8)).to_empty(device="cpu"), ard.LoraConfig(r=2))
    layer = next(iter(ard.adapters(model).values()))
    with torch.device("meta"):
        layer.lora_dropout = 0.5
        layer.set_ranks([1])
        assert isinstance(layer._draw()[1], int)
    assert {t.device for t in (*model.parameters(), layer.rank_table)} == {CPU}
