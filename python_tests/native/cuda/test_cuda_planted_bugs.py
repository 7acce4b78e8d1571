"""Bugs planted in a copy of the CUDA kernels: the project's own test programs must find each one.

All are compiled into the programs at once; the environment variable PLANTED commits one of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers.cuda_programs import PROGRAMS
from helpers.simt import CSRC, build, run

HEADER = """
#include <cstdlib>
inline const int planted_bug = std::getenv("PLANTED") ? std::atoi(std::getenv("PLANTED")) : -1;
"""


class Bug(NamedTuple):
    """`right`, found once in csrc/cuda/`file`, becomes `wrong` where PLANTED holds."""

    name: str
    program: str
    file: str
    right: str
    wrong: str


BUGS = (
    Bug(
        "dropped barrier",
        "lora",
        "shrink.cuh",
        "cp_async_wait<kShrinkStages - 2>();\n      __syncthreads();",
        "cp_async_wait<kShrinkStages - 2>();\n      if (!PLANTED) __syncthreads();",
    ),
    Bug(
        "shared memory written again without a barrier",
        "lora",
        "expand.cuh",
        "cp_async_wait<0>();\n    __syncthreads();",
        "cp_async_wait<0>();\n    if (!PLANTED) __syncthreads();",
    ),
    Bug(
        "wrong wait count",
        "lora",
        "outer.cuh",
        "cp_async_wait<kOuterStages - 2>();",
        "if (PLANTED) cp_async_wait<kOuterStages - 1>(); else cp_async_wait<kOuterStages - 2>();",
    ),
    Bug(
        "last row off by one",
        "lora",
        "tile_io.cuh",
        "row + r + i < x.rows ? bytes : 0",
        "row + r + i < x.rows - PLANTED ? bytes : 0",
    ),
    Bug("missing zero fill", "lora", "tile_io.cuh", "from : data, valid);", "from : data, PLANTED ? 16 : valid);"),
    Bug(
        "tail of a chunk not cut off",
        "lora",
        "tile_io.cuh",
        "(left < kChunk ? left : kChunk)",
        "(left < kChunk && !PLANTED ? left : kChunk)",
    ),
    Bug(
        "wrong fragment",
        "lora",
        "outer.cuh",
        "multiply_add<T>(acc[i][2 * j + 1], a[i], b + 2);",
        "multiply_add<T>(acc[i][2 * j + 1], a[i], PLANTED ? b : b + 2);",
    ),
    Bug(
        "wrong gate",
        "lora",
        "shrink.cuh",
        "p.gate + w_walk.segment.w_begin + first_rank",
        "p.gate + (PLANTED ? 0 : w_walk.segment.w_begin) + first_rank",
    ),
    Bug(
        "missing scale",
        "lora",
        "sum_shares.cuh",
        "const float scale = s.gate == nullptr ? s.scale",
        "const float scale = s.gate == nullptr ? (PLANTED ? 1.0f : s.scale)",
    ),
    Bug(
        "shares that race",
        "lora",
        "shrink.cuh",
        "p.partial + blockIdx.z * p.x.rows",
        "p.partial + (PLANTED ? 0 : blockIdx.z) * p.x.rows",
    ),
    Bug(
        "column tiles that race",
        "lora",
        "outer.cuh",
        "static_cast<std::int64_t>(tile) * p.outer.x.rows",
        "static_cast<std::int64_t>(PLANTED ? 0 : tile) * p.outer.x.rows",
    ),
    Bug(
        "wrong Philox counter",
        "lora",
        "dropout.cuh",
        "(block * kPhiloxLanes + slot * kChunk + e)",
        "(block * (PLANTED ? kChunk : kPhiloxLanes) + slot * kChunk + e)",
    ),
    Bug("masks of the block before", "lora", "dropout.cuh", "if (b != block)", "if (PLANTED ? block < 0 : b != block)"),
    Bug(
        "columns not interleaved",
        "lora",
        "tile_io.cuh",
        "(to + (offset ^ i * kApart))",
        "(to + (offset ^ (PLANTED ? kPairs - 1 - i : i) * kApart))",
    ),
    Bug(
        "one share too many",
        "lora",
        "sum_shares.cuh",
        "if (share + i < at.end)",
        "if (share + i < at.end + PLANTED)",
    ),
    Bug(
        "wrong segment column",
        "lora",
        "expand.cuh",
        "(row + lane_row) * p.y.stride + y_column;",
        "(row + lane_row) * p.y.stride + (PLANTED ? column : y_column);",
    ),
    Bug(
        "ranks copied over those in use",
        "lora",
        "expand.cuh",
        "step % 2 * h_bytes",
        "(PLANTED ? 0 : step % 2) * h_bytes",
    ),
    Bug(
        "rows of H leave before they are there",
        "lora",
        "shrink.cuh",
        "if (!whole) return;\n  __syncwarp();",
        "if (!whole) return;\n  if (!PLANTED) __syncwarp();",
    ),
    Bug(
        "sums with the unit before are written",
        "lora",
        "outer.cuh",
        "|| first_rank + c < 0)",
        "|| (first_rank + c < 0 && !PLANTED))",
    ),
    Bug("two of three tf32 products", "lora", "mma_tile.cuh", "mma_tf32(c, a_low,", "if (!PLANTED) mma_tf32(c, a_low,"),
    Bug(
        "an expert without rows has no share",
        "lora",
        "row_blocks.cuh",
        "if (outer && count == 0) count = 1;",
        "if (outer && count == 0 && !PLANTED) count = 1;",
    ),
    Bug(
        "rows of the next expert",
        "lora",
        "row_blocks.cuh",
        "from + t.length < end ? from + t.length : end",
        "PLANTED || from + t.length < end ? from + t.length : end",
    ),
    Bug("shares of an expert that race", "lora", "row_blocks.cuh", "share + i : -1", "share + (PLANTED ? 0 : i) : -1"),
    Bug(
        "experts past the first 32",
        "lora",
        "row_blocks.cuh",
        "const int before = total + sum - mine;",
        "const int before = (PLANTED ? 0 : total) + sum - mine;",
    ),
    Bug("table not filled up", "lora", "row_blocks.cuh", "i < t.room; i += 32", "i < t.room && !PLANTED; i += 32"),
    Bug("offsets that do not ascend", "lora", "row_blocks.cuh", "&& other > most", "&& other > most && !PLANTED"),
    Bug(
        "partial sums by the factor's row",
        "lora",
        "outer.cuh",
        "(partial && p.blocks != nullptr ?",
        "(partial && p.blocks != nullptr && !PLANTED ?",
    ),
    Bug(
        "masks by the sorted order",
        "lora",
        "dropout.cuh",
        "d.rows == nullptr || row >= d.count",
        "d.rows == nullptr || row >= d.count || PLANTED",
    ),
    Bug(
        "y is read where it is to be written",
        "lora",
        "expand.cuh",
        "if (p.fresh) {",
        "if (p.fresh && !PLANTED) {",
    ),
    Bug(
        "H of the unit before is multiplied",
        "lora",
        "expand.cuh",
        "ValidRows{tile == 0 ? before : 0, ranks(tile)}",
        "ValidRows{tile == 0 && !PLANTED ? before : 0, ranks(tile)}",
    ),
    Bug(
        "ranks behind a chunk of the unit before are cut off",
        "lora",
        "gemm_plan.cpp",
        "s.h_begin % (16 / bytes) + s.rank",
        "(PLANTED ? 0 : s.h_begin % (16 / bytes)) + s.rank",
    ),
    Bug(
        "ranks of the warp beside",
        "lora",
        "shrink.cuh",
        "w.load_b(b, warp_rank + j * 16, k);",
        "w.load_b(b, (PLANTED ? 0 : warp_rank) + j * 16, k);",
    ),
    Bug(
        "H over X that is still read",
        "lora",
        "shrink.cuh",
        "if constexpr (kWide) {\n    __syncthreads();",
        "if constexpr (kWide) {\n    if (!PLANTED) __syncthreads();",
    ),
    Bug(
        "prepared columns not interleaved",
        "lora",
        "prepare.cuh",
        "const int apart = f.is_interleaved ? kChunk : 2;",
        "const int apart = f.is_interleaved && !PLANTED ? kChunk : 2;",
    ),
    Bug("prepared without gates", "lora", "prepare.cuh", "f.gate == nullptr ?", "f.gate == nullptr || PLANTED ?"),
    Bug(
        "a kernel does not wait for the one before",
        "lora",
        "sum_shares.cuh",
        "begin_kernel();",
        "if (!PLANTED) begin_kernel();",
    ),
    Bug(
        "the first launch of a call follows none",
        "lora",
        "lora_launches.cuh",
        "grid.follows = started_;",
        "grid.follows = started_ || PLANTED;",
    ),
    Bug(
        "row overwritten before it is read",
        "resize",
        "rank_resize.cuh",
        "if (step.to == kHeldRow) {",
        "if (step.to == kHeldRow && PLANTED) {\n    } else if (step.to == kHeldRow) {",
    ),
    Bug(
        "uncertainty by the old mean",
        "controller",
        "importance.cuh",
        "      i[e] = p.beta1 * i[e] + p.one_minus_beta1 * entry;\n",
        "      const float old = i[e];\n      i[e] = p.beta1 * i[e] + p.one_minus_beta1 * entry;\n"
        "      if (PLANTED) u[e] += p.one_minus_beta2 / p.beta2 * (fabsf(entry - old) - fabsf(entry - i[e]));\n",
    ),
    Bug(
        "reduction without a barrier",
        "controller",
        "importance.cuh",
        "bad[warp] = found;\n  __syncthreads();",
        "bad[warp] = found;\n  if (!PLANTED) __syncthreads();",
    ),
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The test programs with every bug in them."""
    if not CSRC.is_dir():
        pytest.skip("needs the source tree")
    folder = tmp_path_factory.mktemp("planted")
    csrc = Path(shutil.copytree(CSRC, folder / "csrc"))
    for number, bug in enumerate(BUGS):
        path = csrc / "cuda" / bug.file
        text = path.read_text()
        assert text.count(bug.right) == 1, f"the place for '{bug.name}' is gone from {bug.file}"
        path.write_text(text.replace(bug.right, bug.wrong.replace("PLANTED", f"(planted_bug == {number})")))
    header = folder / "planted.h"
    header.write_text(HEADER)
    names = sorted({bug.program for bug in BUGS})
    return {name: build(folder, "quick", PROGRAMS[name], csrc, f"-include{header}") for name in names}


def test_without_a_bug_the_programs_pass(programs: dict[str, Path]) -> None:
    for program in programs.values():
        done = run(program, "small")
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("number", range(len(BUGS)), ids=[bug.name for bug in BUGS])
def test_bug_is_found(programs: dict[str, Path], number: int) -> None:
    done = run(programs[BUGS[number].program], PLANTED=str(number))
    assert done.returncode != 0, done.stdout
