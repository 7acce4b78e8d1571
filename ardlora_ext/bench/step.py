"""`bench step`: what adapters add to a whole training step, ours and PEFT's interleaved on one model.

Overhead = (step - step of the frozen base with input gradients) / the latter. A step is forward and backward, without
the optimizer but with what the method does around it (gates, scores, rank changes happen in the optimizer's hooks, so
methods that have them are timed with an SGD of rate 0). Implementations take turns, so that drift of the machine
cancels; medians and 10 % / 90 % quantiles are reported, losses beside wins.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from ardlora_ext.attach import attach
from ardlora_ext.bench.machine import check_writable, headline, machine, write_json
from ardlora_ext.bench.stats import median_spread
from ardlora_ext.config import AdapterConfig, ArdConfig, ElaConfig, LoraConfig
from ardlora_ext.data import InputError
from ardlora_ext.inject import wrap

Batch = dict[str, torch.Tensor]
Json = dict[str, Any]
_STEPS = 10_000  # length of run that schedules are told: every timed step is in the middle of it


def _llama(tokens: int) -> tuple[nn.Module, Batch]:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    ids = torch.randint(0, 512, (max(tokens // 128, 1), min(tokens, 128)))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def _bert(tokens: int) -> tuple[nn.Module, Batch]:
    config = BertConfig(
        vocab_size=512, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    ids = torch.randint(0, 512, (max(tokens // 32, 1), min(tokens, 32)))
    return BertForSequenceClassification(config), {"input_ids": ids, "labels": torch.zeros(len(ids), dtype=torch.long)}


def _vit(tokens: int) -> tuple[nn.Module, Batch]:
    config = ViTConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=112,
        patch_size=16,
    )
    pixels = torch.randn(max(tokens // 50, 1), 3, 112, 112)
    return ViTForImageClassification(config), {
        "pixel_values": pixels,
        "labels": torch.zeros(len(pixels), dtype=torch.long),
    }


MODELS: dict[str, Callable[[int], tuple[nn.Module, Batch]]] = {"llama": _llama, "bert": _bert, "vit": _vit}


def _ours(config: AdapterConfig) -> Callable[[nn.Module], nn.Module]:
    return lambda model: wrap(model, config)


def _peft(kind: str, dropout: float, r: int) -> Callable[[nn.Module], nn.Module]:
    def build(model: nn.Module) -> nn.Module:
        import peft

        targets = {"target_modules": "all-linear", "lora_dropout": dropout}
        if kind == "adalora":
            config = peft.AdaLoraConfig(init_r=r, target_r=r, total_step=_STEPS, **targets)
        else:
            config = peft.LoraConfig(r=r, use_dora=kind == "dora", **targets)
        wrapped: nn.Module = peft.get_peft_model(model, config)
        return wrapped

    return build


def implementations(r: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Return how each implementation prepares a model, at rank `r` on all linear layers."""
    return {
        "frozen": lambda model: model.requires_grad_(False),
        "ours-lora": _ours(LoraConfig(r=r)),
        "ours-lora-dropout": _ours(LoraConfig(r=r, lora_dropout=0.1)),
        "ours-ard": _ours(ArdConfig(r0=r)),
        "ours-ela": _ours(ElaConfig(r=r, total_steps=_STEPS)),
        "peft-lora": _peft("lora", 0.0, r),
        "peft-lora-dropout": _peft("lora", 0.1, r),
        "peft-adalora": _peft("adalora", 0.0, r),
        "peft-dora": _peft("dora", 0.0, r),
    }


