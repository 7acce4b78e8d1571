"""Stages that time: a training step of LLaMA-7B-size layers, and adapted layers by themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ardlora_ext.bench.gpu.context import Context, overlapping
from ardlora_ext.bench.machine import Json
from ardlora_ext.bench.speed import kernels_cuda
from ardlora_ext.bench.speed.models import Runner, make_runner
from ardlora_ext.native import dispatch

_RANKS = (8, 16, 64, 128)
_ROUNDS = 8
_LAST = "ours-lora, base last"  # as with ARDLORA_BASE_LAST=1
_OVERLAPPING = "ours-lora, overlapping"  # as with ARDLORA_OVERLAP_LAUNCHES=1


def _model(context: Context) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Four layers of LLaMA 7B in bfloat16, and two sequences of 2048 tokens."""
    d, ff, heads, layers, tokens = (64, 176, 4, 1, 16) if context.dry else (4096, 11008, 32, 4, 2048)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=d,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=tokens,
    )
    torch.manual_seed(0)
    with torch.device(context.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        ids = torch.randint(0, 512, (2, tokens))
    return model, {"input_ids": ids, "labels": ids}


def step(context: Context) -> Iterator[Json]:
    """Time, host time and memory of a step: frozen, ours and PEFT's, plain and under autocast, at every rank."""
    base, batch = _model(context)
    for recipe, r in product(("autocast", "plain"), (_RANKS[:1] if context.dry else _RANKS)):
        runners = {}
        for name in ("frozen", "ours-lora", "peft-lora"):
            runners[name] = make_runner(name, base, batch, r, recipe)
        for name in (_LAST, _OVERLAPPING):
            runners[name] = make_runner("ours-lora", base, batch, r, recipe)
        with context.kernels():
            with _base_last():  # what a layer's first call decides
                runners[_LAST].step()
            times = _in_turns(runners, 1 if context.dry else _ROUNDS, context)
            for name, runner in runners.items():
                device, host = np.median(times[name], axis=0)
                yield {
                    "case": f"{recipe} r {r} {name}",
                    "ok": bool(np.isfinite(device)),
                    "ms": 1e3 * device,
                    "overhead": float(np.median(times[name][:, 0] / times["frozen"][:, 0])) - 1.0,
                    "host_us": 1e6 * host,
                    "peak_mb": _peak(runner, context),
                }


@contextmanager
def _base_last() -> Iterator[None]:
    """Let adapters write y and dx first."""
    dispatch.BASE_LAST = True
    try:
        yield
    finally:
        dispatch.BASE_LAST = False


def _in_turns(runners: dict[str, Runner], rounds: int, context: Context) -> dict[str, np.ndarray]:
    """Return [rounds, 2] seconds of each: on the device, and of the host until all is queued."""
    times = {name: np.zeros((rounds, 2)) for name in runners}
    for runner in runners.values():
        runner.step()
    for i in range(rounds):
        for name, runner in runners.items():
            with overlapping() if name == _OVERLAPPING else nullcontext():
                times[name][i] = _timed(runner.step, context)
    return times


def _timed(call: Callable[[], None], context: Context) -> tuple[float, float]:
    """Return seconds on the device and of the host; the device is kept busy while the host queues."""
    if context.dry:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began, time.perf_counter() - began
    begin, end = torch.cuda.Event(True), torch.cuda.Event(True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    kernels_cuda.keep_busy(20e-3)
    begin.record()
    began = time.perf_counter()
    call()
    host = time.perf_counter() - began
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * float(begin.elapsed_time(end)), host


def _peak(runner: Runner, context: Context) -> float | None:
    """Return MB that a step needs beyond what is there before it."""
    if context.dry:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner.step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def kernels(context: Context) -> Iterator[Json]:
    """`bench kernels --device cuda` at rows that models train at."""
    if context.dry:
        clock: kernels_cuda.Clock = _wall
        sizes, rounds = [(pattern, "bfloat16", 16, 128) for pattern in ("uniform-8", "experts-ragged")], 1
    else:
        clock, rounds = kernels_cuda.EventClock(context.device), 20
        sizes = list(product(("uniform-8", "uniform-64", "heads-shared"), ("bfloat16",), (2048, 8192), (4096,)))
        sizes += product(("experts", "experts-ragged", "experts-skewed"), ("bfloat16",), (8192,), (2048,))
    for pattern, dtype, rows, features in sizes:
        with context.kernels():
            for row in kernels_cuda.measure(pattern, dtype, rows, features, rounds, context.device, clock):
                case = f"{pattern} {row['impl']} {row['pass']}, M {rows}, K {features}"
                yield {**row, "case": case, "ok": row["us"] > 0}


def _wall(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
