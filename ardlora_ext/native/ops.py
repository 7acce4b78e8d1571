"""The LoRA linear as operators of torch: `ardlora_ext::lora_linear` (base matmul and adapter, one autograd node),
`ardlora_ext::lora_accumulate` (the adapter alone) and the backward of both.

Eager code reaches the autograd nodes directly; compiled code reaches the same nodes through torch's dispatcher. Ranks
arrive as a tensor (`UnitLayout.encode`), so a rank change is data to a compiled graph, not a reason to compile again.
x is saved by reference with H [M, rank capacity] float32; nothing of the size of x is created.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ardlora_ext.native import observers
from ardlora_ext.native.compiled import DTYPE_CODES, NO_MATRIX, as_rows, core, matrix
from ardlora_ext.native.dispatch import check_device, hidden_dtype, lora_call
from ardlora_ext.native.packing import GradientSum
from ardlora_ext.native.second_derivative import backward_with_graph
from ardlora_ext.native.units import native_table

Dropout = tuple[float, torch.Tensor | None]  # probability, seed: int64 scalar on the CPU
NO_DROPOUT: Dropout = (0.0, None)
Adapter = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, float, Dropout]  # as in `lora_linear`

_ADAPTER = "Tensor lora_A, Tensor lora_B, Tensor? gate, Tensor rank_table, float scaling, float p, Tensor? seed"
_library: Any = torch.library.Library("ardlora_ext", "DEF")  # type: ignore[no-untyped-call]
_library.define(f"lora_linear(Tensor x, Tensor weight, Tensor? bias, {_ADAPTER}) -> (Tensor y, Tensor h)")
_library.define(f"lora_accumulate(Tensor y, Tensor x, {_ADAPTER}) -> (Tensor y, Tensor h)")
_library.define(
    f"lora_backward(Tensor dy, Tensor x, Tensor h, {_ADAPTER}, Tensor? weight, bool need_dx, bool need_dgate)"
    " -> (Tensor dx, Tensor dA, Tensor dB, Tensor dgate)"
)
_ops: Any = torch.ops.ardlora_ext
_ADAPTER_INPUTS = _ADAPTER.count(",") + 1
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _hidden_rows(lora_A: torch.Tensor, lora_B: torch.Tensor) -> int:
    """Columns of H: room for every rank that the factors can hold, so that no shape depends on the ranks."""
    return min(lora_A.shape[0], lora_B.shape[0])


def _check(op: str, *tensors: torch.Tensor) -> None:
    if not all(t.is_cpu for t in tensors):
        check_device(op, *(t.device for t in tensors))
    for t in tensors:
        if t.dtype not in DTYPE_CODES:
            raise ValueError(f"{op}: dtype must be float32, bfloat16 or float16, got {t.dtype}")


def can_decode(weight: torch.Tensor) -> bool:
    """Tell whether a weight is quantised by a tensor subclass with a `dequantize` of its own."""
    return type(weight).dequantize is not torch.Tensor.dequantize


def _plain(weight: torch.Tensor) -> torch.Tensor:
    return weight.dequantize() if can_decode(weight) else weight


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _dropout(p: float, seed: torch.Tensor | None) -> tuple[float, int]:
    return (0.0, 0) if seed is None else (p, int(seed))


def _table(
    op: str, lora_A: torch.Tensor, lora_B: torch.Tensor, gate: torch.Tensor | None, rank_table: torch.Tensor
) -> core.UnitTable:
    """Return the table of the live ranks, once all that the core takes as an address is as it reads it.

    Raises:
        ValueError: it is not.
    """
    table = native_table(rank_table)
    if not (lora_A.is_contiguous() and lora_B.is_contiguous()):
        raise ValueError(f"{op}: lora_A and lora_B must be contiguous")
    if gate is not None:
        if gate.dtype != torch.float32 or not gate.is_contiguous() or gate.device != lora_A.device:
            got = f"{gate.dtype} with strides {gate.stride()} on {gate.device}"
            raise ValueError(f"{op}: gate must be contiguous float32 on the device of lora_A, got {got}")
        live = table.a_rows if table.gate_on_a else table.b_rows
        if gate.numel() < live:
            raise ValueError(f"{op}: gate must have at least {live} entries, got {gate.numel()}")
    return table


def _adapter_forward(
    op: str,
    x: torch.Tensor,
    y: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    rank_table: torch.Tensor,
    scaling: float,
    p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """Accumulate the adapter into y [M, N] in place and return H."""
    table = _table(op, lora_A, lora_B, gate, rank_table)
    h = torch.empty(x.shape[0], _hidden_rows(lora_A, lora_B), dtype=hidden_dtype(x), device=x.device)
    lora_call(
        "lora_forward",
        x,
        table,
        matrix(x),
        matrix(lora_A),
        matrix(lora_B),
        _address(gate),
        scaling,
        matrix(h),
        matrix(y),
        dropout=_dropout(p, seed),
    )
    return h


def _linear_kernel(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *adapter: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    _check("lora_linear", x, weight, adapter[0], adapter[1])
    if x.dtype != weight.dtype:
        raise ValueError(f"lora_linear: x must have the dtype of weight ({weight.dtype}), got {x.dtype}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"lora_linear: x must be [..., K] = [..., {weight.shape[1]}], got {list(x.shape)}")
    x2 = as_rows(x)
    y = _base(x, x2, weight, bias)
    h = _adapter_forward("lora_linear", x2, y.view(-1, y.shape[-1]), *adapter)
    return y, h


def _base(x: torch.Tensor, x2: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + bias in the shape of x, as no view: what follows may change it in place (ReLU(inplace=True))."""
    y = F.linear(x2, weight, bias)
    return y if x.dim() == 2 else y.resize_(*x.shape[:-1], y.shape[-1])  # the same memory; view() would be a view


