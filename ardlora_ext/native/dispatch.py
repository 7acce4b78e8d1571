"""Native calls on the device of their tensors: the CPU's kernels, or the CUDA kernels on torch's current stream.

Memory that a launch uses, its workspace and tables, comes from torch's caching allocator and may be given back as soon
as the launch is queued: the allocator hands it out again on the same stream only, where it is used after the launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ardlora_ext.native.compiled import DTYPE_CODES, core, matrix, threads

__all__ = [
    "best_device",
    "check_device",
    "device_rule",
    "importance",
    "lora_backward",
    "lora_forward",
    "lora_grouped_backward",
    "lora_grouped_forward",
    "native_adapter",
    "rank_resize",
    "row_dots",
    "set_gates",
]


class NativeAdapter(NamedTuple):
    """What calls read of an adapter; good as long as its tensors live and do not move."""

    adapter: core.LoraAdapter
    table: core.UnitTable
    hidden: int  # columns of H: room for every rank that the factors can hold, so that no shape depends on the ranks
    device: torch.device
    on_cuda: bool


def _on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def device_rule(device: torch.device) -> str | None:
    """Return what tensors must be, as the part of an error after "must", where this build has no kernels for them."""
    if device.type == "cpu" or (_on_cuda(device) and core.cuda_built()):
        return None
    return "be on the CPU or a CUDA device" if core.cuda_built() else "be on the CPU, this build has no CUDA kernels"


def best_device() -> torch.device:
    """Return the CUDA device that torch would use, where this build has kernels for it, else the CPU."""
    return torch.device("cuda" if core.cuda_available() and torch.cuda.is_available() else "cpu")


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
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def _to_device(words: NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(words).to(device)


@lru_cache(maxsize=1 << 12)
def _segments(table: core.UnitTable, device: torch.device, _stream_handle: int) -> torch.Tensor:
    """Return a device's copy of a unit table; a rank change makes another table, so none goes stale.

    One for each stream: the copy is ordered before launches on that stream only.
    """
    return _to_device(core.cuda_segment_table(table), device)


def hidden_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of H and dH for x: on the CPU float32; tensor cores take them in the dtype of x."""
    return x.dtype if _on_cuda(x.device) else torch.float32


def native_adapter(
    table: core.UnitTable, lora_A: torch.Tensor, lora_B: torch.Tensor, gate: torch.Tensor | None, scaling: float
) -> NativeAdapter:
    """Return an adapter as the calls below take it; they read the tensors by address."""
    address = 0 if gate is None else gate.data_ptr()
    adapter = core.LoraAdapter(table, matrix(lora_A), matrix(lora_B), address, scaling)
    device, hidden = lora_A.device, min(lora_A.shape[0], lora_B.shape[0])
    return NativeAdapter(adapter, table, hidden, device, _on_cuda(device))


def _device_call(native: NativeAdapter, x: torch.Tensor) -> tuple[tuple[int, int, int, int, int], torch.Tensor]:
    """Return the last argument of a CUDA call for x [M, K], and its workspace, to be held until the launch."""
    index, handle = _stream(x.device)
    size = core.cuda_lora_workspace(native.table, x.shape[0], DTYPE_CODES[x.dtype], index)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    segments = _segments(native.table, x.device, handle)
    return (segments.data_ptr(), workspace.data_ptr(), size, index, handle), workspace


