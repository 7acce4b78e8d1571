"""Several GPUs on paper: bytes on each and on the wire, the adapters' share of the time. Estimated, not measured.

Sharding as in Megatron and FSDP2. Tensor parallelism (TP) cuts q, k, v and the first MLP matrices by output, the
attention's and MLP's output by input, and the factor of an adapter that spans the cut side with them; activations are
cut with sequence parallelism. FSDP shards the frozen base and replicates adapters, whose gradients alone are reduced.
Collectives are rings: a GPU sends 2 (g - 1) / g of what is reduced and (g - 1) / g of what is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

from ardlora_ext.model.heads import head_cut
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.plan.memory import Plan, adapter_bytes, ranks_of

LAYOUTS = ((1, 1), (1, 8), (8, 1), (8, 8), (8, 64))


@dataclass(frozen=True)
class Gpu:
    """What the estimate assumes of a GPU: data-sheet figures, and the shares of them that kernels reach.

    Attributes:
        flops: dense bf16 operations a second.
        bandwidth: of memory, bytes a second.
        gemm: share of `flops` that the base's products reach.
        stream: share of `bandwidth` that a kernel bound by memory reaches.
        skinny: share of `flops` that the adapters' products reach.
    """

    flops: float
    bandwidth: float
    gemm: float = 0.6
    stream: float = 0.8
    skinny: float = 0.3


GPUS = {"a100": Gpu(312e12, 2.04e12), "h100": Gpu(989e12, 3.35e12), "h200": Gpu(989e12, 4.8e12)}


@dataclass(frozen=True)
class Sharding:
    """One way to spread a plan.

    Attributes:
        tp: GPUs that share each matrix.
        fsdp: groups that share the base and split the batch.
        gpu_bytes: on each: base, adapters with gradients and moments, activations.
        reduced: bytes of adapter gradients a GPU sends per step.
        reduced_full: the same if all parameters were trained in their dtype.
        gathered: bytes of base weights a GPU sends per step (forward and backward).
        tp_extra: bytes a GPU sends per step for the adapters' partial sums under TP.
        time_share: the adapters' time over that of the base's linear layers.
    """

    tp: int
    fsdp: int
    gpu_bytes: int
    reduced: int
    reduced_full: int
    gathered: int
    tp_extra: int
    time_share: float


def shardings(plan: Plan, gpu: Gpu) -> list[Sharding]:
    """Return the estimate for `LAYOUTS`, each GPU group with the plan's batch."""
    return [_sharding(plan, gpu, tp, fsdp) for tp, fsdp in LAYOUTS if _divides(plan, tp)]


def _divides(plan: Plan, tp: int) -> bool:
    return all(size % tp == 0 for lay in plan.layouts.values() for size in (lay.in_features, lay.out_features))


def _by_input(name: str, layout: UnitLayout) -> bool:
    """Tell whether TP cuts this matrix by its input."""
    cut = head_cut(name)
    return cut == "in" if cut is not None else layout.in_features > layout.out_features


def _sharding(plan: Plan, gpu: Gpu, tp: int, fsdp: int) -> Sharding:
    ranks = ranks_of(plan.layouts, plan.config.start_rank)
    gradients = partial = 0
    base_s = adapter_s = 0.0
    for name, layout in plan.layouts.items():
        one = {name: layout}
        trained = adapter_bytes(one, ranks, plan.config)[1]
        a_rows, b_rows = layout.rows(ranks[name])
        a, b = a_rows * layout.a_width, b_rows * layout.b_width
        cut = a if _by_input(name, layout) else b  # the factor on the cut side
        gradients += round(trained * (cut / tp + (a + b - cut)) / (a + b))
        m, r = plan.rows.get(name, 0), min(a_rows, b_rows)
        partial += 4 * m * r  # H where the input is cut, dH where the output is
        k, n = layout.in_features, layout.out_features
        k, n = (k // tp, n) if _by_input(name, layout) else (k, n // tp)
        base_s += 4 * m * k * n / (gpu.flops * gpu.gemm)
        adapter_s += adapter_seconds(m, k, n, r, gpu)
    state = 4 * gradients  # weights, gradients and two moments
    ring = 2 * (fsdp - 1) / fsdp
    base = plan.training.base
    return Sharding(
        tp=tp,
        fsdp=fsdp,
        gpu_bytes=round(base / (tp * fsdp) + state + plan.training.head + plan.training.activations / tp),
        reduced=round(ring * gradients),
        reduced_full=round(ring * base / tp),
        gathered=round(2 * base / tp * (fsdp - 1) / fsdp),
        tp_extra=round(2 * (tp - 1) / tp * partial),
        time_share=adapter_s / base_s if base_s else 0.0,
    )


def adapter_seconds(m: int, k: int, n: int, r: int, gpu: Gpu) -> float:
    """Return the time of an adapter's six products over x [m, k] and y [m, n] in bf16, each at its roofline.

    shrink reads x (or dy) and writes H; expand reads H and reads and writes y (or dx); outer reads H and dy (or x).
    """
    seconds = 0.0
    for width in (k, n):
        big, small = 2.0 * m * width, 4.0 * m * r
        operations = 2.0 * m * r * width / (gpu.flops * gpu.skinny)
        for traffic in (big + small, 2 * big + small, big + small):
            seconds += max(traffic / (gpu.bandwidth * gpu.stream), operations)
    return seconds
