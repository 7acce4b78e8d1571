"""`bench step`: what adapters add to a whole training step, ours and PEFT's in turns on one model.

Overhead = step / step of the frozen base with input gradients - 1, taken round by round. A step is forward, backward
and what the method does about ranks (scores, gates, rank changes), without the optimizer's own arithmetic. `control` is
the latter by itself, a mean over steps with and without decisions: differences of rows carry the noise of both.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F

from ardlora_ext.bench.machine import Json
from ardlora_ext.bench.output import (
    Column,
    Panel,
    Result,
    add_output_arguments,
    check_outputs,
    groups,
    percent,
    publish,
)
from ardlora_ext.bench.speed.memory import peak_mb
from ardlora_ext.bench.speed.models import (
    COMPILED,
    MIXTURES,
    MODELS,
    RECIPES,
    Batch,
    Runner,
    fitting,
    implementations,
    make_model,
    make_runner,
)
from ardlora_ext.bench.turns import add_clock, in_turns
from ardlora_ext.errors import InputError
from ardlora_ext.layers.experts import ExpertStack
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.record import adapters
from ardlora_ext.native.reference import lora_linear

_DTYPES = ("float32", "bfloat16")
_AIMS = {  # times less overhead than PEFT in the same recipe, without and with dropout
    "plain": {"ours-lora": ("peft-lora", 5), "ours-lora-dropout": ("peft-lora-dropout", 6)},
    "autocast": {"ours-lora": ("peft-lora", 3), "ours-lora-dropout": ("peft-lora-dropout", 5)},
}
_AIMS["trainer"] = _AIMS["autocast"]
_CONTROL_AIM = 0.02  # of the step, for scores and controller
_COLUMNS = (
    Column("model", "model"),
    Column("dtype", "dtype"),
    Column("recipe", "recipe"),
    Column("implementation", "impl"),
    Column("overhead", "overhead", percent),
    Column("median ms", "median_ms", "{:.1f}".format),
    Column("p10", "p10_ms", "{:.1f}".format),
    Column("p90", "p90_ms", "{:.1f}".format),
    Column("tokens/s", "tokens_per_s", "{:,.0f}".format),
    Column("control ms", "control_ms", "{:.2f}".format),
    Column("step MB", "peak_mb", "{:.0f}".format),
)


def measure(
    model: str,
    dtype: str,
    recipe: str,
    names: list[str],
    tokens: int,
    r: int,
    rounds: int,
    small: bool,
    clock: str = "wall",
) -> list[Json]:
    """Time the implementations in turns and return one row each."""
    base, batch = make_model(model, getattr(torch, dtype), tokens, small)
    runners = {name: make_runner(name, base, batch, r, recipe) for name in fitting(model, names)}
    times = in_turns(
        {name: runner.step for name, runner in runners.items()}, rounds, f"{model} {dtype} {recipe}", clock
    )
    rows = []
    for name, runner in runners.items():
        median, low, high = times.spread(name)
        rows.append(
            {
                "model": model,
                "dtype": dtype,
                "recipe": recipe,
                "impl": name,
                "overhead": times.ratio(name, "frozen") - 1.0,
                "median_ms": 1e3 * median,
                "p10_ms": 1e3 * low,
                "p90_ms": 1e3 * high,
                "tokens_per_s": _rows(batch) / median,
                "control_ms": 1e3 * statistics.mean(runner.control[1:]) if runner.control[1:] else None,
                "peak_mb": peak_mb(runner.step),
            }
        )
    return rows


def _rows(batch: Batch) -> int:
    """Return the tokens of a batch; a picture of 112 x 112 has 49 patches and a class token."""
    ids = batch.get("input_ids")
    return 50 * len(batch["pixel_values"]) if ids is None else ids.numel()


class _Reference(nn.Module):
    """An adapter's layer computed by `reference.lora_linear` and autograd, on the same parameters."""

    def __init__(self, layer: LoraLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own, base = self.layer, self.layer.base_layer
        y: torch.Tensor = base(x)
        flat = x.reshape(-1, x.shape[-1])
        update = lora_linear(own.layout, own.ranks, flat, own.lora_A, own.lora_B, own.gate, own.scaling)
        return y + update.view(y.shape)


def check(model: str, tokens: int, r: int, small: bool) -> str:
    """Compare loss and gradients of our implementations with the reference, in float32; return what was found.

    Raises:
        InputError: they differ by more than float32 explains.
    """
    base, batch = make_model(model, torch.float32, tokens, small)
    worst = 0.0
    names = [n for n in fitting(model, list(implementations(r))) if n.startswith("ours")]
    for name in (n for n in names if not n.endswith(("-dropout", COMPILED))):
        ours = make_runner(name, base, batch, r)
        theirs = Runner(name, copy.deepcopy(ours.model), batch, None)
        for path, layer in adapters(theirs.model).items():
            if isinstance(layer, ExpertStack):
                continue  # the tests compare experts with dense weights
            parent, _, leaf = path.rpartition(".")
            setattr(theirs.model.get_submodule(parent), leaf, _Reference(layer))
        got, wanted = (_loss_and_gradients(runner) for runner in (ours, theirs))
        error = float((got - wanted).norm() / wanted.norm())
        worst = max(worst, error)
        if not error <= 1e-4:
            raise InputError(f"bench: {name} on {model} must agree with the reference to 1e-4, got {error:.2g}")
    return f"{model}: loss and gradients agree with the reference; largest relative error {worst:.1g}"


def _loss_and_gradients(runner: Runner) -> torch.Tensor:
    torch.manual_seed(0)
    runner.model.eval()  # without the model's own dropout
    loss = F.cross_entropy(*_logits(runner))
    loss.backward()  # type: ignore[no-untyped-call]
    grads = [p.grad.flatten() for p in runner.model.parameters() if p.grad is not None]
    return torch.cat([loss.detach().view(1), *grads])


def _logits(runner: Runner) -> tuple[torch.Tensor, torch.Tensor]:
    logits: torch.Tensor = runner.model(**runner.batch).logits
    return logits.flatten(0, -2), runner.batch["labels"].flatten()


def notes(rows: list[Json]) -> list[str]:
    """Say where the aims are reached and where not."""
    said = []
    for (model, dtype, recipe), group in groups(rows, "model", "dtype", "recipe").items():
        by, of = {row["impl"]: row for row in group}, f"{model} {dtype} {recipe}"
        aims = _AIMS[recipe] if model not in MIXTURES else {"ours-lora": ("peft-lora", 8)}
        for ours, (theirs, times) in aims.items():
            if ours in by and theirs in by:
                share = by[ours]["overhead"] / by[theirs]["overhead"]
                reached = "reached" if share <= 1 / times else "not reached"
                said.append(f"{of}: {ours} has {share:.2f} of {theirs}'s overhead (aim 1/{times}: {reached})")
        for name in ("ours-ard", "ours-ela"):
            if name in by and by[name]["control_ms"] is not None:
                cost = by[name]["control_ms"] / by["frozen"]["median_ms"]
                reached = "reached" if cost <= _CONTROL_AIM else "not reached"
                said.append(f"{of}: scores and controller of {name} take {cost:.1%} of the frozen step")
                said[-1] += f" (aim {_CONTROL_AIM:.0%}: {reached})"
    return said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench step`."""
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="what to train")
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=list(_DTYPES), help="of the model")
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=["plain"], help="how the step computes")
    names = list(implementations(8))
    eager = [name for name in names if not name.endswith(COMPILED)]
    parser.add_argument(
        "--impl", nargs="+", choices=names, default=eager, help="what to time (default: all but compiled)"
    )
    parser.add_argument("--tokens", type=int, default=512, help="rows of activations per step")
    parser.add_argument("--r", type=int, default=8, help="rank of every adapter")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of all implementations")
    add_clock(parser)
    add_output_arguments(parser, "first compare loss and gradients of ours with the reference, in float32")


def run(arguments: argparse.Namespace, command: str) -> None:
    """Measure and publish."""
    check_outputs(arguments)
    if min(arguments.tokens, arguments.r, arguments.repeats) < 1:
        raise InputError("bench: --tokens, --r and --repeats must be at least 1")
    small = arguments.quick
    rounds = min(arguments.repeats, 5) if small else arguments.repeats
    names = list(dict.fromkeys(["frozen", *arguments.impl]))
    rows: list[Json] = []
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT and transformers about each other's names
        for model in arguments.models:
            if arguments.check:
                said.append(check(model, min(arguments.tokens, 64), arguments.r, small))
            for dtype, recipe in product(arguments.dtypes, arguments.recipe):
                rows += measure(
                    model, dtype, recipe, names, arguments.tokens, arguments.r, rounds, small, arguments.clock
                )
    panels = [
        Panel(f"{model}, {dtype}, {recipe}", [_bar(row, group) for row in group if row["impl"] != "frozen"])
        for (model, dtype, recipe), group in groups(rows, "model", "dtype", "recipe").items()
    ]
    title = f"training step, rank {arguments.r} on all linear layers, {arguments.tokens} tokens"
    result = Result(
        title, _COLUMNS, rows, "overhead over the frozen base, %", panels, [*said, *notes(rows)], "{:.1f}".format
    )
    publish(arguments, command, result)


def _bar(row: Json, group: list[Json]) -> tuple[str, float, float, float]:
    frozen = next(other for other in group if other["impl"] == "frozen")["median_ms"]
    low, high = (100 * (row[key] / frozen - 1.0) for key in ("p10_ms", "p90_ms"))
    return row["impl"], 100 * row["overhead"], low, high
