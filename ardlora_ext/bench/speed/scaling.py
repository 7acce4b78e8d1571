"""`bench scaling`: what rank control costs beside the training itself, over units, ranks and tokens.

`step`: what a controller adds to an optimizer step without a decision. `host`: without the native pass over the weights
and gradients, a kernel on the device where the adapters are. `decision`: what an interval with one takes beyond its
steps. `change`: all units lose their last component and get it back, half of that, with Adam's moments. Over tokens:
forward and backward of one adapter, without its base.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import nn
from torch.optim import AdamW

from ardlora_ext.bench.machine import Json, headline, machine
from ardlora_ext.bench.output import STYLE, Column, Result, add_output_arguments, check_outputs, publish, selected
from ardlora_ext.checkpoint.wrap import wrap
from ardlora_ext.config import AdapterConfig, ArdConfig, ElaConfig
from ardlora_ext.errors import InputError
from ardlora_ext.model.record import adapters
from ardlora_ext.native import dispatch, ops
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.ranks.attach import attach
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate, apply
from ardlora_ext.report.plots import KIND_COLOURS

_HEADS, _HEAD_WIDTH = 40, 32
_MATRIX_WIDTH = 64
_INTERVAL = 10  # optimizer steps between decisions
_AIM_MS = 1.0  # host time of a step at the largest number of units
_KINDS = ("ard, heads", "ard, matrices", "elalora, matrices")
_PASSES = ("row_dots", "importance")  # of _device
_TIMES = ("step_ms", "host_ms", "decision_ms", "change_ms", "layer_ms")
_DRAWN = {"host_ms": "step without decision, host", "decision_ms": "decision", "change_ms": "rank change"}
_COLUMNS = (
    Column("sweep", "sweep"),
    Column("of", "kind"),
    Column("at", "at", "{:,}".format),
    Column("matrices", "matrices", "{:,}".format),
    Column("units", "units", "{:,}".format),
    Column("parameters", "parameters", "{:,}".format),
    Column("step ms", "step_ms", "{:.3f}".format),
    Column("host ms", "host_ms", "{:.3f}".format),
    Column("decision ms", "decision_ms", "{:.2f}".format),
    Column("change ms", "change_ms", "{:.2f}".format),
    Column("adapter ms", "layer_ms", "{:.3f}".format),
)


class Bed:
    """A stack of wrapped layers without base weights, with random gradients, in the middle of a run."""

    def __init__(self, kind: str, units: int, r: int) -> None:
        heads = min(units, _HEADS) if kind == "ard, heads" else 1
        self.matrices = units // heads
        width = heads * _HEAD_WIDTH if heads > 1 else _MATRIX_WIDTH
        self.model = nn.Sequential(*(nn.Linear(width, width, bias=False, device="meta") for _ in range(self.matrices)))
        for base in self.model:
            base.weight = nn.Parameter(torch.empty(0, width))  # never read here
        wrap(self.model, _config(kind, r, heads, self.matrices))
        self.layers = adapters(self.model)
        trained = [p for layer in self.layers.values() for p in layer.trained.values()]
        self.optimizer = AdamW(trained, lr=0.0)
        self.controller = attach(self.model, self.optimizer)
        self.units = len(self.controller.units)
        self.parameters = sum(layer.live_parameters for layer in self.layers.values())
        noise = torch.Generator().manual_seed(0)
        for p in trained:
            p.grad = 1e-3 * torch.randn(p.shape, generator=noise)
        self.optimizer.step()
        self._update: RankUpdate | None = None

    def steps(self, rounds: int) -> tuple[float, float, float]:
        """Return seconds of a step without a decision, of its host part, and of a decision."""
        taken, passes = np.zeros((2, rounds, _INTERVAL))
        for i in range(-1, rounds):  # the first one warms up
            for k in range(_INTERVAL):
                with _timed_passes() as spent:
                    taken[max(i, 0), k] = _seconds(self._step)
                passes[max(i, 0), k] = sum(spent)
                if self._update is not None and self.controller.apply is not None:
                    self.controller.apply(self._update)
        quiet = float(np.median(taken))
        decision = max(0.0, float(np.median(taken.sum(axis=1))) - _INTERVAL * quiet)
        return quiet, float(np.median(taken - passes)), decision

    def _step(self) -> None:
        self.controller.observe()
        self._update = self.controller.propose()
        if self._update is None:
            self.controller.settle()

    def change(self, rounds: int) -> float:
        """Return the seconds of one rank change of every unit."""
        taken = []
        for _ in range(rounds + 1):
            for grow in (0, 1):
                units = {
                    name: tuple(UnitUpdate(tuple(range(r if grow else r - 1)), grow) for r in layer.ranks)
                    for name, layer in self.layers.items()
                }
                taken.append(_seconds(lambda: apply(self.model, RankUpdate(units), self.optimizer)))  # noqa: B023
        return float(np.median(taken[2:]))


def _config(kind: str, r: int, heads: int, matrices: int) -> AdapterConfig:
    if kind.startswith("elalora"):
        return ElaConfig(r=r, tinit=0, total_steps=100_000, deltaT=_INTERVAL)
    return ArdConfig(
        mode="paper",
        r0=r,
        granularity="head" if heads > 1 else "matrix",
        head_dim={str(m): _HEAD_WIDTH for m in range(matrices)} if heads > 1 else None,
        total_steps=100_000,
        warmup_ratio=0.0,
        update_interval=_INTERVAL,
    )


@contextmanager
def _timed_passes() -> Iterator[list[float]]:
    """Yield the seconds of each native pass over weights and gradients within."""
    spent: list[float] = []
    plain = {name: getattr(dispatch, name) for name in _PASSES}

    def timed(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object) -> object:
            began = time.perf_counter()
            found = call(*arguments)
            spent.append(time.perf_counter() - began)
            return found

        return wrapped

    for name, call in plain.items():
        setattr(dispatch, name, timed(call))
    try:
        yield spent
    finally:
        for name, call in plain.items():
            setattr(dispatch, name, call)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _row(sweep: str, kind: str, at: int, **found: float | int) -> Json:
    row: Json = {"sweep": sweep, "kind": kind, "at": at, "matrices": 1, "units": 1, "parameters": 0}
    return {**row, **dict.fromkeys(_TIMES), **found}


def _controlled(sweep: str, kind: str, at: int, units: int, r: int, rounds: int) -> Json:
    bed = Bed(kind, units, r)
    quiet, host, decision = bed.steps(rounds)
    sizes = {"matrices": bed.matrices, "units": bed.units, "parameters": bed.parameters}
    seconds = {"step_ms": quiet, "host_ms": host, "decision_ms": decision, "change_ms": bed.change(rounds)}
    return _row(sweep, kind, at, **sizes, **{key: 1e3 * value for key, value in seconds.items()})


def _layer(tokens: int, rounds: int) -> Json:
    """Time an adapter of rank 8 on a 1024 x 1024 matrix."""
    layout, r = UnitLayout("matrix", "independent", 1, 1024, 1024), 8
    a, b = (torch.randn(r, 1024).requires_grad_() for _ in range(2))
    x, y, dy = torch.randn(tokens, 1024, requires_grad=True), torch.randn(tokens, 1024), torch.randn(tokens, 1024)
    table = layout.encode([r])

    def both() -> None:
        torch.autograd.backward(ops.lora_accumulate(y, x, a, b, None, table, 1.0), dy)

    both()
    times = [_seconds(both) for _ in range(2 * rounds + 1)]
    return _row("tokens", "one adapter", tokens, parameters=2 * r * 1024, layer_ms=1e3 * float(np.median(times)))


def measure(most: int, rounds: int) -> Iterator[Json]:
    """Yield one row for each point of each sweep."""
    for kind in _KINDS:
        for units in (u for u in (10, 100, 1_000, 10_000) if u <= most):
            yield _controlled("units", kind, units, units, 4, rounds)
    for r in (2, 4, 8, 16):
        yield _controlled("ranks", _KINDS[0], r, min(most, 1_000), r, rounds)
    for tokens in (128, 512, 2048, 8192):
        yield _layer(tokens, rounds)


def exponent(rows: list[Json], key: str) -> float | None:
    """Return how a time grows with `at` over the last two points: 1 is linear."""
    if len(rows) < 2 or not all(row[key] for row in rows[-2:]):
        return None
    first, last = rows[-2:]
    return math.log(last[key] / first[key]) / math.log(last["at"] / first["at"])


def notes(rows: list[Json]) -> list[str]:
    """Return what the rows say about the aims."""
    said = []
    for sweep in ("units", "ranks", "tokens"):
        for kind in dict.fromkeys(row["kind"] for row in selected(rows, sweep=sweep)):
            found = selected(rows, sweep=sweep, kind=kind)
            grown = {key.removesuffix("_ms"): exponent(found, key) for key in _TIMES}
            text = ", ".join(f"{name} {value:.2f}" for name, value in grown.items() if value is not None)
            said.append(f"{kind}: grows with {sweep} to the power of: {text}")
            last = found[-1]
            if sweep == "units":
                word = "reached" if last["host_ms"] <= _AIM_MS else "not reached"
                said[-1] += f"; {last['host_ms']:.2f} ms of the host a step at {last['units']:,} units"
                said[-1] += f" (aim {_AIM_MS:g} ms: {word})"
    return said


def draw(path: Path, result: Result) -> None:
    """Draw the sweeps over units, one panel for each time, both axes logarithmic."""
    with matplotlib.rc_context({**STYLE, "axes.spines.left": True}):
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        figure.suptitle(f"{result.title}\n{headline(machine())}", fontsize=9, x=0.01, ha="left")
        for axes, key in zip(figure.subplots(1, 3), _DRAWN, strict=True):
            _draw_lines(axes, key, selected(result.rows, sweep="units"))
        figure.savefig(path, dpi=110, format="png")


def _draw_lines(axes: Axes, key: str, rows: list[Json]) -> None:
    colours = dict(zip(_KINDS, KIND_COLOURS, strict=False))
    for kind, colour in colours.items():
        found = selected(rows, kind=kind)
        x, y = [row["units"] for row in found], [max(row[key], 1e-3) for row in found]
        axes.loglog(x, y, marker="o", markersize=4, linewidth=1.5, color=colour, label=kind)
    if key == "host_ms":
        axes.axhline(_AIM_MS, color="#b45309", linewidth=1, linestyle="--")
        axes.legend(frameon=False)
    axes.set_title(_DRAWN[key])
    axes.set_xlabel("units")
    axes.set_ylabel("ms")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench scaling`."""
    parser.add_argument("--units", type=int, default=10_000, metavar="N", help="largest number of units")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="intervals and changes that are timed")
    add_output_arguments(parser)


def run(arguments: argparse.Namespace, command: str) -> None:
    """Measure and publish."""
    check_outputs(arguments)
    if arguments.units < 10 or arguments.rounds < 1:
        raise InputError("bench: --units must be at least 10 and --rounds at least 1")
    most, rounds = (min(arguments.units, 1_000), 3) if arguments.quick else (arguments.units, arguments.rounds)
    rows = list(measure(most, rounds))
    title = f"cost of rank control, decisions every {_INTERVAL} steps, float32"
    publish(arguments, command, Result(title, _COLUMNS, rows, "ms", [], notes(rows), draw=draw))
