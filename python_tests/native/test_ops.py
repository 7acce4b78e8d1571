"""Native kernels against the float64 reference: every unit kind, ragged ranks, odd sizes, every instruction set."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ardlora_ext.native import ops, reference
from ardlora_ext.native.compiled import core, matrix
from ardlora_ext.native.units import UnitKind, UnitLayout

from helpers.tolerances import ACTIVATIONS, assert_close_to_reference

UNITS: list[tuple[UnitKind, list[int]]] = [
    ("matrix", [0]),
    ("matrix", [1]),
    ("matrix", [7]),
    ("matrix", [37]),
    ("matrix", [66]),
    ("out_heads", [0, 1, 5, 3]),
    ("in_heads", [3, 0, 9, 1]),
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]
Inputs = dict[str, torch.Tensor]


def make_inputs(layout: UnitLayout, ranks: list[int], rows: int, act: torch.dtype, adapter: torch.dtype) -> Inputs:
    """Inputs are slices of larger tensors, so that strides are always tested."""
    a_rows, b_rows = layout.rows(ranks)
    k, n = layout.in_features, layout.out_features
    return {
        "x": torch.randn(rows, k + 5).to(act)[:, 2 : k + 2],
        "weight": (torch.randn(n, k) / k**0.5).to(act),
        "bias": torch.randn(n).to(act),
        "lora_A": torch.randn(a_rows + 2, layout.a_width).to(adapter),
        "lora_B": torch.randn(b_rows + 1, layout.b_width).to(adapter),
        "gate": torch.rand(sum(ranks)),
        "dy": torch.randn(rows, n + 3).to(act)[:, 1 : n + 1],
    }


def run_reference(layout: UnitLayout, ranks: list[int], v: Inputs, dtype: torch.dtype, gated: bool) -> Inputs:
    """Forward and backward in plain torch at `dtype`."""
    x, a, b = (v[key].detach().to(dtype).requires_grad_() for key in ("x", "lora_A", "lora_B"))
    a_rows, b_rows = layout.rows(ranks)
    gate = v["gate"].to(dtype) if gated else None
    y = x @ v["weight"].to(dtype).T + v["bias"].to(dtype)
    y = y + reference.lora_linear(layout, ranks, x, a[:a_rows], b[:b_rows], gate, 0.7)
    y.backward(v["dy"].to(dtype))
    grads = {"dx": x.grad, "dA": a.grad, "dB": b.grad}
    return {"y": y.detach()} | {key: torch.zeros(0) if g is None else g for key, g in grads.items()}


def run_native(layout: UnitLayout, ranks: list[int], v: Inputs, gated: bool) -> Inputs:
    """Forward and backward through the autograd node."""
    x, a, b = (v[key].detach().requires_grad_() for key in ("x", "lora_A", "lora_B"))
    gate = v["gate"] if gated else None
    y = ops.lora_linear(x, v["weight"], v["bias"], a, b, gate, layout.encode(ranks), 0.7)
    y.backward(v["dy"])
    assert x.grad is not None
    assert a.grad is not None
    assert b.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dA": a.grad, "dB": b.grad}


@pytest.mark.parametrize("rows", [1, 5, 67])
@pytest.mark.parametrize(("act", "adapter"), DTYPES)
@pytest.mark.parametrize("factoring", ["independent", "shared"])
@pytest.mark.parametrize(("kind", "ranks"), UNITS)
def test_lora_linear(
    isa: str, kind: UnitKind, ranks: list[int], factoring: str, act: torch.dtype, adapter: torch.dtype, rows: int
) -> None:
    layout = UnitLayout(kind, factoring, len(ranks), 132, 100)  # type: ignore[arg-type]
    for gated in (False, True):
        v = make_inputs(layout, ranks, rows, act, adapter)
        exact, theirs = (run_reference(layout, ranks, v, dtype, gated) for dtype in (torch.float64, act))
        ours = run_native(layout, ranks, v, gated)
        for key, value in ours.items():
            assert_close_to_reference(value, theirs[key], exact[key], act, f"{key} gated={gated}")
        a_rows, b_rows = layout.rows(ranks)
        assert not ours["dA"][a_rows:].any(), "rows past the live ones get zero gradients"
        assert not ours["dB"][b_rows:].any()


@pytest.mark.parametrize("width", [1, 3, 7, 8, 9, 15, 16, 17, 21, 31, 33, 64, 130])
def test_sizes_around_the_vector_width(isa: str, width: int) -> None:
    layout = UnitLayout("matrix", "shared", 1, width, width + 1)
    ranks = [min(width, 5)]
    for act in ACTIVATIONS:
        v = make_inputs(layout, ranks, 13, act, torch.float32)
        exact, theirs = (run_reference(layout, ranks, v, dtype, True) for dtype in (torch.float64, act))
        for key, value in run_native(layout, ranks, v, True).items():
            assert_close_to_reference(value, theirs[key], exact[key], act, f"{key} width={width}")


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["out_heads", "in_heads"]),
    factoring=st.sampled_from(["independent", "shared"]),
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    head_dim=st.integers(1, 20),
    other=st.integers(1, 40),
    rows=st.integers(0, 40),
)
def test_any_unit_table(kind: UnitKind, factoring: str, ranks: list[int], head_dim: int, other: int, rows: int) -> None:
    cut = head_dim * len(ranks)
    sizes = (other, cut) if kind == "out_heads" else (cut, other)
    layout = UnitLayout(kind, factoring, len(ranks), *sizes)  # type: ignore[arg-type]
    v = make_inputs(layout, ranks, rows, torch.float32, torch.float32)
    exact, theirs = (run_reference(layout, ranks, v, dtype, True) for dtype in (torch.float64, torch.float32))
    for key, value in run_native(layout, ranks, v, True).items():
        assert_close_to_reference(value, theirs[key], exact[key], torch.float32, key)


def test_native_table_agrees_with_layout() -> None:
    for (kind, ranks), factoring in itertools.product(UNITS, ["independent", "shared"]):
        layout = UnitLayout(kind, factoring, len(ranks), 132, 100)  # type: ignore[arg-type]
        table = layout.table(ranks)
        assert (table.a_rows, table.b_rows) == layout.rows(ranks)
        assert (table.a_width, table.b_width, table.gate_on_a) == (layout.a_width, layout.b_width, layout.gate_on_a)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(
    ("kind", "ranks"), [("matrix", [37]), ("out_heads", [40, 1, 16, 9]), ("in_heads", [3, 64, 7, 12])]
)
def test_bitwise_equal_between_runs_and_thread_counts(
    isa: str, kind: UnitKind, ranks: list[int], act: torch.dtype, p: float
) -> None:
    layout = UnitLayout(kind, "shared", len(ranks), 516, 508)  # enough work for three threads
    v = make_inputs(layout, ranks, 403, act, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(run_adapter_alone(layout, ranks, v, p))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_row_does_not_depend_on_its_neighbours(isa: str, act: torch.dtype) -> None:
    layout, ranks = UnitLayout("out_heads", "shared", 3, 77, 123), [5, 33, 2]
    v = make_inputs(layout, ranks, 75, act, torch.float32)
    whole = run_adapter_alone(layout, ranks, v, 0.0)
    for begin, end in ((0, 1), (3, 17), (40, 75)):
        part = run_adapter_alone(layout, ranks, {**v, "x": v["x"][begin:end], "dy": v["dy"][begin:end]}, 0.0)
        for key in ("y", "dx"):
            assert torch.equal(whole[key][begin:end], part[key]), key


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("width", [40, 300, 2100])
def test_a_component_does_not_depend_on_how_many_others_there_are(isa: str, act: torch.dtype, width: int) -> None:
    """Growth by a component without effect moves no bit, whichever tiles a rank falls into."""
    x, start, weight = torch.randn(13, width).to(act), torch.randn(13, width).to(act), torch.randn(19, width)
    layout = UnitLayout("matrix", "shared", 1, width, width)
    whole, before = torch.empty(13, 19), start
    core.shrink(layout.table([19]), True, matrix(weight), 0, 0.5, matrix(x), matrix(whole), 1)
    for rank in range(1, 20):
        table, h = layout.table([rank]), torch.empty(13, rank)
        core.shrink(table, True, matrix(weight), 0, 0.5, matrix(x), matrix(h), 1)
        assert torch.equal(h, whole[:, :rank])
        weight_and_zeros = torch.cat([weight[: rank - 1], torch.zeros(1, width)])
        y = start.clone()
        core.expand(table, True, matrix(weight_and_zeros), 0, 0.5, matrix(h), matrix(y), 1)
        assert rank == 1 or torch.equal(y, before)
        before = start.clone()
        core.expand(table, True, matrix(weight), 0, 0.5, matrix(h), matrix(before), 1)


def run_adapter_alone(layout: UnitLayout, ranks: list[int], v: Inputs, p: float) -> Inputs:
    """The kernels without torch's own matmul, whose bits may depend on the number of threads."""
    x, a, b = (v[key].detach().requires_grad_() for key in ("x", "lora_A", "lora_B"))
    y = torch.zeros(len(x), layout.out_features, dtype=x.dtype)
    dropout = (p, torch.tensor(5)) if p else ops.NO_DROPOUT
    out = ops.lora_accumulate(y, x, a, b, v["gate"], layout.encode(ranks), 0.7, dropout)
    out.backward(v["dy"])
    assert x.grad is not None
    assert a.grad is not None
    assert b.grad is not None
    return {"y": out.detach(), "dx": x.grad, "dA": a.grad, "dB": b.grad}


