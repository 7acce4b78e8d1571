"""`bench resize`: a change of ranks over all adapter parameters and their Adam moments, against memcpy of its bytes.

An event is `resize.apply` as a controller calls it: checks, allocation, the native move of all rows, new rows of
lora_A, assignments. Its bytes are those of the live rows that parameters and both moments hold before or after, the
larger. With few columns (`--features 32`) what is left is Python: us a matrix.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW

from ardlora_ext.bench.machine import Json
from ardlora_ext.bench.output import Column, Panel, Result, add_output_arguments, check_outputs, publish
from ardlora_ext.bench.stats import median_spread
from ardlora_ext.bench.turns import CLOCKS, add_clock
from ardlora_ext.checkpoint.wrap import wrap
from ardlora_ext.config import LoraConfig
from ardlora_ext.errors import InputError
from ardlora_ext.model.record import adapters
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate, apply

_RANK = 16
_BUFFERS = 3  # parameter and two moments
_TIME_AIM, _DOUBLE_AIM, _SIZE_AIM = 2.5, 4.0, 1.1  # new rows are drawn and made orthogonal
_COLUMNS = (
    Column("event", "event"),
    Column("parameters", "parameters", "{:,}".format),
    Column("MB moved", "mb", "{:.0f}".format),
    Column("median ms", "median_ms", "{:.2f}".format),
    Column("p10", "p10_ms", "{:.2f}".format),
    Column("p90", "p90_ms", "{:.2f}".format),
    Column("us a matrix", "matrix_us", "{:.1f}".format),
    Column("GB/s", "gb_s", "{:.1f}".format),
    Column("x memcpy", "ratio", "{:.2f}".format),
    Column("allocated / needed", "allocated", "{:.2f}".format),
)


@dataclass(frozen=True)
class Event:
    """A rank change of every unit: components to keep, how many to grow, and whether each has its `own` order."""

    keep: tuple[int, ...]
    grow: int = 0
    own: bool = False

    @property
    def rank(self) -> int:
        """Rank after it."""
        return len(self.keep) + self.grow


def events() -> Iterator[tuple[str, Event, Event]]:
    """Return each event by name, with the one that leads back."""
    everything = tuple(range(_RANK))
    half = everything[: _RANK // 2]
    yield "reorder all", Event(everything[::-1]), Event(everything[::-1])
    yield "reorder, each its own", Event(everything, own=True), Event(everything, own=True)
    yield "exchange one", Event(everything[1:], 1), Event(everything[1:], 1)
    yield "halve", Event(everything[::2]), Event(half, _RANK // 2)
    yield "double", Event(half, _RANK // 2), Event(half)


class Bed:
    """A stack of wrapped layers without base weights, and the optimizer of their adapters."""

    def __init__(self, parameters: int, features: int) -> None:
        per_module = _RANK * 2 * features
        self.modules = max(1, round(parameters / per_module))
        self.parameters = self.modules * per_module
        bases = [nn.Linear(features, features, bias=False, device="meta") for _ in range(self.modules)]
        self.model = _wrapped(bases)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = AdamW(trained, lr=0.0)
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def change(self, event: Event) -> RankUpdate:
        """Return the event for all modules."""
        drawn = random.Random(0)
        keeps = {name: tuple(drawn.sample(event.keep, len(event.keep))) for name in adapters(self.model) if event.own}
        units = {name: (UnitUpdate(keeps.get(name, event.keep), event.grow),) for name in adapters(self.model)}
        return RankUpdate(units)

    def addresses(self) -> dict[int, int]:
        """Return the bytes of every buffer that moves, by address."""
        found = {}
        for layer in adapters(self.model).values():
            for parameter in layer.factors.values():
                state = self.optimizer.state[parameter]
                for t in (parameter, state["exp_avg"], state["exp_avg_sq"]):
                    found[t.data_ptr()] = t.untyped_storage().nbytes()
        return found


def _wrapped(bases: list[nn.Linear]) -> nn.Module:
    """Wrap layers on the meta device: their weights are never read here, and would be most of the memory."""
    model = nn.Sequential(*bases)
    for base in bases:
        base.weight = nn.Parameter(torch.empty(0, base.in_features))
    return wrap(model, LoraConfig(r=_RANK, target_modules="all-linear"))


def _timed(call: Callable[[], object], clock: str) -> float:
    now: Callable[[], float] = getattr(time, CLOCKS[clock])
    began = now()
    call()
    return now() - began


def measure(parameters: int, rounds: int, features: int, clock: str) -> list[Json]:
    """Time every event and a memcpy of its bytes in turns."""
    bed = Bed(parameters, features)
    rows: list[Json] = []
    for name, event, back in events():
        if name == "double":
            apply(bed.model, bed.change(Event(tuple(range(_RANK // 2)))), bed.optimizer)
        before = next(iter(adapters(bed.model).values())).ranks[0]
        live = max(before, event.rank) * 2 * features * bed.modules
        source = torch.ones(live * _BUFFERS)
        target = torch.zeros_like(source)
        there, copies = np.zeros(rounds), np.zeros(rounds)
        fresh = 0
        for i in range(-1, rounds):  # the first one warms up
            copied = _timed(lambda: target.copy_(source), clock)  # noqa: B023 - called at once
            old, update = bed.addresses(), bed.change(event)
            took = _timed(lambda: apply(bed.model, update, bed.optimizer), clock)  # noqa: B023 - called at once
            if i >= 0:
                there[i], copies[i] = took, copied
            fresh = sum(size for address, size in bed.addresses().items() if address not in old)
            apply(bed.model, bed.change(back), bed.optimizer)
        size = 4 * live * _BUFFERS
        median, low, high = median_spread(list(there))
        needed = 4 * _BUFFERS * event.rank * 2 * features * bed.modules
        row = {"event": name, "parameters": bed.parameters, "mb": size / 1e6, "median_ms": 1e3 * median}
        row |= {
            "matrix_us": 1e6 * median / bed.modules,
            "p10_ms": 1e3 * low,
            "p90_ms": 1e3 * high,
            "gb_s": 2 * size / median / 1e9,
        }
        rows.append({**row, "ratio": float(np.median(there / copies)), "allocated": fresh / needed})
        if name == "double":
            rows.append(_memcpy(bed.parameters, size, list(copies)))
    return rows


def _memcpy(parameters: int, size: int, seconds: list[float]) -> Json:
    median, low, high = median_spread(seconds)
    row = {"event": "memcpy", "parameters": parameters, "mb": size / 1e6, "median_ms": 1e3 * median}
    row |= {"p10_ms": 1e3 * low, "p90_ms": 1e3 * high, "gb_s": 2 * size / median / 1e9}
    return {**row, "ratio": 1.0, "allocated": 0.0, "matrix_us": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench resize`."""
    parser.add_argument("--parameters", type=int, default=10_000_000, help="adapter parameters, about")
    parser.add_argument("--rounds", type=int, default=20, help="repetitions of every event")
    parser.add_argument("--features", type=int, default=1024, help="columns of every factor (default: 1024)")
    add_clock(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace, command: str) -> None:
    """Measure and publish."""
    check_outputs(arguments)
    if min(arguments.parameters, arguments.rounds) < 1 or arguments.features < _RANK:
        raise InputError(f"bench: --parameters and --rounds must be at least 1, --features at least {_RANK}")
    parameters = min(arguments.parameters, 1_000_000) if arguments.quick else arguments.parameters
    rounds = min(arguments.rounds, 5) if arguments.quick else arguments.rounds
    rows = measure(parameters, rounds, arguments.features, arguments.clock)
    said = []
    for row in rows[:-1]:
        aim = _DOUBLE_AIM if row["event"] == "double" else _TIME_AIM
        time_word = "reached" if row["ratio"] <= aim else "not reached"
        size_word = "reached" if row["allocated"] <= _SIZE_AIM else "not reached"
        said.append(f"{row['event']}: {row['ratio']:.2f} x memcpy (aim {aim}: {time_word}), ")
        said[-1] += f"allocates {row['allocated']:.2f} of what the new ranks need (aim {_SIZE_AIM}: {size_word})"
    panel = Panel(
        "time / memcpy of the same bytes", [(row["event"], row["ratio"], 0.0, 0.0) for row in rows], _TIME_AIM
    )
    title = f"rank change of {rows[0]['parameters']:,} adapter parameters with two moments, fp32"
    publish(arguments, command, Result(title, _COLUMNS, rows, "times memcpy", [panel], said, "{:.2f}".format))