def _accumulate_kernel(y: torch.Tensor, x: torch.Tensor, *adapter: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _check("lora_accumulate", x, y, adapter[0], adapter[1])
    if x.dtype != y.dtype:
        raise ValueError(f"lora_accumulate: x must have the dtype of y ({y.dtype}), got {x.dtype}")
    # A copy: the base, its hooks or its backward may still need what it returned.
    out = torch.empty_like(y, memory_format=torch.contiguous_format).copy_(y)
    h = _adapter_forward("lora_accumulate", as_rows(x), out.view(-1, out.shape[-1]), *adapter)
    return out, h


def _backward_kernel(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    rank_table: torch.Tensor,
    scaling: float,
    p: float,
    seed: torch.Tensor | None,
    weight: torch.Tensor | None,
    need_dx: bool,
    need_dgate: bool,
    so_far: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx starts as dy W (zeros without a weight), or that is added to the dx `so_far` of other layers; the adapter's
    part is accumulated into it in place."""
    dy2, x2 = as_rows(dy), as_rows(x)
    if need_dx and weight is not None:
        dx = dy2 @ _plain(weight) if so_far is None else so_far.view(x2.shape).addmm_(dy2, _plain(weight))
    else:
        dx = dy2.new_zeros(x2.shape if need_dx else 0)
    d_h = torch.empty_like(h)
    d_a = torch.empty_like(lora_A, dtype=torch.float32)
    d_b = torch.empty_like(lora_B, dtype=torch.float32)
    d_gate = torch.zeros_like(gate) if need_dgate and gate is not None else h.new_empty(0)
    lora_call(
        "lora_backward",
        x2,
        _table("lora_backward", lora_A, lora_B, gate, rank_table),
        matrix(x2),
        matrix(lora_A),
        matrix(lora_B),
        _address(gate),
        scaling,
        matrix(h),
        matrix(dy2),
        matrix(d_h),
        matrix(dx) if need_dx else NO_MATRIX,
        matrix(d_a),
        matrix(d_b),
        _address(d_gate) if need_dgate else 0,
        dropout=_dropout(p, seed),
    )
    if observers.watched:
        observers.tell(rank_table, x2, h, dy2, d_h)
    if lora_A.dtype != torch.float32:
        d_a, d_b = d_a.to(lora_A.dtype), d_b.to(lora_B.dtype)
    return (dx.view(x.shape) if need_dx and x2 is not x else dx), d_a, d_b, d_gate


def _is_direct(first: torch.Tensor) -> bool:
    """Tell whether a kernel may run at once: no tracer or dispatch mode has to see the operator."""
    return type(first) in _PLAIN and not first.is_meta and not torch._C._len_torch_dispatch_stack()


def _run(kernel: Any, operator: Any, first: torch.Tensor, *rest: Any) -> Any:
    """Run the kernel at once or through the dispatcher."""
    if torch.is_grad_enabled():
        return operator(first, *rest)
    if _is_direct(first):
        return kernel(first, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(first, *rest)


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + scaling * (g o (x A^T)) B with W frozen: y and dx are accumulated in place.

    After the adapter may come the `GradientSum` that takes dx.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        adapter, ctx.total = rest[:_ADAPTER_INPUTS], (*rest, None)[_ADAPTER_INPUTS]
        y, h = _run(_linear_kernel, _ops.lora_linear.default, x, weight, bias, *adapter)
        _save(ctx, x, h, adapter, weight)
        return y, h

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, d_a, d_b, d_gate = _backward(ctx, grad[0], ctx.needs_input_grad[0], ctx.needs_input_grad[5], ctx.total)
        return dx, None, None, d_a, d_b, d_gate, None, None, None, None, None


class _LoraAccumulate(torch.autograd.Function):
    """y + scaling * (g o (x A^T)) B for a y that any module made."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, *adapter: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, h = _run(_accumulate_kernel, _ops.lora_accumulate.default, y, x, *adapter)
        _save(ctx, x, h, adapter, None)
        return out, h

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, d_a, d_b, d_gate = _backward(ctx, grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4])
        return grad[0], dx, d_a, d_b, d_gate, None, None, None, None


def _save(ctx: Any, x: torch.Tensor, h: torch.Tensor, adapter: tuple[Any, ...], weight: torch.Tensor | None) -> None:
    lora_A, lora_B, gate, rank_table, ctx.scaling, ctx.p, seed = adapter
    ctx.save_for_backward(x, h, lora_A, lora_B, gate, rank_table, seed, weight)
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)  # none for h