def test_primitives_match_their_formulas(isa: str) -> None:
    layout = UnitLayout("matrix", "shared", 1, 50, 33)
    table, x = layout.table([6]), torch.randn(19, 50)
    w, b, scale = torch.randn(6, 50), torch.randn(6, 33), torch.rand(6)
    h, y, dw = torch.empty(19, 6), torch.randn(19, 33), torch.empty(8, 50)
    core.shrink(table, True, matrix(w), scale.data_ptr(), 0.5, matrix(x), matrix(h), 2)
    torch.testing.assert_close(h, 0.5 * scale * (x @ w.T))
    expected = y + 0.5 * (scale * h) @ b
    core.expand(table, False, matrix(b), scale.data_ptr(), 0.5, matrix(h), matrix(y), 2)
    torch.testing.assert_close(y, expected)
    core.outer(table, True, matrix(dw), scale.data_ptr(), 0.5, matrix(h), matrix(x), 2)
    torch.testing.assert_close(dw[:6], 0.5 * scale[:, None] * (h.T @ x))
    assert not dw[6:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storage_types_convert_as_in_torch(isa: str, dtype: torch.dtype) -> None:
    """Every value of the type survives y += 0, and float32 rounds to it to nearest even, infinities included."""
    layout = UnitLayout("matrix", "shared", 1, 1, 1)
    table, one = layout.table([1]), torch.ones(1, 1)

    def expand(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        core.expand(table, False, matrix(one), 0, 1.0, matrix(h), matrix(y), 1)
        return y

    def kept(t: torch.Tensor) -> torch.Tensor:
        """Bf16 instructions take subnormals for 0."""
        flushed = dtype == torch.bfloat16 and isa == "avx512_bf16"
        return torch.where(t.abs() < 2.0**-126, 0.0, t).to(t.dtype) if flushed else t

    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan() & ~((every == 0) & every.signbit())]
    for width in (1, 16, 32, 40):  # of one vector and of two, whole and cut
        layout = UnitLayout("matrix", "shared", 1, 1, width)
        table, one = layout.table([1]), torch.ones(1, width)
        y = every[: len(every) // width * width].reshape(-1, width).clone()
        assert torch.equal(expand(torch.zeros(len(y), 1), y.clone()), kept(y))
        bits = torch.randint(-(2**31), 2**31, (20_000, 1), dtype=torch.int64).to(torch.int32)
        near = torch.tensor([65519.9, 65520.0, 6e-8, 2.9802322e-8, 2.98023259e-8, 6.1e-5, -1e-40, torch.inf])[:, None]
        h = torch.cat([bits.view(torch.float32), every.float()[:, None] * (1 + 2**-9), near])
        h = h[~h.isnan().squeeze(1)].contiguous()
        rounded = expand(h, torch.zeros(len(h), width, dtype=dtype))
        assert torch.equal(rounded, kept(h).to(dtype).expand(-1, width))


def test_gradcheck_by_finite_differences() -> None:
    layout = UnitLayout("in_heads", "shared", 2, 8, 6)
    v = make_inputs(layout, [2, 3], 4, torch.float32, torch.float32)
    ours = run_native(layout, [2, 3], v, True)
    step = 1e-2
    for i, j in ((0, 0), (2, 3)):
        moved = {**v, "lora_A": v["lora_A"].clone()}
        moved["lora_A"][i, j] += step
        table = layout.encode([2, 3])

        def loss(inputs: Inputs, table: torch.Tensor = table) -> float:
            y = ops.lora_linear(
                inputs["x"], v["weight"], v["bias"], inputs["lora_A"], v["lora_B"], v["gate"], table, 0.7
            )
            return float((y * v["dy"]).sum())

        numeric = (loss(moved) - loss(v)) / step  # the loss is linear in A: exact up to rounding
        assert ours["dA"][i, j].item() == pytest.approx(numeric, rel=1e-2, abs=1e-3)


def test_errors_name_the_argument() -> None:
    layout = UnitLayout("matrix", "shared", 1, 16, 8)
    a, b, weight, table = torch.randn(3, 16), torch.randn(3, 8), torch.randn(8, 16), layout.encode([3])
    x = torch.randn(4, 16)
    with pytest.raises(ValueError, match=r"lora_linear: x must be \[\.\.\., K\] = \[\.\.\., 16\], got \[4, 15\]"):
        ops.lora_linear(x[:, :15], weight, None, a, b, None, table, 1.0)
    with pytest.raises(ValueError, match="lora_linear: x must have the dtype of weight"):
        ops.lora_linear(x.bfloat16(), weight, None, a, b, None, table, 1.0)
    with pytest.raises(ValueError, match="lora_A must have at least 3 rows, got 2"):
        ops.lora_linear(x, weight, None, a[:2], b, None, table, 1.0)
    with pytest.raises(ValueError, match="adapter dtype must be float32 or equal the activations' float32"):
        ops.lora_linear(x, weight, None, a.bfloat16(), b.bfloat16(), None, table, 1.0)
    with pytest.raises(ValueError, match=r"dtype must be float32, bfloat16 or float16, got torch\.float64"):
        ops.lora_linear(x.double(), weight.double(), None, a, b, None, table, 1.0)
    with pytest.raises(ValueError, match="heads must divide"):
        UnitLayout("out_heads", "shared", 3, 16, 8)
    with pytest.raises(ValueError, match="ranks must be >= 0, got -1"):
        core.UnitTable(0, 0, 16, 8, [-1])


def test_isa_override() -> None:
    with pytest.raises(ValueError, match=r"instruction set must be one this CPU can run \(.*scalar.*\), got 'sse9'"):
        core.set_isa("sse9")
    code = "from ardlora_ext.native.compiled import core; print(core.active_isa())"
    environment = {**os.environ, "ARDLORA_ISA": "scalar"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "scalar"
    environment["ARDLORA_ISA"] = "nonsense"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "ARDLORA_ISA: instruction set must be one this CPU can run" in run.stderr


def test_core_has_no_torch_headers() -> None:
    root = Path(__file__).parents[2] / "csrc"
    included = [p for p in root.rglob("*.*") if "#include <torch" in p.read_text() or "#include <ATen" in p.read_text()]
    assert not included


@pytest.mark.parametrize(("act", "adapter"), DTYPES)
@pytest.mark.parametrize(("kind", "ranks"), [("matrix", [5]), ("out_heads", [2, 4]), ("in_heads", [3, 1])])
def test_dropout_equals_a_plain_philox(
    isa: str, kind: UnitKind, ranks: list[int], act: torch.dtype, adapter: torch.dtype
) -> None:
    layout = UnitLayout(kind, "shared", len(ranks), 150, 20)
    v = make_inputs(layout, ranks, 11, act, adapter)
    factors = reference.dropout_factors(0.3, 2**40 + 17, 11, 150)
    results = []
    for dtype in (torch.float64, act):
        x, a, b = (v[key].detach().to(dtype).requires_grad_() for key in ("x", "lora_A", "lora_B"))
        a_rows, b_rows = layout.rows(ranks)
        y = reference.lora_linear(layout, ranks, x * factors.to(dtype), a[:a_rows], b[:b_rows], None, 0.7)
        y.backward(v["dy"].to(dtype))
        results.append({"y": y.detach(), "dx": x.grad, "dA": a.grad, "dB": b.grad})
    x, a, b = (v[key].detach().requires_grad_() for key in ("x", "lora_A", "lora_B"))
    zeros = torch.zeros(11, 20, dtype=act)
    y = ops.lora_accumulate(zeros, x, a, b, None, layout.encode(ranks), 0.7, (0.3, torch.tensor(2**40 + 17)))
    y.backward(v["dy"])
    for key, value in {"y": y.detach(), "dx": x.grad, "dA": a.grad, "dB": b.grad}.items():
        exact, theirs = results[0][key], results[1][key]
        assert value is not None
        assert exact is not None
        assert theirs is not None
        assert_close_to_reference(value, theirs, exact, act, key)


def test_dropout_statistics(isa: str) -> None:
    """Kept share, and independence of neighbours, seeds and rows, within five standard errors."""
    size = 512
    layout = UnitLayout("matrix", "shared", 1, size, size)
    table, eye = layout.encode([size]), torch.eye(size)
    a, b, gate = eye.clone(), eye.clone(), None

    def mask(seed: int) -> torch.Tensor:
        x = torch.ones(size, size)
        out = ops.lora_accumulate(torch.zeros(size, size), x, a, b, gate, table, 1.0, (0.25, torch.tensor(seed)))
        return (out > 0).double()

    first, second = mask(1), mask(2)
    assert torch.equal(first, mask(1))
    error = 5 / size
    assert abs(first.mean().item() - 0.75) < error * 0.44
    expected = 0.75**2
    for other in (second, first.roll(1, 0), first.roll(1, 1), first.roll(8, 1), first.T):
        assert abs((first * other).mean().item() - expected) < error * 0.5
