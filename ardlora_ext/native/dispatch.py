"""Native calls on the device of their tensors: the CPU's kernels, or the CUDA kernels on torch's current stream.

Memory that a launch uses, its workspace and tables, comes from torch's caching allocator and may be given back as soon
as the launch is queued: the allocator hands it out again on the same stream only, where it is used after the launch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ardlora_ext.native.compiled import DTYPE_CODES, core, matrix, threads
from ardlora_ext.native.transfers import DeviceTables, sent

__all__ = [
    "best_device",
    "check_device",
    "device_rule",
    "hidden_columns",
    "hidden_dtype",
    "importance",
    "lora_backward",
    "lora_forward",
    "lora_grouped_backward",
    "lora_grouped_forward",
    "native_adapter",
    "overlap_launches",
    "rank_resize",
    "row_dots",
    "set_gates",
]


Dropout = tuple[float, int | torch.Tensor | None]  # probability, seed: an integer, or an int64 scalar
_FLOAT32: Any = {"dtype": torch.float32}
# On a CUDA device the adapter's part may be written first and the base's product added to it (docs/cuda.md): one order
# for the whole process, because it moves roundings.
BASE_LAST = os.environ.get("ARDLORA_BASE_LAST", "0") == "1"


def overlap_launches(on: bool) -> bool:
    """Say whether a kernel of a call may begin before the one before it has ended; return what was before."""
    return core.cuda_overlap_launches(on)


if os.environ.get("ARDLORA_OVERLAP_LAUNCHES", "0") == "1":  # docs/cuda.md
    overlap_launches(True)
_CHUNK = 8  # columns: rows of H are whole pieces of 16 bytes on a CUDA device, in each of its types
_segments, _row_tables, _gate_tables = DeviceTables(1 << 12), DeviceTables(64), DeviceTables(64)


class NativeAdapter(NamedTuple):
    """What calls read of an adapter; good as long as its tensors live and do not move."""

    adapter: core.LoraAdapter
    table: core.UnitTable
    hidden: int  # columns of H
    device: torch.device
    on_cuda: bool
    base_last: bool  # y and dx are written, and the base's product is added


def _on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def device_rule(device: torch.device) -> str | None:
    """Return what tensors must be, as the part of an error after "must", where this build cannot compute with them.

    A CUDA device is asked for its compute capability and its driver.
    """
    if device.type == "cpu":
        return None
    if core.cuda_built() and not _on_cuda(device):
        return "be on the CPU or a CUDA device"
    return core.cuda_problem(-1 if device.index is None else device.index) or None


def best_device() -> torch.device:
    """Return the CUDA device that torch would use, where this build has kernels for it, else the CPU.

    Where torch sees a GPU that is not used, a warning says why.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if rule := device_rule(torch.device("cuda")):
        warnings.warn(f"ardlora_ext: the GPU is not used, tensors must {rule}", stacklevel=2)
        return torch.device("cpu")
    return torch.device("cuda")


def check_device(op: str, *devices: torch.device) -> None:
    """Check that this build has kernels for the one device of all tensors of a call.

    Raises:
        NotImplementedError: it has none.
        ValueError: the tensors are on several devices.
    """
    for device in devices:
        if rule := device_rule(device):
            raise NotImplementedError(f"{op}: tensors must {rule}, got {device}")
    if len(set(devices)) > 1:
        raise ValueError(f"{op}: tensors must be on one device, got {' and '.join(map(str, dict.fromkeys(devices)))}")


def _stream(device: torch.device) -> tuple[int, int]:
    """Return (device index, cudaStream_t) for a launch."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


@lru_cache(maxsize=1 << 12)
def _plans(table: core.UnitTable, rows: int, code: int, dropping: bool, index: int) -> core.LoraPlans:
    return core.cuda_lora_plans(table, rows, code, dropping, index)


def hidden_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of H and dH for x: on the CPU float32; tensor cores take them in the dtype of x."""
    return x.dtype if _on_cuda(x.device) else torch.float32


def hidden_columns(lora_A: torch.Tensor, lora_B: torch.Tensor) -> int:
    """Return the columns of H: room for every rank that the factors can hold, so that no shape depends on the ranks."""
    rows = min(lora_A.shape[0], lora_B.shape[0])
    return whole_chunks(rows) if _on_cuda(lora_A.device) else rows