def _backward(
    ctx: Any, dy: torch.Tensor | None, need_dx: bool, need_dgate: bool, total: GradientSum | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    if dy is None:
        return None, None, None, None
    x, h, lora_A, lora_B, gate, rank_table, seed, weight = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
        return backward_with_graph(ctx, dy, None if weight is None else _plain(weight), need_dx, need_dgate)
    adapter = lora_A, lora_B, gate, rank_table, ctx.scaling, ctx.p, seed
    rest = x, h, *adapter, weight, need_dx, need_dgate
    so_far = None if total is None else total.value
    if need_dx and so_far is not None and _is_direct(dy) and not torch.is_grad_enabled():
        _, d_a, d_b, d_gate = _backward_kernel(dy, *rest, so_far)
        return None, d_a, d_b, d_gate if need_dgate else None
    dx, d_a, d_b, d_gate = _run(_backward_kernel, _ops.lora_backward.default, dy, *rest)
    if need_dx and total is not None:
        total.add(dx)
    return dx if need_dx and total is None else None, d_a, d_b, d_gate if need_dgate else None


def _hidden_shape(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.numel() // x.shape[-1], _hidden_rows(lora_A, lora_B), dtype=hidden_dtype(x))


def _linear_shapes(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *adapter: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), _hidden_shape(x, *adapter[:2])


def _accumulate_shapes(y: torch.Tensor, x: torch.Tensor, *adapter: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape), _hidden_shape(x, *adapter[:2])


def _backward_shapes(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    rank_table: torch.Tensor,
    scaling: float,
    p: float,
    seed: torch.Tensor | None,
    weight: torch.Tensor | None,
    need_dx: bool,
    need_dgate: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = x.new_empty(x.shape) if need_dx else dy.new_empty(0)
    d_gate = gate.new_empty(gate.shape) if need_dgate and gate is not None else h.new_empty(0)
    return dx, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape), d_gate


_KERNELS: dict[str, tuple[Any, Any]] = {
    "lora_linear": (_linear_kernel, _linear_shapes),
    "lora_accumulate": (_accumulate_kernel, _accumulate_shapes),
    "lora_backward": (_backward_kernel, _backward_shapes),
}
for _name, (_kernel, _shapes) in _KERNELS.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ardlora_ext::{_name}", _shapes, lib=_library)
_library.impl("lora_linear", _LoraLinear.apply, "Autograd")
_library.impl("lora_accumulate", _LoraAccumulate.apply, "Autograd")


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    rank_table: torch.Tensor,
    scaling: float,
    dropout: Dropout = NO_DROPOUT,
    total: GradientSum | None = None,
) -> torch.Tensor:
    """Compute y = x W^T + bias + scaling * (g o (x A^T)) B with a frozen W, one autograd node for all of it.

    Args:
        x: [..., K] float32, bfloat16 or float16, on the CPU or, where the build has kernels for it, a CUDA device.
        weight: [N, K], same dtype; gets no gradient.
        bias: [N] or None; gets no gradient.
        lora_A: [>= a_rows, a_width] float32, or the dtype of x. Contiguous.
        lora_B: [>= b_rows, b_width], rank-major, same dtype as lora_A. Contiguous.
        gate: float32, at least one entry per live row of the gated factor, or None for 1; may require a gradient.
        rank_table: `UnitLayout.encode(ranks)`, int64 on the CPU. Must not change between forward and backward.
        scaling: the constant in front of the update.
        dropout: (p, seed) of the adapter's input, the seed an int64 scalar tensor on the CPU; the mask is
            `reference.dropout_factors(p, seed, M, K)`, computed again in backward. (0, None) for none.
        total: takes the gradient of an x that comes from `packing.Readers`.

    Returns:
        y [..., N] in the dtype of x; sums are kept in float32 and rounded once.

    Raises:
        NotImplementedError: the build has no kernels for the device.
        ValueError: shapes, dtypes or devices do not fit.
    """
    adapter = lora_A, lora_B, gate, rank_table, scaling, *dropout
    if torch.compiler.is_compiling():
        traced: torch.Tensor = _ops.lora_linear.default(x, weight, bias, *adapter)[0]
        return traced
    out: torch.Tensor = _LoraLinear.apply(x, weight, bias, *adapter, total)[0]  # type: ignore[no-untyped-call]
    return out


def lora_accumulate(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    rank_table: torch.Tensor,
    scaling: float,
    dropout: Dropout = NO_DROPOUT,
) -> torch.Tensor:
    """Return y + scaling * (g o (x A^T)) B for y [..., N]; arguments as in `lora_linear`.

    For a base of any kind (quantised, autocast, another library's): y is what it returned.
    """
    node: Any = _ops.lora_accumulate.default if torch.compiler.is_compiling() else _LoraAccumulate.apply
    out: torch.Tensor = node(y, x, lora_A, lora_B, gate, rank_table, scaling, *dropout)[0]
    return out
