"""`bench kernels --device cuda`: adapted linears on a GPU, by CUDA events and with a cold L2 cache.

`base` is cuBLAS alone, `torch-padded` cuBLAS on zero-padded factors. Implementations take turns within each round, and
`adapter` is the time above the frozen base, taken round by round.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ardlora_ext.bench.machine import Json
from ardlora_ext.bench.output import Column, Panel, Result, bars_of, groups, publish
from ardlora_ext.bench.speed.layers.compositions import Composition
from ardlora_ext.bench.speed.layers.patterns import Site, sites
from ardlora_ext.bench.speed.layers.register import compose, fitting
from ardlora_ext.errors import InputError

IMPLEMENTATIONS = ("base", "ours", "peft", "torch-padded", "torch-loop", "torch-grouped_mm")
_PATTERNS = (
    "uniform-8",
    "uniform-64",
    "heads-shared",
    "heads-independent",
    "experts",
    "experts-ragged",
    "experts-skewed",
)
_FLUSH_BYTES = 256 << 20  # more than any L2 cache holds
_QUEUE_SECONDS = 2e-3  # more than the host needs for a layer forward and backward
_CYCLES = 2e9  # of a GPU in a second, at most about
_PASSES = ("forward", "both")
_COLUMNS = (
    Column("pattern", "pattern"),
    Column("K = N", "features"),
    Column("M", "rows"),
    Column("dtype", "dtype"),
    Column("pass", "pass"),
    Column("implementation", "impl"),
    Column("us", "us", "{:.1f}".format),
    Column("p10", "p10_us", "{:.1f}".format),
    Column("p90", "p90_us", "{:.1f}".format),
    Column("adapter us", "adapter_us", "{:.1f}".format),
    Column("overhead", "overhead", "{:.1%}".format),
)
Clock = Callable[[Callable[[], None]], float]  # seconds of one call


def keep_busy(seconds: float) -> None:
    """Let the GPU wait on its current stream, so that the host can queue what is to be timed."""
    torch.cuda._sleep(int(_CYCLES * seconds))  # type: ignore[no-untyped-call]


class EventClock:
    """Time a call on the GPU, after the L2 cache has been swept and while the GPU waits for the host to queue it."""

    def __init__(self, device: torch.device) -> None:
        self.sweep = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.begin, self.end = torch.cuda.Event(True), torch.cuda.Event(True)  # type: ignore[no-untyped-call]

    def __call__(self, call: Callable[[], None]) -> float:
        self.sweep.zero_()
        keep_busy(_QUEUE_SECONDS)  # else the events would time the host's gaps between launches
        self.begin.record()
        call()
        self.end.record()
        self.end.synchronize()
        return float(self.begin.elapsed_time(self.end)) * 1e-3


def on_device(site: Site, device: torch.device) -> Site:
    """Return the site with its tensors on a device."""
    moved = {name: getattr(site, name).to(device) for name in ("weight", "lora_A", "lora_B")}
    return dataclasses.replace(site, **moved)


def measure(
    pattern: str, dtype: str, rows: int, features: int, rounds: int, device: torch.device, clock: Clock
) -> list[Json]:
    """Time every implementation on one matrix of a pattern; one row for each of them and each pass."""
    site = on_device(sites(pattern, features, getattr(torch, dtype), rows)[0], device)
    names = fitting(IMPLEMENTATIONS, site, 0.0)
    modules = {name: compose(name, site, 0.0).to(device).train() for name in names}
    x = torch.randn(rows, features, device=device).to(site.weight.dtype)
    dy = torch.randn_like(x)
    found = []
    for what in _PASSES:
        calls = {name: _call(module, x, dy if what == "both" else None) for name, module in modules.items()}
        seconds = _in_turns(calls, rounds, clock)
        for name in names:
            low, median, high = np.quantile(seconds[name], [0.1, 0.5, 0.9]) * 1e6
            where = {"pattern": pattern, "features": features, "rows": rows, "dtype": dtype, "pass": what, "impl": name}
            times = {"us": median, "p10_us": low, "p90_us": high}
            above = {
                "adapter_us": 1e6 * float(np.median(seconds[name] - seconds["base"])),
                "overhead": float(np.median(seconds[name] / seconds["base"])) - 1.0,
            }
            found.append({**where, **times, **above})
    return found


def _call(module: Composition, x: torch.Tensor, dy: torch.Tensor | None) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            module(x)

    def both() -> None:
        module(x.detach().requires_grad_()).backward(dy)
        module.zero_grad(set_to_none=True)

    return forward if dy is None else both


def _in_turns(calls: dict[str, Callable[[], None]], rounds: int, clock: Clock) -> dict[str, np.ndarray]:
    names, seconds = list(calls), {name: np.zeros(rounds) for name in calls}
    for name in names:
        calls[name]()  # warm-up: allocations, cuBLAS's choice
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name][i] = clock(calls[name])
    return seconds


def notes(rows: Sequence[Json]) -> list[str]:
    """Say how our adapter compares with PEFT's and with cuBLAS on padded factors, losses included."""
    said = []
    for keys, group in groups(list(rows), "pattern", "features", "rows", "dtype", "pass").items():
        by_name = {row["impl"]: row["adapter_us"] for row in group}
        for other in ("peft", "torch-padded"):
            if by_name["ours"] > 0 and other in by_name:
                ratio = by_name[other] / by_name["ours"]
                said.append(f"{' '.join(map(str, keys))}: adapter {ratio:.2f} x as fast as {other}")
    return said


def run(arguments: argparse.Namespace, command: str) -> None:
    """Measure on torch's current CUDA device and publish."""
    if not torch.cuda.is_available():
        raise InputError("bench: --device cuda must have a CUDA device and a torch with CUDA")
    device = torch.device("cuda", torch.cuda.current_device())
    clock = EventClock(device)
    features = (1024,) if arguments.quick else (1024, 4096)
    rows: list[Json] = []
    for pattern in _PATTERNS:
        for width in features:
            for dtype in arguments.dtypes:
                for m in arguments.rows:
                    rows += measure(pattern, dtype, m, width, arguments.repeats, device, clock)
    panels = []
    for (pattern, dtype, what), group in groups(rows, "pattern", "dtype", "pass").items():
        bars = bars_of(
            [{**row, "label": _label(row)} for row in group if row["impl"] != "base"], "label", "overhead", 100
        )
        panels.append(Panel(f"{pattern}, {dtype}, {what}", bars))
    title = f"kernels on {torch.cuda.get_device_name(device)}, cold L2"
    publish(arguments, command, Result(title, _COLUMNS, rows, "% above the base", panels, notes(rows)))


def _label(row: Json) -> str:
    return f"{row['impl']}, M {row['rows']}, K {row['features']}"