def whole_chunks(columns: int) -> int:
    """Return the columns that H is given to hold so many."""
    return -(-columns // _CHUNK) * _CHUNK


def native_adapter(
    table: core.UnitTable, lora_A: torch.Tensor, lora_B: torch.Tensor, gate: torch.Tensor | None, scaling: float
) -> NativeAdapter:
    """Return an adapter as the calls below take it; they read the tensors by address."""
    address = 0 if gate is None else gate.data_ptr()
    adapter = core.LoraAdapter(table, matrix(lora_A), matrix(lora_B), address, scaling)
    device = lora_A.device
    on_cuda = _on_cuda(device)
    # With a unit that has no rank, some columns would stay unwritten.
    last = on_cuda and BASE_LAST and all(begin < end for begin, end in pairwise(table.unit_begin))
    return NativeAdapter(adapter, table, hidden_columns(lora_A, lora_B), device, on_cuda, last)


def _device_call(
    native: NativeAdapter, x: torch.Tensor, rows: int, dropout: Dropout
) -> tuple[tuple[core.LoraPlans, int, int, int, int, int, int], torch.Tensor, tuple[float, int]]:
    """Return the last argument of a CUDA call, its workspace, to be held until the launch, and dropout."""
    device, (p, seed) = x.device, dropout
    index, handle = _stream(device)
    plans = _plans(native.table, rows, DTYPE_CODES[x.dtype], seed is not None and p > 0.0, index)
    size, table = plans.workspace, native.table
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    segments = _segments.get("lora_linear", table, lambda: core.cuda_segment_table(table), device, handle)
    value, address = (0, 0) if seed is None else (int(seed), 0)
    if isinstance(seed, torch.Tensor) and _on_cuda(seed.device):  # read by the kernel: replays of a graph differ
        if seed.device != device or seed.dtype != torch.int64:
            raise ValueError(f"lora_linear: seed must be int64 on the device of x, got {seed.dtype} on {seed.device}")
        value, address = 0, seed.data_ptr()
    call = plans, segments.data_ptr(), workspace.data_ptr(), size, address, index, handle
    return call, workspace, (0.0 if seed is None else p, value)


def lora_forward(
    native: NativeAdapter,
    x: torch.Tensor,
    y: torch.Tensor,
    rows: int,
    p: float,
    seed: int | torch.Tensor | None,
    fresh: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add the adapter's output to y [..., N], contiguous, for x of `rows` rows of K columns; return H [rows, hidden].

    x is contiguous, or [rows, K] with contiguous rows. `fresh`, for an adapter whose base comes last: y becomes the
    output and `bias`, contiguous in its dtype.
    """
    adapter, _, hidden, _, on_cuda, _ = native
    dtype, k, n = x.dtype, x.shape[-1], y.shape[-1]
    # Sizes by themselves: a tuple of them takes a microsecond more.
    h = x.new_empty(rows, hidden) if on_cuda or dtype is torch.float32 else x.new_empty(rows, hidden, **_FLOAT32)
    of_x = x.data_ptr(), k, k if x.is_contiguous() else x.stride(0)
    of_y = y.data_ptr(), n, n
    if on_cuda:
        call, _workspace, mask = _device_call(native, x, rows, (p, seed))
        onto = fresh, 0 if bias is None else bias.data_ptr()
        core.cuda_lora_forward(adapter, rows, DTYPE_CODES[dtype], of_x, h.data_ptr(), hidden, of_y, *mask, call, *onto)
    elif seed is None:
        core.lora_forward(adapter, rows, DTYPE_CODES[dtype], of_x, h.data_ptr(), hidden, of_y, threads(), 0.0, 0)
    else:
        core.lora_forward(adapter, rows, DTYPE_CODES[dtype], of_x, h.data_ptr(), hidden, of_y, threads(), p, int(seed))
    return h


def _mask(dropout: Dropout) -> tuple[float, int]:
    """Return (probability, seed) as the CPU's kernels take them."""
    return (0.0, 0) if dropout[1] is None else (dropout[0], int(dropout[1]))


def lora_backward(
    native: NativeAdapter,
    x: torch.Tensor,
    h: torch.Tensor,
    dy: torch.Tensor,
    d_h: torch.Tensor | None,
    dx: torch.Tensor | None,
    d_a: torch.Tensor,
    d_b: torch.Tensor,
    d_gate: torch.Tensor | None,
    dropout: Dropout,
    fresh: bool = False,
) -> None:
    """Write the gradients of factors, gates and H, float32, and add to dx [..., K], contiguous; None is not wanted.

    x and dy, of as many rows as H, are contiguous, or matrices with contiguous rows. `fresh`: as in `lora_forward`.
    """
    adapter, _, hidden, _, on_cuda, _ = native
    m, k, n, code = h.shape[0], x.shape[-1], dy.shape[-1], DTYPE_CODES[x.dtype]
    of_x = x.data_ptr(), k, k if x.is_contiguous() else x.stride(0)
    of_dy = dy.data_ptr(), n, n if dy.is_contiguous() else dy.stride(0)
    of_dx = (0 if dx is None else dx.data_ptr()), k, k
    out = d_a.data_ptr(), d_b.data_ptr(), 0 if d_gate is None else d_gate.data_ptr()
    if on_cuda:
        d_h = torch.empty_like(h) if d_h is None else d_h
        call, _workspace, mask = _device_call(native, x, m, dropout)
        first = adapter, m, code, of_x, h.data_ptr(), hidden, of_dy
        core.cuda_lora_backward(*first, d_h.data_ptr(), of_dx, *out, *mask, call, fresh)
    else:
        at = 0 if d_h is None else d_h.data_ptr()
        mask = _mask(dropout)
        core.lora_backward(adapter, m, code, of_x, h.data_ptr(), hidden, of_dy, at, of_dx, *out, threads(), *mask)


class Sorted(NamedTuple):
    """How rows are sorted by expert; both int64 on the device of the rows."""

    offsets: torch.Tensor  # [experts + 1]
    places: torch.Tensor | None  # [M], each row's number in the counter of dropout; None: its order

    def at(self) -> tuple[int, int]:
        """Return both addresses, 0 for none."""
        return self.offsets.data_ptr(), 0 if self.places is None else self.places.data_ptr()


def lora_grouped_forward(
    native: NativeAdapter,
    x: torch.Tensor,
    y: torch.Tensor,
    by_expert: Sorted,
    dropout: Dropout,
) -> torch.Tensor:
    """Add the experts' adapters to y [M, N], contiguous, for x [M, K] sorted by expert; return H [M, largest rank].

    On a CUDA device the offsets stay there: nothing waits for them, and nothing can refuse them.
    """
    (m, k), n, code = x.shape, y.shape[1], DTYPE_CODES[x.dtype]
    hidden = whole_chunks(native.table.hidden)
    h = x.new_empty((m, hidden), dtype=hidden_dtype(x))
    offsets, places = by_expert.at()
    rows = m, code, (x.data_ptr(), k, x.stride(0)), h.data_ptr(), hidden, (y.data_ptr(), n, n)
    if native.on_cuda:
        call, _workspace, mask = _device_call(native, x, m, dropout)
        core.cuda_lora_grouped_forward(native.adapter, offsets, places, *rows, *mask, call)
    else:
        core.lora_grouped_forward(native.adapter, by_expert.offsets.numpy(), places, *rows, threads(), *_mask(dropout))
    return h


def lora_grouped_backward(
    native: NativeAdapter,
    x: torch.Tensor,
    h: torch.Tensor,
    dy: torch.Tensor,
    d_h: torch.Tensor,
    dx: torch.Tensor | None,
    d_a: torch.Tensor,
    d_b: torch.Tensor,
    d_gate: torch.Tensor | None,
    by_expert: Sorted,
    dropout: Dropout,
) -> None:
    """Write gradients and add to dx as `lora_backward`; experts without rows get zeros."""
    (m, k), n = x.shape, dy.shape[1]
    of_x, of_h, of_dy = (x.data_ptr(), k, x.stride(0)), (h.data_ptr(), h.shape[1]), (dy.data_ptr(), n, dy.stride(0))
    of_dx = (0, k, k) if dx is None else (dx.data_ptr(), k, k)
    out = d_h.data_ptr(), of_dx, d_a.data_ptr(), d_b.data_ptr(), 0 if d_gate is None else d_gate.data_ptr()
    rows = m, DTYPE_CODES[x.dtype], of_x, *of_h, of_dy, *out
    offsets, places = by_expert.at()
    if native.on_cuda:
        call, _workspace, mask = _device_call(native, x, m, dropout)
        core.cuda_lora_grouped_backward(native.adapter, offsets, places, *rows, *mask, call)
    else:
        core.lora_grouped_backward(native.adapter, by_expert.offsets.numpy(), places, *rows, threads(), *_mask(dropout))


def rank_resize(moves: NDArray[np.int64], plans: Sequence[Sequence[int]], device: torch.device) -> Callable[[], None]:
    """Return the one call that moves rows of many buffers of one device, all or none.

    Args:
        moves: [n, 5] int64: source address, destination address, bytes per row, source rows, plan.
        plans: for each row of a destination the source row, or -1 for zeros.
        device: where the buffers are.

    Raises:
        NotImplementedError: the build has no kernels for the device.
        ValueError: a move or plan does not fit; on the CPU it is the returned call that says so, before a row moves.
    """
    check_device("rank_resize", device)
    if not _on_cuda(device):
        return partial(core.rank_resize, moves, plans, threads())
    words, jobs, blocks = core.cuda_resize_table(moves, plans)
    table = sent(words, device)
    return lambda: core.cuda_rank_resize(table.data_ptr(), jobs, blocks, *_stream(device))


def _row_table(op: str, factors: NDArray[np.int64], device: torch.device) -> tuple[torch.Tensor, int, int]:
    """Return the device's table of these rows, its jobs and their rows; a step at the same addresses copies nothing."""
    words, jobs, rows = core.cuda_row_table(factors)
    return _row_tables.get(op, words.tobytes(), lambda: words, device, _stream(device)[1]), jobs, rows


def row_dots(blocks: NDArray[np.int64], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return <weight_i, grad_i> of the rows of all blocks, block after block, float32 on the device.

    Args:
        blocks: [n, 4] int64: addresses of weight and gradient [rows, columns], rows, columns.
        dtype: of both.
        device: where they are.
    """
    code = DTYPE_CODES[dtype]
    if not _on_cuda(device):
        return torch.from_numpy(core.row_dots(blocks, code, threads()))
    factors = np.zeros((len(blocks), 7), dtype=np.int64)
    factors[:, [0, 1, 4, 5]], factors[:, 6] = blocks, code
    table, jobs, rows = _row_table("row_dots", factors, device)
    out = torch.empty(rows, dtype=torch.float32, device=device)
    core.cuda_row_dots(table.data_ptr(), jobs, rows, out.data_ptr(), *_stream(device))
    return out


def importance(blocks: NDArray[np.int64], beta1: float, beta2: float, device: torch.device) -> torch.Tensor:
    """Move the running means of every entry's importance on by one step: `reference.importance_step` for all blocks.

    Args:
        blocks: [n, 7] int64: addresses of weight, gradient, sensitivity and uncertainty [rows, columns], rows, columns,
            dtype code of weight and gradient; the means are float32, all are contiguous.
        beta1: of the sensitivity.
        beta2: of the uncertainty.
        device: where they are.

    Returns:
        A scalar on the device: 1, or 0 where an entry of weight * gradient is not finite; nothing has changed then.
    """
    if not _on_cuda(device):
        return torch.tensor(float(core.importance(blocks, beta1, beta2, threads())), device="cpu")
    table, jobs, rows = _row_table("importance", blocks, device)
    workspace = torch.empty(2 * rows + 1, dtype=torch.float32, device=device)  # row sums and their verdict, then scores
    score = workspace.data_ptr() + 4 * (rows + 1)
    core.cuda_importance(table.data_ptr(), jobs, rows, beta1, beta2, workspace.data_ptr(), score, *_stream(device))
    return workspace[rows]


def set_gates(
    blocks: NDArray[np.int64], rho: NDArray[np.float64], kind: int, floor: float, width: float, device: torch.device
) -> None:
    """Write the gates of every unit.

    Args:
        blocks: [units, 2] int64: address of the unit's first gate, live components.
        rho: [units] soft ranks.
        kind, floor, width: as in `ardlora/regularizer.h`.
        device: where the gates are.
    """
    if not np.isfinite(rho).all() or (len(blocks) and blocks[:, 1].min() < 0):
        raise ValueError("set_gates: soft ranks must be finite and counts >= 0")
    if not _on_cuda(device):
        core.set_gates(blocks, rho, kind, floor, width)
        return
    stream = _stream(device)
    table = _gate_tables.get("set_gates", blocks.tobytes(), lambda: blocks, device, stream[1])
    soft = sent(rho, device)
    core.cuda_set_gates(table.data_ptr(), len(blocks), soft.data_ptr(), kind, floor, width, *stream)
