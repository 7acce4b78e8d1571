"""`bench kernels`: the native kernels, timed in C++, against the roofline measured in the same run.

The least time of a call is max(flops / peak, bytes read / read rate + bytes updated / update rate), with rates for a
working set of its size; `roofline` is that time over the median measured.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ardlora_ext.bench.machine import Json
from ardlora_ext.bench.output import (
    Column,
    Panel,
    Result,
    add_output_arguments,
    bars_of,
    check_outputs,
    groups,
    publish,
)
from ardlora_ext.bench.speed import kernels_cuda
from ardlora_ext.bench.speed.layers.patterns import ragged
from ardlora_ext.bench.stats import geometric_mean
from ardlora_ext.errors import InputError
from ardlora_ext.native.compiled import DTYPE_CODES, core, matrix
from ardlora_ext.native.units import UnitLayout

PRIMITIVES = ("shrink", "expand", "outer")
OPS = (*PRIMITIVES, "forward", "backward")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AIM, _AIM_ROWS = 0.7, 256
_COLD_BYTES = 1 << 28  # more than caches hold
_COLUMNS = (
    Column("op", "op"),
    Column("M", "rows"),
    Column("K", "in_features"),
    Column("N", "out_features"),
    Column("ranks", "ranks"),
    Column("dtype", "dtype"),
    Column("threads", "threads"),
    Column("us", "us", "{:.1f}".format),
    Column("p10", "p10_us", "{:.1f}".format),
    Column("p90", "p90_us", "{:.1f}".format),
    Column("GB/s", "gb_s", "{:.1f}".format),
    Column("GFLOP/s", "gflop_s", "{:.0f}".format),
    Column("roofline", "roofline", "{:.0%}".format),
)
Shape = tuple[UnitLayout, tuple[int, ...], str]


def shapes(quick: bool) -> Iterator[Shape]:
    """Return layouts, their ranks, and what to call those."""
    for k, n in [(1024, 1024)] if quick else [(1024, 1024), (384, 1536)]:
        for rank in (8, 64) if quick else (1, 8, 16, 64):
            yield UnitLayout("matrix", "shared", 1, k, n), (rank,), str(rank)
    yield *ragged(1024, "shared")[0], "heads, shared"
    yield *ragged(1024, "independent")[0], "heads, own"


class Rooflines:
    """Limits of the machine, measured once per power of two of the working set."""

    def __init__(self, threads: int, cold: bool) -> None:
        self.threads, self.cold = threads, cold
        self._found: dict[int, dict[str, float]] = {}

    def least_seconds(self, times: Json, dtype: str) -> float:
        """Return the least time that a call of `bench_kernel` can take."""
        touched = times["read_bytes"] + times["update_bytes"] / 2
        size = _COLD_BYTES if self.cold else 1 << math.ceil(math.log2(max(touched, 1 << 14)))
        if size not in self._found:
            self._found[size] = core.bench_roofline(size, self.threads)
        limit = self._found[size]
        peak = limit["bfloat16_gflops" if dtype == "bfloat16" else "float32_gflops"]
        moved = times["read_bytes"] / limit["read_gbs"] + times["update_bytes"] / limit["update_gbs"]
        return 1e-9 * float(max(times["flops"] / peak, moved))


def measure(cases: list[tuple[Shape, str, str, int]], threads: int, repeats: int, cold: bool) -> list[Json]:
    """Time every (shape, op, dtype, rows) and return one row each."""
    limits = Rooflines(threads, cold)
    rows = []
    for (layout, ranks, label), op, dtype, m in tqdm(cases, unit="case", leave=False, disable=None):
        table, code = layout.table(ranks), DTYPE_CODES[_DTYPES[dtype]]
        times: dict[str, Any] = core.bench_kernel(table, op, True, m, code, 0, threads, repeats, cold=cold)
        low, median, high = np.quantile(np.asarray(times["seconds"]), [0.1, 0.5, 0.9])
        where = {"op": op, "rows": m, "in_features": layout.in_features, "out_features": layout.out_features}
        moved = times["read_bytes"] + times["update_bytes"]
        rows.append(
            {
                **where,
                "ranks": label,
                "dtype": dtype,
                "isa": core.active_isa(),
                "threads": threads,
                "cold": cold,
                "us": 1e6 * median,
                "p10_us": 1e6 * low,
                "p90_us": 1e6 * high,
                "gb_s": 1e-9 * moved / median,
                "gflop_s": 1e-9 * times["flops"] / median,
                "roofline": limits.least_seconds(times, dtype) / median,
            }
        )
    return rows


def check(dtypes: list[str]) -> str:
    """Compare the primitives with float64 on a small ragged layout; return what was found.

    Raises:
        InputError: one is wrong.
    """
    worst = 0.0
    layout, ranks = UnitLayout("out_heads", "independent", 4, 96, 128), (3, 0, 5, 1)
    table = layout.table(ranks)
    generator = torch.Generator().manual_seed(0)
    for dtype in dtypes:
        x = torch.randn(37, 96, generator=generator).to(_DTYPES[dtype])
        weight, h = (torch.randn(*size, generator=generator) for size in ((9, 96), (37, 9)))
        got_h, got_y, got_w = torch.zeros(37, 9), x.clone(), torch.zeros(9, 96)
        core.shrink(table, True, matrix(weight), 0, 1.0, matrix(x), matrix(got_h), 1)
        core.expand(table, True, matrix(weight), 0, 1.0, matrix(h), matrix(got_y), 1)
        core.outer(table, True, matrix(got_w), 0, 1.0, matrix(h), matrix(x), 1)
        wide_x, wide_w, wide_h = x.double(), weight.double(), h.double()
        wanted = (wide_x @ wide_w.T, wide_x + wide_h @ wide_w, wide_h.T @ wide_x)
        for op, mine, right in zip(PRIMITIVES, (got_h, got_y, got_w), wanted, strict=True):
            error = float((mine.double() - right).abs().max() / right.abs().max())
            worst = max(worst, error)
            if not error <= (1e-5 if dtype == "float32" else 1e-2):
                raise InputError(f"bench: {op} in {dtype} must agree with float64, got a relative error of {error:.2g}")
    return f"kernels of {core.active_isa()} agree with float64; largest relative error {worst:.1g}"


def notes(rows: list[Json]) -> list[str]:
    """Say what share of the roofline is reached, and where the aim is missed."""
    said = []
    for (op, dtype), group in groups(rows, "op", "dtype").items():
        counted = [row["roofline"] for row in group if row["rows"] >= _AIM_ROWS]
        if op in PRIMITIVES and counted:
            mean = geometric_mean(counted)
            reached = "reached" if mean >= _AIM else "not reached"
            said.append(f"{op} {dtype}: {mean:.0%} of the roofline, geometric mean over M >= {_AIM_ROWS}")
            said[-1] += f" (aim {_AIM:.0%}: {reached})"
    return said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench kernels`."""
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="primitives, or the whole adapter")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(_DTYPES), default=["float32", "bfloat16"], help="of x and y"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128, 512], help="rows of activations, M")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: whole layers, by events")
    parser.add_argument("--isa", choices=core.available_isas(), default=core.active_isa(), help="instruction set")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads at most")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls of every case")
    parser.add_argument("--cold", action="store_true", help="sweep the caches before each call")
    add_output_arguments(parser, "first compare the primitives with float64")


