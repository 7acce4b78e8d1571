"""The adapters of a stack of experts in one autograd node: rows sorted by expert, each with the factors of its own.

The base product is handed in: the node calls it forward and, with the stack transposed, backward. x is saved by
reference with H [M, largest rank]; nothing of the size of x or of an update is created.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ardlora_ext.native import observers
from ardlora_ext.native.compiled import DTYPE_CODES, as_rows
from ardlora_ext.native.dispatch import (
    NativeAdapter,
    Sorted,
    check_device,
    lora_grouped_backward,
    lora_grouped_forward,
)
from ardlora_ext.native.ops import NO_DROPOUT, Dropout
from ardlora_ext.native.prepared import Prepared

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [M, k], stack [experts, k, n] -> [M, n]


class Base(NamedTuple):
    """The frozen half of a grouped linear.

    Attributes:
        product: rows that belong to no expert may hold anything.
        stack: [experts, K, N], gets no gradient.
    """

    product: Product
    stack: torch.Tensor


class Member(NamedTuple):
    """Which expert of which stack an adapter of one expert alone is.

    Attributes:
        rank_table: of the stack, by which it is observed.
        expert: its number there.
        experts: of the stack.
    """

    rank_table: torch.Tensor
    expert: int
    experts: int

    def offsets(self, rows: int) -> torch.Tensor:
        """Return the offsets [experts + 1] in the stack, where the others have no rows."""
        begins = [0] * (self.expert + 1) + [rows] * (self.experts - self.expert)
        return torch.tensor(begins, device="cpu")


def _check(native: NativeAdapter, x: torch.Tensor, by_expert: Sorted) -> None:
    offsets, places = by_expert
    if not x.device == offsets.device == native.device:
        check_device("lora_grouped", x.device, offsets.device, native.device)
    if x.dtype not in DTYPE_CODES:
        raise ValueError(f"lora_grouped: dtype must be float32, bfloat16 or float16, got {x.dtype}")
    experts = native.table.units
    if offsets.dtype != torch.int64 or not offsets.is_contiguous():
        raise ValueError(f"lora_grouped: offsets must be contiguous int64, got {offsets.dtype}")
    if offsets.shape != (experts + 1,):
        rule = f"{experts + 1} entries, one more than there are experts"
        raise ValueError(f"lora_grouped: offsets must have {rule}, got {offsets.numel()}")
    if places is not None and (places.shape != x.shape[:1] or places.dtype != torch.int64 or places.device != x.device):
        got = f"{places.dtype} {list(places.shape)} on {places.device}"
        raise ValueError(f"lora_grouped: places must be int64 [{len(x)}] on {x.device}, got {got}")


class _LoraGrouped(torch.autograd.Function):
    """y_m = x_m W_e + scaling * (g o (x_m A_e^T)) B_e with a frozen W, or without one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: Base | None,
        offsets: torch.Tensor,
        places: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        gate: torch.Tensor | None,
        rank_table: torch.Tensor,
        scaling: float,
        p: float,
        seed: int | torch.Tensor | None,
        prepared: Prepared,
        member: Member | None,
    ) -> torch.Tensor:
        native = prepared.get("lora_grouped", lora_A, lora_B, gate, rank_table, scaling)
        by_expert = Sorted(offsets, None if places is None else places.contiguous())
        _check(native, x, by_expert)
        y = x.new_zeros(len(x), lora_B.shape[1]) if base is None else base.product(x, base.stack).contiguous()
        x = as_rows(x)
        ctx.base, ctx.native = base, (prepared, scaling)
        ctx.dropout, ctx.member = (p, seed), member
        h = lora_grouped_forward(native, x, y, by_expert, ctx.dropout)
        ctx.save_for_backward(x, *by_expert, lora_A, lora_B, gate, rank_table, h)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, offsets, places, lora_A, lora_B, gate, rank_table, h = ctx.saved_tensors
        prepared, scaling = ctx.native
        if torch.is_grad_enabled():
            raise NotImplementedError("lora_grouped: experts have no second derivative; take it without create_graph")
        dy, dx = as_rows(grads[0]), None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x) if ctx.base is None else ctx.base.product(dy, ctx.base.stack.mT).contiguous()
        d_a, d_b = (torch.empty_like(f, dtype=torch.float32) for f in (lora_A, lora_B))
        d_gate = torch.zeros_like(gate) if gate is not None and ctx.needs_input_grad[6] else None
        native = prepared.get("lora_grouped", lora_A, lora_B, gate, rank_table, scaling)
        d_h = torch.empty_like(h)
        lora_grouped_backward(native, x, h, dy, d_h, dx, d_a, d_b, d_gate, Sorted(offsets, places), ctx.dropout)
        if observers.watched:
            member = ctx.member
            ends = offsets if member is None else member.offsets(len(x))
            observers.tell(rank_table if member is None else member.rank_table, x, h, dy, d_h, ends)
        out = dx, None, None, None, d_a.to(lora_A.dtype), d_b.to(lora_B.dtype), d_gate
        return *out, None, None, None, None, None, None


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
    places: torch.Tensor | None = None,
    prepared: Prepared | None = None,
    member: Member | None = None,
) -> torch.Tensor:
    """Compute y_m = x_m W_e + scaling * (g o (x_m A_e^T)) B_e for rows sorted by expert, in one autograd node.

    Args:
        x: [M, K] float32, bfloat16 or float16, on the CPU or, where the build has kernels for it, a CUDA device.
        base: the frozen stack and its product, None for the adapters' part alone.
        offsets: [experts + 1] int64 on the device of x: expert e has rows [offsets[e], offsets[e + 1]), any may have
            none. Rows past the last belong to no expert.
        lora_A, lora_B, gate, rank_table, scaling, prepared: as in `ops.lora_linear`, of a layout of kind `experts`.
        dropout: as there.
        places: [M] int64 below 2^32 on the device of x, what stands for each row in the counter of dropout
            (`reference.dropout_factors`): the mask then follows the token, however rows are sorted. None: the order.
        member: of which stack the one expert of this adapter is, for who observes it.

    Returns:
        y [M, N] in the dtype of x.

    Raises:
        NotImplementedError: the build has no kernels for the device.
        ValueError: shapes, dtypes or devices do not fit. On the CPU: offsets do not ascend from 0 or exceed M; on a
            CUDA device they stay there unread, and rows that bad ones give to several experts are the first one's.
    """
    out: torch.Tensor = _LoraGrouped.apply(  # type: ignore[no-untyped-call]
        x,
        base,
        offsets,
        places,
        lora_A,
        lora_B,
        gate,
        rank_table,
        scaling,
        *dropout,
        prepared or Prepared(),
        member,
    )
    return out
