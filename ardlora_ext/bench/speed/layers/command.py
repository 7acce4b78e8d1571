"""`bench layer`: forward and backward of adapted linear layers, in every way to compute them.

A sample runs all matrices of a pattern once, with input gradients. `adapter` is the time above the frozen base, taken
round by round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from ardlora_ext.bench.machine import Json
from ardlora_ext.bench.output import (
    Column,
    Panel,
    Result,
    add_output_arguments,
    bars_of,
    check_outputs,
    groups,
    microseconds,
    percent,
    publish,
    selected,
)
from ardlora_ext.bench.speed.layers.compositions import Composition, check
from ardlora_ext.bench.speed.layers.patterns import HEAD_DIM, PATTERNS, sites
from ardlora_ext.bench.speed.layers.register import COMPOSITIONS, compose, fitting
from ardlora_ext.bench.turns import add_clock, in_turns
from ardlora_ext.errors import InputError

_DTYPES = ("float32", "bfloat16")
_CHECKED = 67  # rows
_COLUMNS = (
    Column("pattern", "pattern"),
    Column("dtype", "dtype"),
    Column("dropout", "dropout", "{:g}".format),
    Column("implementation", "impl"),
    Column("median us", "median_s", microseconds),
    Column("p10", "p10_s", microseconds),
    Column("p90", "p90_s", microseconds),
    Column("adapter us", "adapter_s", microseconds),
    Column("overhead", "overhead", percent),
)


def measure(
    pattern: str,
    dtype: str,
    dropout: float,
    names: list[str],
    rows: int,
    features: int,
    rounds: int,
    clock: str = "wall",
) -> list[Json]:
    """Time the compositions of one pattern in turns."""
    kind: torch.dtype = getattr(torch, dtype)
    places = sites(pattern, features, kind, rows)
    names = fitting(names, places[0], dropout)
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(rows, features, generator=generator).to(kind) for _ in places]
    dy = torch.randn(rows, features, generator=generator).to(kind)
    modules = {name: [compose(name, site, dropout).train() for site in places] for name in names}
    calls = {name: _call(parts, xs, dy) for name, parts in modules.items()}
    times = in_turns(calls, rounds, f"{pattern} {dtype} dropout {dropout:g}", clock)
    found = []
    for name in names:
        median, low, high = times.spread(name)
        times_of = {"median_s": median, "p10_s": low, "p90_s": high}
        extra = {"adapter_s": times.difference(name, "base"), "overhead": times.ratio(name, "base") - 1.0}
        found.append({"pattern": pattern, "dtype": dtype, "dropout": dropout, "impl": name, **times_of, **extra})
    return found


def _call(parts: list[Composition], xs: list[torch.Tensor], dy: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        for part, x in zip(parts, xs, strict=True):
            leaf = x.detach().requires_grad_()
            part(leaf).backward(dy)
            part.zero_grad(set_to_none=True)

    return call


def run_checks(patterns: list[str], dtypes: list[str], names: list[str], features: int) -> str:
    """Compare every composition with float64 on few rows; return what was found.

    Raises:
        InputError: one is wrong.
    """
    worst, count = 0.0, 0
    for pattern in patterns:
        for dtype in dtypes:
            kind: torch.dtype = getattr(torch, dtype)
            site = next(site for site in sites(pattern, features, kind, _CHECKED) if sum(site.ranks))
            x, dy = (torch.randn(_CHECKED, features).to(kind) for _ in range(2))
            for name in fitting(names, site, 0.0):
                if name != "base":
                    worst = max(worst, check(f"{name} on {pattern}", compose(name, site, 0.0), x, dy))
                    count += 1
    return f"{count} compositions agree with float64; largest relative error {worst:.1g}"


def notes(rows: list[Json]) -> list[str]:
    """Say how ours compares with the best torch composition and with PEFT, and ragged with uniform."""
    said = []
    for (pattern, dtype, dropout), group in groups(rows, "pattern", "dtype", "dropout").items():
        ours = next((row for row in group if row["impl"] == "ours"), None)
        theirs = [row for row in group if row["impl"].startswith("torch")]
        if ours is None or not theirs:
            continue
        best = min(theirs, key=lambda row: float(row["adapter_s"]))
        where = f"{pattern} {dtype} dropout {dropout:g}"
        said.append(f"{where}: adapter {best['adapter_s'] / ours['adapter_s']:.1f} x faster than {best['impl']}")
        said[-1] += f", layer {best['median_s'] / ours['median_s']:.2f} x"
        for row in selected(group, impl="peft"):
            said[-1] += f"; adapter at {ours['adapter_s'] / row['adapter_s']:.2f} of PEFT's time"
        for row in selected(rows, pattern=_uniform(pattern), dtype=dtype, dropout=dropout, impl="ours"):
            said[-1] += f"; {ours['adapter_s'] / row['adapter_s']:.2f} x uniform rank 8 (aim: at most 1.3)"
    return said


def _uniform(pattern: str) -> str:
    """Return the pattern of uniform ranks that one of ragged ranks has the parameters and the rows of."""
    return "uniform-8" if pattern.startswith("heads") else pattern.replace("-ragged", "") if "ragged" in pattern else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench layer`."""
    parser.add_argument("--patterns", nargs="+", choices=list(PATTERNS), default=list(PATTERNS), help="ranks to run")
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=list(_DTYPES), help="of activations and base")
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.1], help="of the adapter's input")
    parser.add_argument("--impl", nargs="+", choices=COMPOSITIONS, default=COMPOSITIONS)
    parser.add_argument("--rows", type=int, default=512, help="rows of activations, M")
    parser.add_argument("--features", type=int, default=1024, help="in and out features, K = N")
    parser.add_argument("--rounds", type=int, default=20, help="samples of every implementation")
    add_clock(parser)
    add_output_arguments(parser, "first compare y and all gradients with float64, without dropout")


def run(arguments: argparse.Namespace, command: str) -> None:
    """Measure and publish."""
    check_outputs(arguments)
    if min(arguments.rows, arguments.rounds) < 1 or not all(0 <= p < 1 for p in arguments.dropouts):
        raise InputError("bench: --rows and --rounds must be at least 1 and --dropouts in [0, 1)")
    if arguments.features < HEAD_DIM or arguments.features % HEAD_DIM:
        raise InputError(f"bench: --features must be a multiple of {HEAD_DIM}, got {arguments.features}")
    quick = arguments.quick
    features, rounds = (256, min(arguments.rounds, 7)) if quick else (arguments.features, arguments.rounds)
    m = min(arguments.rows, 128) if quick else arguments.rows
    names = list(dict.fromkeys(["base", *arguments.impl]))
    said = [run_checks(arguments.patterns, arguments.dtypes, names, features)] if arguments.check else []
    rows: list[Json] = []
    for pattern in arguments.patterns:
        for dtype in arguments.dtypes:
            for dropout in arguments.dropouts:
                rows += measure(pattern, dtype, dropout, names, m, features, rounds, arguments.clock)
    panels = [
        Panel(
            f"{pattern}, {dtype}" + (f", dropout {dropout:g}" if dropout else ""),
            bars_of([row for row in group if row["impl"] != "base"], "impl", "overhead", 100.0),
        )
        for (pattern, dtype, dropout), group in groups(rows, "pattern", "dtype", "dropout").items()
    ]
    title = f"adapted linear, forward and backward, M {m}, K = N = {features}"
    result = Result(
        title, _COLUMNS, rows, "overhead over the frozen base, %", panels, [*said, *notes(rows)], "{:.1f}".format
    )
    publish(arguments, command, result)