def run(arguments: argparse.Namespace, command: str) -> None:
    """Measure and publish."""
    check_outputs(arguments)
    if min(*arguments.rows, arguments.threads, arguments.repeats) < 1:
        raise InputError("bench: --rows, --threads and --repeats must be at least 1")
    if arguments.device == "cuda":
        kernels_cuda.run(arguments, command)
        return
    before = core.active_isa()
    core.set_isa(arguments.isa)
    try:
        said = [check(arguments.dtypes)] if arguments.check else []
        sizes = arguments.rows[-1:] if arguments.quick else arguments.rows
        found = itertools.product(list(shapes(arguments.quick)), arguments.ops, arguments.dtypes, sizes)
        rows = measure(list(found), arguments.threads, arguments.repeats, arguments.cold)
    finally:
        core.set_isa(before)
    panels = [
        Panel(
            f"{op}, {dtype}",
            bars_of([{**row, "label": _label(row)} for row in group], "label", "roofline", 100.0),
            100 * _AIM,
        )
        for (op, dtype), group in groups(rows, "op", "dtype").items()
    ]
    title = f"kernels, {arguments.isa}, {arguments.threads} threads, {'cold' if arguments.cold else 'warm'} caches"
    result = Result(title, _COLUMNS, rows, "% of the roofline", panels, [*said, *notes(rows)], "{:.0f}".format)
    publish(arguments, command, result)


def _label(row: Json) -> str:
    return f"M {row['rows']}, {row['in_features']} x {row['out_features']}, r {row['ranks']}"
