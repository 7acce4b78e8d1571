"""Static budget of the CUDA kernels: what nvcc makes of them for sm_80 and sm_90."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ardlora_ext.bench.cli import main
from ardlora_ext.bench.cuda import static as cuda_static
from ardlora_ext.bench.machine import Json

# Registers of a thread, template arguments only where they matter. The GEMM kernels keep their sums in registers: with
# 168 three blocks of 128 threads fit on an SM, with 128 two of 256. float32: two and one, up to 255 registers.
REGISTERS = {
    "shrink_kernel": 168,
    "wide_shrink_kernel": 128,
    "expand_kernel": 128,
    "wide_expand_kernel": 128,
    "expand_kernel<float>": 192,
    "outer_kernel": 168,
    "outer_kernel<float>": 192,
    "outer_shrink_kernel": 168,
    "prepare_kernel": 64,
    "row_blocks_kernel": 64,
    "sum_shares_kernel": 64,
    "gate_gradient_kernel": 40,
    "rank_resize_kernel": 40,
    "row_sums_kernel": 40,
    "importance_kernel": 64,
    "all_finite_kernel": 32,
    "gates_kernel": 40,
}
WIDE_LOADS = {"rank_resize_kernel", "row_sums_kernel", "importance_kernel", "sum_shares_kernel", "expand_kernel"}
GEMM = {
    "shrink_kernel",
    "wide_shrink_kernel",
    "expand_kernel",
    "wide_expand_kernel",
    "outer_kernel",
    "outer_shrink_kernel",
}
ASYNC_COPIES = GEMM


@pytest.fixture(scope="module")
def rows() -> list[Json]:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the PATH")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_static, "source_tree", lambda: Path(__file__).parents[2])
        return cuda_static.measure()


def base(row: Json) -> str:
    return str(row["kernel"]).partition("<")[0]


def test_every_kernel_keeps_its_budget(rows: list[Json]) -> None:
    assert {base(row) for row in rows} == {kernel.partition("<")[0] for kernel in REGISTERS}
    for row in rows:
        name = f"{row['kernel']} on {row['arch']}"
        assert row["spills"] == 0, name
        assert row["registers"] <= REGISTERS.get(row["kernel"], REGISTERS[base(row)]), name
        assert row["occupancy"] > 0, name


def test_promised_instructions_are_there(rows: list[Json]) -> None:
    if rows[0]["hmma"] is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    for row in rows:
        assert row["tensor_core"] == (row["hmma"] > 0) == (base(row) in GEMM), row["kernel"]
        assert (row["ldgsts"] > 0) == (base(row) in ASYNC_COPIES), row["kernel"]
        if base(row) in WIDE_LOADS:
            assert row["ldg128"] > 0, row["kernel"]


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "expected"),
    [
        ("sm_80", 128, 32, 0, 1.0),
        ("sm_80", 128, 128, 0, 0.25),  # 4 blocks by registers
        ("sm_80", 256, 32, 100 * 1024, 0.125),  # one block by shared memory
        ("sm_90", 256, 32, 100 * 1024, 0.25),
        ("sm_86", 32, 32, 0, 1 / 3),  # 16 blocks
        ("sm_80", 1024, 255, 0, 0.0),
    ],
)
def test_occupancy(arch: str, threads: int, registers: int, shared: int, expected: float) -> None:
    assert cuda_static.occupancy(arch, threads, registers, shared) == pytest.approx(expected)


def test_command_line(tmp_path: Path, rows: list[Json], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_static, "measure", lambda archs: [row for row in rows if row["arch"] in archs])
    target = tmp_path / "static.json"
    assert main(["cuda-static", "--arch", "sm_90", "--json", str(target)]) == 0
    stored = json.loads(target.read_text())["rows"]
    keys = {"kernel", "arch", "registers", "spills", "smem", "occupancy", "hmma", "ldgsts", "ldsm", "tensor_core"}
    assert keys <= stored[0].keys()
    assert {row["arch"] for row in stored} == {"sm_90"}


@pytest.mark.parametrize(
    ("missing", "message"),
    [("nvcc", "nvcc and a C++ compiler must be on the PATH"), ("csrc", "the source tree must be")],
)
def test_what_is_missing_is_named(
    missing: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == missing else f"/usr/bin/{name}")
    monkeypatch.setattr(cuda_static, "source_tree", lambda: None)
    assert main(["cuda-static"]) == 2
    assert message in capsys.readouterr().err


def test_unknown_architectures_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(cuda_static, "source_tree", lambda: Path(__file__).parents[2])
    assert main(["cuda-static", "--arch", "sm_42"]) == 2
    assert "--arch must be one of sm_80, sm_86" in capsys.readouterr().err
