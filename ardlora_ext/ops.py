"""Autograd over the native core: the LoRA linear with its base matmul, and the adapter alone.

Both save x by reference and H [M, hidden] float32; nothing of the size of x is created.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ardlora_ext._native import DTYPE_CODES, NO_MATRIX, core, matrix, threads

Dropout = tuple[float, int]  # probability, seed
NO_DROPOUT: Dropout = (0.0, 0)


def _rows(t: torch.Tensor) -> torch.Tensor:
    """View [..., features] as [M, features] with contiguous rows; copies only when the layout allows no view."""
    flat = t.reshape(-1, t.shape[-1])
    rows_fit = flat.stride(1) == 1 and (flat.shape[0] <= 1 or flat.stride(0) >= flat.shape[1])
    return flat if rows_fit else flat.clone(memory_format=torch.contiguous_format)


def _check_cpu(op: str, *tensors: torch.Tensor) -> None:
    for t in tensors:
        if t.device.type != "cpu":
            raise NotImplementedError(
                f"{op}: tensors must be on the CPU, this build has no CUDA kernels, got {t.device}"
            )
        if t.dtype not in DTYPE_CODES:
            raise ValueError(f"{op}: dtype must be float32, bfloat16 or float16, got {t.dtype}")


def _adapter_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    table: core.UnitTable,
    scaling: float,
    dropout: Dropout,
) -> torch.Tensor:
    """Accumulate the adapter into y [M, N] in place and return H [M, hidden]."""
    h = torch.empty(x.shape[0], table.hidden, dtype=torch.float32)
    core.lora_forward(
        table,
        matrix(x),
        matrix(lora_A),
        matrix(lora_B),
        0 if gate is None else gate.data_ptr(),
        scaling,
        matrix(h),
        matrix(y),
        threads(),
        *dropout,
    )
    return h


def _adapter_backward(
    ctx: Any, dy: torch.Tensor, dx: torch.Tensor | None, gate_needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Accumulate the adapter's part of dx in place and return (dA, dB, dgate) in float32."""
    x, lora_A, lora_B, gate, h = ctx.saved_tensors
    d_a = torch.empty(lora_A.shape, dtype=torch.float32)
    d_b = torch.empty(lora_B.shape, dtype=torch.float32)
    d_h = torch.empty_like(h)
    d_gate = torch.zeros_like(gate) if gate_needs_grad else None
    core.lora_backward(
        ctx.table,
        matrix(x),
        matrix(lora_A),
        matrix(lora_B),
        0 if gate is None else gate.data_ptr(),
        ctx.scaling,
        matrix(h),
        matrix(dy),
        matrix(d_h),
        NO_MATRIX if dx is None else matrix(dx),
        matrix(d_a),
        matrix(d_b),
        0 if d_gate is None else d_gate.data_ptr(),
        threads(),
        *ctx.dropout,
    )
    return d_a, d_b, d_gate


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + scaling * (g o (x A^T)) B with W frozen: y and dx are accumulated in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        gate: torch.Tensor | None,
        table: core.UnitTable,
        scaling: float,
        dropout: Dropout,
    ) -> torch.Tensor:
        x2 = _rows(x)
        y = F.linear(x2, weight, bias)
        h = _adapter_forward(x2, y, lora_A, lora_B, gate, table, scaling, dropout)
        ctx.save_for_backward(x2, lora_A, lora_B, gate, h)
        ctx.weight, ctx.table, ctx.scaling, ctx.dropout, ctx.shape = weight, table, scaling, dropout, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy = _rows(grad[0])
        dx = dy @ ctx.weight if ctx.needs_input_grad[0] else None
        grads = _adapter_backward(ctx, dy, dx, ctx.needs_input_grad[5])
        return (None if dx is None else dx.view(ctx.shape), None, None, *grads, None, None, None)


class _LoraAccumulate(torch.autograd.Function):
    """y + scaling * (g o (x A^T)) B for a y that any module made."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        gate: torch.Tensor | None,
        table: core.UnitTable,
        scaling: float,
        dropout: Dropout,
    ) -> torch.Tensor:
        x2, y2 = _rows(x), _rows(y).clone()  # the base, its hooks or its backward may still need what it returned
        h = _adapter_forward(x2, y2, lora_A, lora_B, gate, table, scaling, dropout)
        ctx.save_for_backward(x2, lora_A, lora_B, gate, h)
        ctx.table, ctx.scaling, ctx.dropout, ctx.shape = table, scaling, dropout, x.shape
        return y2.view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy = _rows(grad[0])
        dx = dy.new_zeros(dy.shape[0], ctx.shape[-1]) if ctx.needs_input_grad[1] else None
        grads = _adapter_backward(ctx, dy, dx, ctx.needs_input_grad[4])
        return (grad[0], None if dx is None else dx.view(ctx.shape), *grads, None, None, None)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    table: core.UnitTable,
    scaling: float,
    dropout: Dropout = NO_DROPOUT,
) -> torch.Tensor:
    """Compute y = x W^T + bias + scaling * (g o (x A^T)) B with a frozen W, one autograd node for all of it.

    Args:
        x: [..., K] float32, bfloat16 or float16, on the CPU.
        weight: [N, K], same dtype; gets no gradient.
        bias: [N] or None; gets no gradient.
        lora_A: [>= a_rows, a_width] float32, or the dtype of x. Contiguous.
        lora_B: [>= b_rows, b_width], rank-major, same dtype as lora_A. Contiguous.
        gate: float32, at least one entry per live row of the gated factor, or None for 1; may require a gradient.
        table: units of the matrix at their present ranks.
        scaling: the constant in front of the update.
        dropout: (p, seed) of the adapter's input; the mask is `reference.dropout_factors(p, seed, M, K)`, computed
            again in backward.

    Returns:
        y [..., N] in the dtype of x; sums are kept in float32 and rounded once.

    Raises:
        NotImplementedError: a tensor is not on the CPU.
        ValueError: shapes or dtypes do not fit.
    """
    _check_cpu("lora_linear", x, weight, lora_A, lora_B)
    if x.dtype != weight.dtype:
        raise ValueError(f"lora_linear: x must have the dtype of weight ({weight.dtype}), got {x.dtype}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"lora_linear: x must be [..., K] = [..., {weight.shape[1]}], got {list(x.shape)}")
    out: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, lora_A, lora_B, gate, table, scaling, dropout
    )
    return out


def lora_accumulate(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    table: core.UnitTable,
    scaling: float,
    dropout: Dropout = NO_DROPOUT,
) -> torch.Tensor:
    """Return y + scaling * (g o (x A^T)) B for y [..., N]; arguments as in `lora_linear`.

    For a base of any kind (quantised, autocast, another library's): y is what it returned.
    """
    _check_cpu("lora_accumulate", x, y, lora_A, lora_B)
    if x.dtype != y.dtype:
        raise ValueError(f"lora_accumulate: x must have the dtype of y ({y.dtype}), got {x.dtype}")
    out: torch.Tensor = _LoraAccumulate.apply(  # type: ignore[no-untyped-call]
        y, x, lora_A, lora_B, gate, table, scaling, dropout
    )
    return out
