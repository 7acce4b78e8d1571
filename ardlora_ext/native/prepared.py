"""An adapter as native calls take it: made and checked once, kept while buffers, gates and ranks stay."""

from __future__ import annotations

from typing import Any

import torch

from ardlora_ext.native import dispatch
from ardlora_ext.native.compiled import DTYPE_CODES
from ardlora_ext.native.dispatch import NativeAdapter
from ardlora_ext.native.units import native_table

__all__ = ["Prepared"]


class Prepared:
    """The native form of one adapter. `clear` it when the ranks change; all else is compared in every call."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self.clear()

    def __reduce__(self) -> tuple[type[Prepared], tuple[()]]:
        """A copy has buffers of its own."""
        return Prepared, ()

    def clear(self) -> None:
        """Forget what was made."""
        self._kept: tuple[tuple[Any, ...] | None, NativeAdapter | None] = None, None

    def get(
        self,
        op: str,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        gate: torch.Tensor | None,
        rank_table: torch.Tensor,
        scaling: float,
    ) -> NativeAdapter:
        """Return the native form of these tensors.

        Raises:
            NotImplementedError: the build has no kernels for their device.
            ValueError: they are not as the core reads them.
        """
        own = lora_A.data_ptr(), lora_A.numel(), lora_A.dtype, lora_B.data_ptr(), lora_B.numel(), lora_B.dtype
        gates = None if gate is None else (gate.data_ptr(), gate.numel(), gate.dtype, gate.is_contiguous())
        key = own, gates, scaling, lora_A.is_contiguous() and lora_B.is_contiguous()
        kept, native = self._kept
        if native is None or key != kept:
            native = _make(op, lora_A, lora_B, gate, rank_table, scaling)
            self._kept = key, native  # at once: another thread reads both or none
        return native


def _make(
    op: str,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    rank_table: torch.Tensor,
    scaling: float,
) -> NativeAdapter:
    table = native_table(rank_table)
    dispatch.check_device(op, lora_A.device, lora_B.device)
    for factor in (lora_A, lora_B):
        if factor.dtype not in DTYPE_CODES:
            raise ValueError(f"{op}: dtype must be float32, bfloat16 or float16, got {factor.dtype}")
        if not factor.is_contiguous():
            raise ValueError(f"{op}: lora_A and lora_B must be contiguous")
    if gate is not None:
        if gate.dtype != torch.float32 or not gate.is_contiguous() or gate.device != lora_A.device:
            got = f"{gate.dtype} with strides {gate.stride()} on {gate.device}"
            raise ValueError(f"{op}: gate must be contiguous float32 on the device of lora_A, got {got}")
        live = table.a_rows if table.gate_on_a else table.b_rows
        if gate.numel() < live:
            raise ValueError(f"{op}: gate must have at least {live} entries, got {gate.numel()}")
    return dispatch.native_adapter(table, lora_A, lora_B, gate, scaling)