def lora_forward(
    native: NativeAdapter, x: torch.Tensor, y: torch.Tensor, shape: tuple[int, int, int], dropout: tuple[float, int]
) -> torch.Tensor:
    """Add the adapter's output to y [M, N], contiguous, for x [M, K] and shape (M, K, N); return H [M, hidden]."""
    m, k, n = shape
    dtype = x.dtype
    h = x.new_empty((m, native.hidden), dtype=dtype if native.on_cuda else torch.float32)
    rows = (x.data_ptr(), k, x.stride(0)), h.data_ptr(), native.hidden, (y.data_ptr(), n, n)
    if native.on_cuda:
        call, _workspace = _device_call(native, x)
        core.cuda_lora_forward(native.adapter, m, DTYPE_CODES[dtype], *rows, *dropout, call)
    else:
        core.lora_forward(native.adapter, m, DTYPE_CODES[dtype], *rows, threads(), *dropout)
    return h


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
    dropout: tuple[float, int],
) -> None:
    """Write the gradients of factors, gates and H, float32, and add to dx [M, K], for dy [M, N]; None is not wanted."""
    m, k = x.shape
    code, of_x, of_dy = DTYPE_CODES[x.dtype], (x.data_ptr(), k, x.stride(0)), (dy.data_ptr(), dy.shape[1], dy.stride(0))
    of_dx = (0, k, k) if dx is None else (dx.data_ptr(), k, k)
    out = d_a.data_ptr(), d_b.data_ptr(), 0 if d_gate is None else d_gate.data_ptr()
    first = native.adapter, m, code, of_x, h.data_ptr(), native.hidden, of_dy
    if native.on_cuda:
        d_h = torch.empty_like(h) if d_h is None else d_h
        call, _workspace = _device_call(native, x)
        core.cuda_lora_backward(*first, d_h.data_ptr(), of_dx, *out, *dropout, call)
    else:
        core.lora_backward(*first, 0 if d_h is None else d_h.data_ptr(), of_dx, *out, threads(), *dropout)


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
    dropout: tuple[float, int],
) -> torch.Tensor:
    """Add the experts' adapters to y [M, N], contiguous, for x [M, K] sorted by expert; return H [M, largest rank].

    On a CUDA device the offsets stay there: nothing waits for them, and nothing can refuse them.
    """
    (m, k), n, code = x.shape, y.shape[1], DTYPE_CODES[x.dtype]
    hidden = -(-native.table.hidden // 8) * 8  # rows of whole 16 bytes
    h = x.new_empty((m, hidden), dtype=hidden_dtype(x))
    offsets, places = by_expert.at()
    rows = m, code, (x.data_ptr(), k, x.stride(0)), h.data_ptr(), hidden, (y.data_ptr(), n, n)
    if native.on_cuda:
        call, _workspace = _device_call(native, x)
        core.cuda_lora_grouped_forward(native.adapter, offsets, places, *rows, *dropout, call)
    else:
        core.lora_grouped_forward(native.adapter, by_expert.offsets.numpy(), places, *rows, threads(), *dropout)
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
    dropout: tuple[float, int],
) -> None:
    """Write gradients and add to dx as `lora_backward`; experts without rows get zeros."""
    (m, k), n = x.shape, dy.shape[1]
    of_x, of_h, of_dy = (x.data_ptr(), k, x.stride(0)), (h.data_ptr(), h.shape[1]), (dy.data_ptr(), n, dy.stride(0))
    of_dx = (0, k, k) if dx is None else (dx.data_ptr(), k, k)
    out = d_h.data_ptr(), of_dx, d_a.data_ptr(), d_b.data_ptr(), 0 if d_gate is None else d_gate.data_ptr()
    rows = m, DTYPE_CODES[x.dtype], of_x, *of_h, of_dy, *out
    offsets, places = by_expert.at()
    if native.on_cuda:
        call, _workspace = _device_call(native, x)
        core.cuda_lora_grouped_backward(native.adapter, offsets, places, *rows, *dropout, call)
    else:
        core.lora_grouped_backward(native.adapter, by_expert.offsets.numpy(), places, *rows, threads(), *dropout)


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
    table = _to_device(words, device)
    return lambda: core.cuda_rank_resize(table.data_ptr(), jobs, blocks, *_stream(device))


def row_dots(blocks: NDArray[np.int64], dtype: torch.dtype, device: torch.device) -> NDArray[np.float32]:
    """Return <weight_i, grad_i> of the rows of all blocks, block after block.

    Args:
        blocks: [n, 4] int64: addresses of weight and gradient [rows, columns], rows, columns.
        dtype: of both.
        device: where they are.
    """
    code = DTYPE_CODES[dtype]
    if not _on_cuda(device):
        return core.row_dots(blocks, code, threads())
    factors = np.zeros((len(blocks), 7), dtype=np.int64)
    factors[:, [0, 1, 4, 5]], factors[:, 6] = blocks, code
    words, jobs, rows = core.cuda_row_table(factors)
    table = _to_device(words, device)
    out = torch.empty(rows, dtype=torch.float32, device=device)
    core.cuda_row_dots(table.data_ptr(), jobs, rows, out.data_ptr(), *_stream(device))
    result: NDArray[np.float32] = out.cpu().numpy()
    return result


def importance(blocks: NDArray[np.int64], beta1: float, beta2: float, device: torch.device) -> bool:
    """Move the running means of every entry's importance on by one step: `reference.importance_step` for all blocks.

    Args:
        blocks: [n, 7] int64: addresses of weight, gradient, sensitivity and uncertainty [rows, columns], rows, columns,
            dtype code of weight and gradient; the means are float32, all are contiguous.
        beta1: of the sensitivity.
        beta2: of the uncertainty.
        device: where they are.

    Returns:
        False if an entry of weight * gradient is not finite: nothing has changed then.
    """
    if not _on_cuda(device):
        return core.importance(blocks, beta1, beta2, threads())
    words, jobs, rows = core.cuda_row_table(blocks)
    table = _to_device(words, device)
    workspace = torch.empty(2 * rows + 1, dtype=torch.float32, device=device)  # row sums and their verdict, then scores
    score = workspace.data_ptr() + 4 * (rows + 1)
    core.cuda_importance(table.data_ptr(), jobs, rows, beta1, beta2, workspace.data_ptr(), score, *_stream(device))
    return bool(workspace[rows].item() == 1.0)


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
    table, soft = _to_device(np.ascontiguousarray(blocks), device), _to_device(np.ascontiguousarray(rho), device)
    core.cuda_set_gates(table.data_ptr(), len(blocks), soft.data_ptr(), kind, floor, width, *_stream(device))
