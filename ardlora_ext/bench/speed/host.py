"""`bench host`: what a layer's call costs beside its arithmetic, ours and PEFT's in turns.

Layers so small that the arithmetic is nothing, on one thread; what is left is Python, autograd and torch's calls. It is
the whole cost on a GPU that waits for its host, and on small models. The clock is the thread's own, so that other
processes disturb less.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from ardlora_ext.bench.machine import Json
from ardlora_ext.bench.output import Column, Panel, Result, add_output_arguments, check_outputs, percent, publish
from ardlora_ext.bench.stats import median_spread
from ardlora_ext.checkpoint.wrap import wrap
from ardlora_ext.config import ArdConfig, LoraConfig
from ardlora_ext.errors import InputError

_LAYERS, _WIDTH, _ROWS = 20, 64, 8
_WARM_UP = 20
_NAMES = [str(i) for i in range(_LAYERS)]
_AIMS = {"lora": 1 / 2, "dropout": 1 / 3, "autocast": 1 / 2, "gates": 1 / 2}  # of what PEFT adds to the plain layer
_COLUMNS = (
    Column("recipe", "recipe"),
    Column("implementation", "impl"),
    Column("forward us", "forward_us", "{:.1f}".format),
    Column("backward us", "backward_us", "{:.1f}".format),
    Column("above plain us", "above_us", "{:.1f}".format),
    Column("of PEFT's", "share", percent),
)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(_WIDTH, _WIDTH) for _ in range(_LAYERS)])


def _peft(dropout: float) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=8, target_modules=_NAMES, lora_dropout=dropout)
    model: nn.Module = peft.get_peft_model(_net(), config)
    return model


def models(recipe: str) -> dict[str, nn.Module]:
    """Return the implementations of one recipe: `plain` (frozen layers), `peft`, and ours."""
    dropout = 0.1 if recipe == "dropout" else 0.0
    ours = (
        ArdConfig(r0=8, target_modules=_NAMES, granularity="matrix", lora_dropout=dropout)
        if recipe == "gates"
        else LoraConfig(r=8, target_modules=_NAMES, lora_dropout=dropout)
    )
    plain = _net().requires_grad_(False)
    return {"plain": plain, "peft": _peft(dropout), "ours": wrap(_net(), ours)}


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(recipe: str, rounds: int, clock: Callable[[], float] = time.thread_time) -> list[Json]:
    """Time forward and backward of each implementation in turns; return one row each, in microseconds a layer."""
    x, dy = torch.randn(_ROWS, _WIDTH, requires_grad=True), torch.ones(_ROWS, _WIDTH)
    nets = {name: model.train() for name, model in models(recipe).items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in nets}
    with _one_thread():
        for step in tqdm(range(_WARM_UP + rounds), desc=recipe, unit="round", leave=False, disable=None):
            for name, net in nets.items():
                start = clock()
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe == "autocast"):
                    y = net(x)
                middle = clock()
                torch.autograd.backward(y, dy.to(y.dtype))
                end = clock()
                net.zero_grad(set_to_none=True)
                x.grad = None
                if step >= _WARM_UP:
                    times[name].append((middle - start, end - middle))
    rows: list[Json] = []
    for name, taken in times.items():
        forward, backward = (1e6 * median_spread(list(part))[0] / _LAYERS for part in zip(*taken, strict=True))
        rows.append({"recipe": recipe, "impl": name, "forward_us": forward, "backward_us": backward})
    by = {row["impl"]: row["forward_us"] + row["backward_us"] for row in rows}
    for row in rows:
        row["above_us"] = by[row["impl"]] - by["plain"]
        row["share"] = row["above_us"] / (by["peft"] - by["plain"])
    return rows


def notes(rows: list[Json]) -> list[str]:
    """Say where the aims are reached and where not."""
    said = []
    for row in rows:
        if row["impl"] == "ours":
            aim = _AIMS[row["recipe"]]
            reached = "reached" if row["share"] <= aim else "not reached"
            said.append(f"{row['recipe']}: {row['share']:.2f} of what PEFT adds to a layer (aim {aim:.2f}: {reached})")
    return said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench host`."""
    parser.add_argument("--recipes", nargs="+", choices=list(_AIMS), default=list(_AIMS), help="what to run")
    parser.add_argument("--repeats", type=int, default=300, help="rounds of all implementations")
    add_output_arguments(parser)


def run(arguments: argparse.Namespace, command: str) -> None:
    """Measure and publish."""
    check_outputs(arguments)
    if arguments.repeats < 1:
        raise InputError("bench: --repeats must be at least 1")
    rounds = min(arguments.repeats, 10) if arguments.quick else arguments.repeats
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        rows = [row for recipe in arguments.recipes for row in measure(recipe, rounds)]
    bars = [(f"{row['recipe']} {row['impl']}", row["above_us"], row["above_us"], row["above_us"]) for row in rows]
    panels = [Panel("above the plain layer", [bar for bar in bars if not bar[0].endswith("plain")])]
    title = f"host time of a layer: {_LAYERS} layers of {_WIDTH} x {_WIDTH}, {_ROWS} rows, rank 8, one thread"
    publish(arguments, command, Result(title, _COLUMNS, rows, "us a layer", panels, notes(rows), "{:.1f}".format))