@dataclass
class Runner:
    """One implementation on one model: `step` runs once and returns seconds."""

    name: str
    model: nn.Module
    batch: Batch
    optimizer: torch.optim.Optimizer | None

    def step(self) -> float:
        """Run forward and backward (and the rank controller's part) once."""
        began = time.perf_counter()
        loss: torch.Tensor = self.model(**self.batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        if self.optimizer is not None:
            self.optimizer.step()
        seconds = time.perf_counter() - began
        self.model.zero_grad(set_to_none=True)
        return seconds


def _runner(name: str, base: nn.Module, batch: Batch, r: int) -> Runner:
    torch.manual_seed(0)
    model = implementations(r)[name](copy.deepcopy(base)).train()
    getattr(model, "enable_input_require_grads")()  # noqa: B009 - so that the frozen base has a backward pass too
    optimizer = None
    if name in ("ours-ard", "ours-ela"):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        attach(model, optimizer, total_steps=_STEPS)
    return Runner(name, model, batch, optimizer)


def _peak_mb(runner: Runner) -> float | None:
    """Return the memory one step takes above the resting state, or None where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.is_file():
        return None

    def read(key: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return float(line.split()[1]) / 1024

    try:
        reset.write_text("5")
    except OSError:
        return None
    before = read("VmRSS")
    runner.step()
    return read("VmHWM") - before


def measure(model: str, dtype: torch.dtype, names: list[str], tokens: int, r: int, repeats: int) -> list[Json]:
    """Time the implementations in turns and return one row each."""
    torch.manual_seed(0)
    base, batch = MODELS[model](tokens)
    base.to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    runners = [_runner(name, base, batch, r) for name in names]
    times: dict[str, list[float]] = {name: [] for name in names}
    for runner in runners:
        runner.step()  # warm-up
    for _ in tqdm(range(repeats), desc=f"{model} {str(dtype)[6:]}", unit="round"):
        for runner in runners:
            times[runner.name].append(runner.step() * 1e3)
    gc.collect()
    base_ms = median_spread(times["frozen"])[0]
    rows = []
    for runner in runners:
        median, low, high = median_spread(times[runner.name])
        rows.append(
            {
                "model": model,
                "dtype": str(dtype)[6:],
                "impl": runner.name,
                "overhead": median / base_ms - 1.0,
                "median_ms": median,
                "p10_ms": low,
                "p90_ms": high,
                "tokens_per_s": tokens / median * 1e3,
                "peak_mb": _peak_mb(runner),
            }
        )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench step`."""
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="what to train")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"], help="of the model"
    )
    parser.add_argument("--impl", nargs="+", choices=list(implementations(8)), default=list(implementations(8)))
    parser.add_argument("--tokens", type=int, default=512, help="rows of activations per step")
    parser.add_argument("--r", type=int, default=8, help="rank of every adapter")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of all implementations")
    parser.add_argument("--quick", action="store_true", help="one small model, few rounds: below two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")


def run(arguments: argparse.Namespace, command: str) -> None:
    """Measure, print a table and write JSON."""
    check_writable(arguments.json, "--json")
    if arguments.tokens < 1 or arguments.r < 1 or arguments.repeats < 1:
        raise InputError("bench: --tokens, --r and --repeats must be at least 1")
    models = ["bert"] if arguments.quick else arguments.models
    repeats = min(arguments.repeats, 5) if arguments.quick else arguments.repeats
    names = list(dict.fromkeys(["frozen", *arguments.impl]))
    console = Console()
    console.print(headline(machine()))
    rows: list[Json] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT and transformers about each other's names
        for model in models:
            for dtype in arguments.dtypes:
                rows += measure(model, getattr(torch, dtype), names, arguments.tokens, arguments.r, repeats)
    console.print(_table(rows))
    if arguments.json is not None:
        write_json(arguments.json, command, rows)


def _table(rows: list[Json]) -> Table:
    table = Table(title="one training step, adapters on all linear layers")
    for column in ("model", "dtype", "implementation", "overhead", "median ms", "p10", "p90", "tokens/s", "step MB"):
        table.add_column(column, justify="left" if column in ("model", "dtype", "implementation") else "right")
    for row in rows:
        table.add_row(
            row["model"],
            row["dtype"],
            row["impl"],
            f"{100 * row['overhead']:+.1f} %",
            *(f"{row[k]:.1f}" for k in ("median_ms", "p10_ms", "p90_ms")),
            f"{row['tokens_per_s']:,.0f}",
            "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
        )
    return table
