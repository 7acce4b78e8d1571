"""The adapters of a stack of experts in one autograd node: rows sorted by expert, each with the factors of its own.

The base product is handed in: the node calls it forward and, with the stack transposed, backward. x is saved by
reference with H [M, largest rank] float32; nothing of the size of x or of an update is created.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ardlora_ext.native.compiled import DTYPE_CODES, NO_MATRIX, as_rows, core, matrix, threads
from ardlora_ext.native.ops import NO_DROPOUT, Adapter, Dropout
from ardlora_ext.native.units import native_table

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [M, k], stack [experts, k, n] -> [M, n]


class Base(NamedTuple):
    """The frozen half of a grouped linear.

    Attributes:
        product: rows that belong to no expert may hold anything.
        stack: [experts, K, N], gets no gradient.
    """

    product: Product
    stack: torch.Tensor


def _check(x: torch.Tensor, offsets: torch.Tensor, adapter: Adapter) -> None:
    lora_A, lora_B, gate = adapter[:3]
    for t in (x, lora_A, lora_B):
        if not t.is_cpu:
            raise NotImplementedError(
                f"lora_grouped: tensors must be on the CPU, experts have no kernels on {t.device}"
            )
        if t.dtype not in DTYPE_CODES:
            raise ValueError(f"lora_grouped: dtype must be float32, bfloat16 or float16, got {t.dtype}")
    if offsets.dtype != torch.int64 or not offsets.is_cpu:
        raise ValueError(f"lora_grouped: offsets must be int64 on the CPU, got {offsets.dtype} on {offsets.device}")
    if not (lora_A.is_contiguous() and lora_B.is_contiguous()):
        raise ValueError("lora_grouped: lora_A and lora_B must be contiguous")
    if gate is not None and (gate.dtype != torch.float32 or not gate.is_contiguous() or len(gate) < len(lora_B)):
        raise ValueError(
            f"lora_grouped: gate must be contiguous float32 of at least {len(lora_B)} entries, got {gate.dtype} of "
            f"{len(gate)}"
        )


class _LoraGrouped(torch.autograd.Function):
    """y_m = x_m W_e + scaling * (g o (x_m A_e^T)) B_e with a frozen W, or without one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, base: Base | None, offsets: torch.Tensor, *adapter: Any) -> torch.Tensor:
        lora_A, lora_B, gate, rank_table, scaling, p, seed = adapter
        table = native_table(rank_table)
        y = x.new_zeros(len(x), lora_B.shape[1]) if base is None else as_rows(base.product(x, base.stack))
        h = torch.empty(len(x), table.hidden, dtype=torch.float32)
        x = as_rows(x)
        factors = matrix(x), matrix(lora_A), matrix(lora_B), 0 if gate is None else gate.data_ptr()
        dropout = (0.0, 0) if seed is None else (p, int(seed))
        core.lora_grouped_forward(table, offsets.numpy(), *factors, scaling, matrix(h), matrix(y), threads(), *dropout)
        ctx.base, ctx.scaling, ctx.dropout = base, scaling, dropout
        ctx.save_for_backward(x, offsets, lora_A, lora_B, gate, rank_table, h)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, offsets, lora_A, lora_B, gate, rank_table, h = ctx.saved_tensors
        dy = as_rows(grads[0])
        if torch.is_grad_enabled():
            raise NotImplementedError("lora_grouped: experts have no second derivative; take it without create_graph")
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x) if ctx.base is None else as_rows(ctx.base.product(dy, ctx.base.stack.mT))
        d_h = torch.empty_like(h)
        d_a, d_b = (torch.empty_like(f, dtype=torch.float32) for f in (lora_A, lora_B))
        d_gate = torch.zeros_like(gate) if gate is not None and ctx.needs_input_grad[5] else None
        core.lora_grouped_backward(
            native_table(rank_table),
            offsets.numpy(),
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
        return dx, None, None, d_a.to(lora_A.dtype), d_b.to(lora_B.dtype), d_gate, None, None, None, None


def lora_grouped(
    x: torch.Tensor,
    base: Base | None,
    offsets: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    rank_table: torch.Tensor,
    scaling: float,
    dropout: Dropout = NO_DROPOUT,
) -> torch.Tensor:
    """Compute y_m = x_m W_e + scaling * (g o (x_m A_e^T)) B_e for rows sorted by expert, in one autograd node.

    Args:
        x: [M, K] float32, bfloat16 or float16 on the CPU.
        base: the frozen stack and its product, None for the adapters' part alone.
        offsets: [experts + 1] int64 on the CPU: expert e has rows [offsets[e], offsets[e + 1]), any may have none. Rows
            past the last belong to no expert.
        lora_A, lora_B, gate, rank_table, scaling: as in `ops.lora_linear`, of a layout of kind `experts`.
        dropout: as there; the mask's row is the place among the sorted rows.

    Returns:
        y [M, N] in the dtype of x.

    Raises:
        NotImplementedError: a tensor is not on the CPU.
        ValueError: shapes or dtypes do not fit, offsets do not ascend from 0 or exceed M.
    """
    _check(x, offsets, (lora_A, lora_B, gate, rank_table, scaling, dropout))
    out: torch.Tensor = _LoraGrouped.apply(  # type: ignore[no-untyped-call]
        x, base, offsets, lora_A, lora_B, gate, rank_table, scaling, *dropout
    )
    return out
