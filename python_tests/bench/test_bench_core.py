"""The micro-benchmarks of the core: what they count as work, and their errors."""

from __future__ import annotations

import pytest

from ardlora_ext.native.compiled import core
from ardlora_ext.native.units import UnitLayout


def test_work_of_each_op_is_counted(isa: str) -> None:
    rows, k, n, ranks = 24, 32, 64, [3, 0, 5, 1]
    table = UnitLayout("out_heads", "shared", 4, k, n).table(ranks)
    flops_a, flops_b = 2 * rows * 5 * k, 2 * rows * sum(ranks) * (n // 4)
    a_bytes, b_bytes, h_bytes = 4 * 5 * k, 4 * 9 * (n // 4), 4 * rows * 5
    x_bytes, y_bytes = 2 * rows * k, 2 * rows * n
    expected = {
        ("shrink", True): (flops_a, x_bytes + a_bytes, h_bytes),
        ("shrink", False): (flops_b, y_bytes + b_bytes, h_bytes),
        ("expand", True): (flops_a, h_bytes + a_bytes, 2 * x_bytes),
        ("outer", False): (flops_b, y_bytes + h_bytes, b_bytes),
        ("forward", True): (flops_a + flops_b, x_bytes + a_bytes + b_bytes, 2 * y_bytes + h_bytes),
        ("backward", True): (
            2 * (flops_a + flops_b),
            x_bytes + y_bytes + h_bytes + a_bytes + b_bytes,
            2 * x_bytes + a_bytes + b_bytes,
        ),
    }
    for (op, is_a), cost in expected.items():
        found = core.bench_kernel(table, op, is_a, rows, 1, 0, 1, 3, dropout=0.1 if op == "forward" else 0.0)
        assert (found["flops"], found["read_bytes"], found["update_bytes"]) == cost, op
        assert len(found["seconds"]) == 3
        assert min(found["seconds"]) > 0.0


def test_roofline_of_every_instruction_set(isa: str) -> None:
    limits = core.bench_roofline(1 << 18, 2)
    assert set(limits) == {"read_gbs", "update_gbs", "float32_gflops", "bfloat16_gflops"}
    assert all(value > 0.0 for value in limits.values())
    assert (limits["bfloat16_gflops"] != limits["float32_gflops"]) == (isa == "avx512_bf16")


def test_errors_name_the_argument() -> None:
    table = UnitLayout("matrix", "shared", 1, 8, 8).table([2])
    with pytest.raises(
        ValueError, match="bench_kernel: op must be shrink, expand, outer, forward or backward, got sum"
    ):
        core.bench_kernel(table, "sum", True, 4, 0, 0, 1, 1)
    with pytest.raises(ValueError, match="bench_kernel: repeats must be at least 1, got 0"):
        core.bench_kernel(table, "shrink", True, 4, 0, 0, 1, 0)
    with pytest.raises(ValueError, match="bench_roofline: bytes must be at least 4096 per thread, got 64"):
        core.bench_roofline(64, 1)
