"""`bench memory`: what adapters hold and what a training step takes above the resting model."""

from __future__ import annotations

import argparse
import ctypes
import gc
import warnings
from collections.abc import Callable
from pathlib import Path

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
    publish,
)
from ardlora_ext.bench.speed.models import COMPILED, MODELS, Runner, fitting, implementations, make_model, make_runner
from ardlora_ext.errors import InputError

_DTYPES = ("float32", "bfloat16")
_MIB = float(1 << 20)
_COLUMNS = (
    Column("model", "model"),
    Column("dtype", "dtype"),
    Column("implementation", "impl"),
    Column("trained MB", "trained_mb", "{:.1f}".format),
    Column("saved for backward MB", "saved_mb", "{:.1f}".format),
    Column("above frozen", "saved_above_mb", "{:+.1f}".format),
    Column("peak of a step MB", "peak_mb", "{:.0f}".format),
)


def peak_mb(step: Callable[[], object]) -> float | None:
    """Return the resident memory that a step takes at most above its start, or None where Linux does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.is_file():
        return None

    def read(key: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return float(line.split()[1]) / 1024

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what earlier steps freed must count again
    try:
        reset.write_text("5")
    except OSError:
        return None
    before = read("VmRSS")
    step()
    return read("VmHWM") - before


def saved_mb(runner: Runner) -> float:
    """Return the bytes that autograd holds between forward and backward, without parameters, buffers and inputs."""
    known = {t.untyped_storage().data_ptr() for t in [*runner.model.parameters(), *runner.model.buffers()]}
    known |= {t.untyped_storage().data_ptr() for t in runner.batch.values()}
    held: dict[int, torch.UntypedStorage] = {}  # alive, so that an address is not used twice

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        runner.forward()
    return sum(storage.nbytes() for storage in held.values()) / _MIB


def measure(model: str, dtype: str, names: list[str], tokens: int, r: int, small: bool) -> list[Json]:
    """Return one row per implementation."""
    base, batch = make_model(model, getattr(torch, dtype), tokens, small)
    rows: list[Json] = []
    for name in fitting(model, names):
        runner = make_runner(name, base, batch, r)
        runner.step()  # what is kept from the first step on
        trained = sum(p.numel() * p.element_size() for p in runner.model.parameters() if p.requires_grad) / _MIB
        saved = saved_mb(runner)
        above = saved - rows[0]["saved_mb"] if rows else 0.0
        row = {"model": model, "dtype": dtype, "impl": name, "trained_mb": trained, "saved_mb": saved}
        rows.append({**row, "saved_above_mb": above, "peak_mb": peak_mb(runner.step)})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench memory`."""
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="what to train")
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=list(_DTYPES), help="of the model")
    eager = [name for name in implementations(8) if not name.endswith(COMPILED)]
    parser.add_argument("--impl", nargs="+", choices=eager, default=eager, help="what to measure")
    parser.add_argument("--tokens", type=int, default=512, help="rows of activations per step")
    parser.add_argument("--r", type=int, default=8, help="rank of every adapter")
    add_output_arguments(parser)


def run(arguments: argparse.Namespace, command: str) -> None:
    """Measure and publish."""
    check_outputs(arguments)
    if min(arguments.tokens, arguments.r) < 1:
        raise InputError("bench: --tokens and --r must be at least 1")
    names = list(dict.fromkeys(["frozen", *arguments.impl]))
    rows: list[Json] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT and transformers about each other's names
        for model in arguments.models:
            for dtype in arguments.dtypes:
                rows += measure(model, dtype, names, arguments.tokens, arguments.r, arguments.quick)
    panels = [
        Panel(f"{model}, {dtype}", bars_of([row for row in group if row["impl"] != "frozen"], "impl", "saved_above_mb"))
        for (model, dtype), group in groups(rows, "model", "dtype").items()
    ]
    title = f"memory of a training step, rank {arguments.r} on all linear layers, {arguments.tokens} tokens"
    axis = "MB saved for backward beyond the frozen base"
    publish(arguments, command, Result(title, _COLUMNS, rows, axis, panels, number="{:.1f}".format))
