"""The way of a CUDA tensor through ops, rank changes and controllers: on a GPU where there is one, and in the shim.

In the shim device memory is the host's; table, workspace, bindings, launchers and kernels are those of a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ardlora_ext as ard
from ardlora_ext.bench.gpu.context import HOST_RUN, HostRun, Skipped, build_host_run, host_run, load
from ardlora_ext.native import dispatch, ops
from ardlora_ext.native.compiled import core
from ardlora_ext.native.grouped import lora_grouped
from ardlora_ext.native.transfers import Fetched, sent
from ardlora_ext.native.units import UnitLayout

from helpers.models import Attention, trainable


@pytest.fixture(scope="module")
def simt_core(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bindings of the CUDA backend over the shim."""
    file = tmp_path_factory.mktemp("simt_module") / HOST_RUN
    try:
        build_host_run(file)
    except Skipped as why:
        pytest.skip(str(why))
    return load(file)


@pytest.fixture
def shim(simt_core: Any) -> Iterator[HostRun]:
    """Let every tensor pass for one on a CUDA device."""
    with host_run(simt_core) as backend:
        yield backend


@pytest.fixture(params=["shim", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the CUDA kernels run: on the host, every tensor taken for one on a CUDA device, or on a GPU."""
    if request.param == "shim":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, or a torch without CUDA")
    if not core.cuda_built():
        pytest.skip("this build has no CUDA kernels")
    return torch.device("cuda")


def cuda_from_now_on(device: torch.device, request: pytest.FixtureRequest) -> dict[str, int] | None:
    """Let the CUDA kernels do what follows; return where the shim counts its calls, None on a GPU."""
    return request.getfixturevalue("shim").calls if device.type == "cpu" else None


LAYOUTS = [
    UnitLayout("matrix", "shared", 1, 40, 56),
    UnitLayout("out_heads", "shared", 4, 40, 64),
    UnitLayout("in_heads", "shared", 4, 64, 40),
    UnitLayout("out_heads", "independent", 4, 40, 64),
]
Results = Sequence[torch.Tensor]


def results(
    layout: UnitLayout,
    dtype: torch.dtype,
    p: float,
    accumulate: bool,
    device: torch.device,
    ranks: Sequence[int] = (),
    rows: int = 7,
    biased: bool = False,
) -> Results:
    """y, and the gradients of x, the factors and the gates, from the same numbers each time."""
    generator = torch.Generator().manual_seed(5)
    ranks = ranks or ([5] if layout.units == 1 else [3, 0, 8, 5])
    a_rows, b_rows = layout.rows(ranks)

    def randn(*shape: int, to: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, to).requires_grad_()

    x, weight = randn(3, rows, layout.in_features, to=dtype), randn(layout.out_features, layout.in_features, to=dtype)
    a, b = randn(a_rows + 3, layout.a_width), randn(b_rows + 2, layout.b_width)
    gate = randn(len(a) if layout.gate_on_a else len(b))
    dropout = (p, torch.tensor(11)) if p > 0 else ops.NO_DROPOUT
    adapter = a, b, gate, layout.encode(ranks), 0.5, dropout
    if accumulate:
        y = ops.lora_accumulate(torch.nn.functional.linear(x, weight), x, *adapter)
    else:
        bias = randn(layout.out_features, to=dtype).detach() if biased else None
        y = ops.lora_linear(x, weight.detach(), bias, *adapter)
    y.backward(randn(*y.shape, to=dtype).detach())
    return [y.detach().cpu(), *(t.grad.cpu() for t in (x, a, b, gate) if t.grad is not None)]


@pytest.mark.parametrize("accumulate", [False, True], ids=["linear", "accumulate"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda lay: f"{lay.kind}-{lay.factoring}")
def test_ops_equal_the_cpu(
    device: torch.device,
    layout: UnitLayout,
    dtype: torch.dtype,
    p: float,
    accumulate: bool,
    request: pytest.FixtureRequest,
) -> None:
    expected = results(layout, dtype, p, accumulate, torch.device("cpu"))
    calls = cuda_from_now_on(device, request)
    got = results(layout, dtype, p, accumulate, device)
    assert calls is None or calls["cuda_lora_forward"] == calls["cuda_lora_backward"] == 1
    assert len(got) == len(expected) == 5
    # Adapters and H are rounded to the activations' type on their way: two roundings more than on the CPU.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        error = (ours.float() - theirs.float()).abs().max()
        assert error <= tolerance * theirs.float().abs().max()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda lay: f"{lay.kind}-{lay.factoring}")
def test_the_base_may_come_last(
    device: torch.device,
    layout: UnitLayout,
    dtype: torch.dtype,
    p: float,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = [5] if layout.units == 1 else [3, 1, 8, 5]
    first: list[Any] = []
    own = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: first.append(0) or own(*given))
    monkeypatch.setattr(dispatch, "BASE_LAST", True)
    expected = results(layout, dtype, p, False, torch.device("cpu"), ranks, biased=True)
    assert first == [0]  # the CPU has one order
    cuda_from_now_on(device, request)
    got = results(layout, dtype, p, False, device, ranks, biased=True)
    assert first == [0]
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max()
    for ours, again in zip(got, results(layout, dtype, p, False, device, ranks, biased=True), strict=True):
        assert torch.equal(ours, again)
    if layout.units > 1:  # what a unit without a rank would leave unwritten comes from the base
        results(layout, dtype, p, False, device, [3, 0, 8, 5])
        assert first == [0, 0]


# Sizes at which the kernels divide a sum over blocks, go round their loops, and need a second tile of ranks.
SIZES = [
    (UnitLayout("matrix", "shared", 1, 1032, 136), [70], 100, torch.bfloat16),
    (UnitLayout("matrix", "shared", 1, 136, 1032), [9], 300, torch.bfloat16),
    (UnitLayout("matrix", "shared", 1, 520, 264), [16], 171, torch.float32),
    (UnitLayout("matrix", "shared", 1, 264, 264), [130], 64, torch.float16),
    (UnitLayout("out_heads", "independent", 4, 264, 512), [16, 3, 0, 9], 171, torch.bfloat16),
    (UnitLayout("in_heads", "shared", 4, 512, 136), [16, 3, 0, 9], 171, torch.float32),
]
MANY = [  # the same on a GPU, which has many more multiprocessors
    (UnitLayout("matrix", "shared", 1, 4104, 4104), [70], 1400, torch.bfloat16),
    (UnitLayout("matrix", "shared", 1, 4096, 4096), [9], 1400, torch.bfloat16),
    (UnitLayout("matrix", "shared", 1, 4096, 2056), [16], 700, torch.float32),
]
PLANNED = re.compile(r"(\w+): blocks (\d+) x .*rank tile (\d+), shares (\d+) of (\d+)")


@pytest.mark.parametrize(("layout", "ranks", "rows", "dtype"), SIZES + MANY, ids=lambda value: str(value)[:40])
def test_sizes_that_divide_work_equal_the_cpu(
    device: torch.device,
    layout: UnitLayout,
    ranks: list[int],
    rows: int,
    dtype: torch.dtype,
    request: pytest.FixtureRequest,
) -> None:
    if device.type == "cpu" and rows > 400:
        pytest.skip("takes minutes in the shim")
    expected = results(layout, dtype, 0.3, False, torch.device("cpu"), ranks, rows)
    cuda_from_now_on(device, request)
    first = results(layout, dtype, 0.3, False, device, ranks, rows)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for ours, theirs in zip(first, expected, strict=True):
        assert (ours.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max()
    if device.type == "cuda":  # sums are added in one order
        for ours, again in zip(first, results(layout, dtype, 0.3, False, device, ranks, rows), strict=True):
            assert torch.equal(ours, again)


@pytest.mark.parametrize(
    ("facts", "sizes"), [((8, 164 * 1024), SIZES), ((132, 227 * 1024), SIZES + MANY)], ids=["shim", "H200"]
)
def test_the_sizes_divide_loop_and_split(facts: tuple[int, int], sizes: Any) -> None:
    divided, second_tile, looped = set[str](), set[str](), set[str]()
    for layout, ranks, rows, dtype in sizes:
        code = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]
        kinds = ["shrink", "expand", "outer", *(["outer_shrink"] if max(ranks) <= 16 and code else [])]
        for is_a, kind in product((True, False), kinds):
            found = PLANNED.match(core.cuda_gemm_plan(layout.table(ranks), is_a, kind, 3 * rows, code, False, facts))
            assert found is not None
            _, _, tile, shares, share = found.groups()
            divided |= {kind} if int(shares) > 1 else set()
            second_tile |= {kind} if int(tile) < max(ranks) else set()
            looped |= {kind} if int(share) >= (128 if "outer" in kind else 2) else set()
    assert divided == {"shrink", "outer", "outer_shrink"}
    assert second_tile >= {"shrink", "expand", "outer"}
    assert looped >= {"shrink", "outer", "outer_shrink"}


def grouped_results(dtype: torch.dtype, p: float, counts: Sequence[int], device: torch.device) -> Results:
    """As `results`, of experts with `counts` rows; three rows belong to none."""
    generator = torch.Generator().manual_seed(6)
    ranks = [3, 0, 8, 5]
    layout, live = UnitLayout("experts", "independent", 4, 40, 56), sum(ranks)

    def randn(*shape: int, to: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, to).requires_grad_()

    x, a, b, gate = randn(sum(counts) + 3, 40, to=dtype), randn(live + 2, 40), randn(live + 2, 56), randn(live + 2)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(device)
    dropout = (p, 11) if p > 0 else ops.NO_DROPOUT
    places = torch.randperm(len(x), generator=generator).to(device)
    y = lora_grouped(x, None, offsets, a, b, gate, layout.encode(ranks), 0.5, dropout, places)
    y.backward(randn(*y.shape, to=dtype).detach())
    return [y.detach().cpu(), *(t.grad.cpu() for t in (x, a, b, gate) if t.grad is not None)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [(5, 3, 0, 9), (0, 0, 0, 0), (300, 2, 140, 0)], ids=str)
def test_experts_equal_the_cpu(
    device: torch.device, dtype: torch.dtype, p: float, counts: Sequence[int], request: pytest.FixtureRequest
) -> None:
    expected = grouped_results(dtype, p, counts, torch.device("cpu"))
    calls = cuda_from_now_on(device, request)
    got = grouped_results(dtype, p, counts, device)
    assert calls is None or calls["cuda_lora_grouped_forward"] == calls["cuda_lora_grouped_backward"] == 1
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max()


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 11])
def test_rows_of_h_are_whole_pieces_of_16_bytes(rows: int, shim: HostRun) -> None:
    assert shim is not None
    layout, x = UnitLayout("matrix", "shared", 1, 16, 24), torch.randn(3, 16, requires_grad=True)
    factors = torch.zeros(rows, 16), torch.zeros(rows, 24)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.zeros(24, 16, dtype=dtype)
        adapter = *factors, None, layout.encode([min(rows, 3)]), 1.0, 0.0, None
        _, h = torch.ops.ardlora_ext.lora_linear(x.to(dtype), weight, None, *adapter)
        assert h.dtype == dtype
        assert h.stride(0) * h.element_size() % 16 == 0
        assert h.shape == ops._hidden_shape(x, *factors).shape  # as compiled code expects it


def test_a_seed_may_lie_on_the_device(device: torch.device, request: pytest.FixtureRequest) -> None:
    cuda_from_now_on(device, request)
    layout, shape = UnitLayout("matrix", "shared", 1, 40, 56), (6, 40)
    factors = torch.randn(4, 40).to(device), torch.randn(4, 56).to(device)

    def run(seed: int | torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(*shape, generator=generator).to(device).requires_grad_()
        y = ops.lora_linear(
            x, torch.zeros(56, 40).to(device), None, *factors, None, layout.encode([4]), 1.0, (0.5, seed)
        )
        y.sum().backward()
        assert x.grad is not None
        return torch.cat([y.detach().flatten(), x.grad.flatten()])

    there = torch.tensor(11, device=device)
    assert torch.equal(run(11), run(there))
    there.fill_(12)  # as a replay does
    assert torch.equal(run(12), run(there))
    assert not torch.equal(run(11), run(there))


def test_copies_are_of_the_moment_they_are_asked_for(device: torch.device) -> None:
    values = np.arange(1 << 16)
    there = sent(values.copy(), device)
    assert there.device.type == device.type
    asked = Fetched([2 * there, there[5], there.float().view(2, -1), torch.isfinite(there).all()])
    assert asked.there == (device.type == "cpu")
    there.zero_()  # queued behind the copies
    doubled, fifth, floats, finite = asked.values()
    assert {t.device.type for t in asked.values()} == {"cpu"}
    np.testing.assert_array_equal(doubled.numpy(), 2 * values)
    np.testing.assert_array_equal(floats.numpy().ravel(), values.astype(np.float32))
    assert bool(finite)
    assert fifth.dim() == 0
    assert device.type == "cpu" or int(fifth) == 5  # of the host's, what they are when they are read


def train(steps: int, device: torch.device) -> tuple[list[float], list[list[int]]]:
    """A few steps with rank changes; losses and ranks."""
    torch.manual_seed(1)
    config = ard.ArdConfig(
        mode="paper",
        granularity="head",
        r0=4,
        r_max=8,
        head_dim=8,
        total_steps=steps,
        l1=2e-2,
        lr_alpha=0.1,
        lora_dropout=0.1,
    )
    model = ard.wrap(Attention().to(device), config)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ard.attach(model, optimizer)
    x, losses = torch.randn(24, 32, generator=torch.Generator().manual_seed(2)).to(device), []
    for _ in range(steps):
        loss = (model(x) - x.flip(0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [layer.ranks for layer in ard.adapters(model).values()]


def test_training_with_rank_changes_follows_the_cpu(device: torch.device, request: pytest.FixtureRequest) -> None:
    expected, expected_ranks = train(30, torch.device("cpu"))
    calls = cuda_from_now_on(device, request)
    losses, ranks = train(30, device)
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    assert ranks == expected_ranks
    assert any(r != 4 for units in ranks for r in units)
    if calls is not None:
        assert {"cuda_row_dots", "cuda_set_gates", "cuda_rank_resize", "cuda_lora_backward"} <= calls.keys()


def test_devices_are_checked_before_anything_runs() -> None:
    layout = UnitLayout("matrix", "shared", 1, 8, 8)
    x, weight, factor = torch.zeros(2, 8), torch.zeros(8, 8), torch.zeros(4, 8)
    message = "lora_linear: tensors must be on the CPU, this build has no CUDA kernels, got meta"
    if core.cuda_built():
        message = "lora_linear: tensors must be on the CPU or a CUDA device, got meta"
    with pytest.raises(NotImplementedError, match=message):
        ops.lora_linear(x, weight, None, factor.to("meta"), factor, None, layout.encode([4]), 1.0)


def test_tensors_on_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_on_cuda", lambda device: device.type == "meta")
    monkeypatch.setattr(dispatch, "core", SimpleNamespace(cuda_built=lambda: True, cuda_problem=lambda _device: ""))
    with pytest.raises(ValueError, match="op: tensors must be on one device, got cpu and meta"):
        dispatch.check_device("op", torch.device("cpu"), torch.device("meta"), torch.device("cpu"))
