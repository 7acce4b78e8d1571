"""The LoRA linear as operators of torch: `ardlora_ext::lora_linear` (base matmul and adapter, one autograd node),
`ardlora_ext::lora_accumulate` (the adapter alone) and the backward of both.

Eager code reaches the autograd nodes directly; compiled code reaches the same nodes through torch's dispatcher. Ranks
arrive as a tensor (`UnitLayout.encode`), so a rank change is data to a compiled graph, not a reason to compile again.
x is saved by reference with H [M, rank capacity] float32; nothing of the size of x is created.
"""

from __future__ import annotations

from typing import Any

import torch

from ardlora_ext.native.dispatch import Dropout as Dropout
from ardlora_ext.native.dispatch import hidden_columns, hidden_dtype
from ardlora_ext.native.kernels import accumulate, backward, backward_with_graph, gradients, linear, plain
from ardlora_ext.native.packing import GradientSum
from ardlora_ext.native.prepared import Prepared

NO_DROPOUT: Dropout = (0.0, None)
Adapter = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, float, Dropout]  # as in `lora_linear`

_ADAPTER = "Tensor lora_A, Tensor lora_B, Tensor? gate, Tensor rank_table, float scaling, float p, Tensor? seed"
_library: Any = torch.library.Library("ardlora_ext", "DEF")  # type: ignore[no-untyped-call]
# Ranks and the seed of dropout are data, which a CUDA graph would keep as they were: torch.compile captures around
# these operators. A torch without the tag captures nothing of a graph that has tensors of the CPU.
_TAGS: Any = tuple(tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None)
for _schema in (
    f"lora_linear(Tensor x, Tensor weight, Tensor? bias, {_ADAPTER}) -> (Tensor y, Tensor h)",
    f"lora_accumulate(Tensor y, Tensor x, {_ADAPTER}) -> (Tensor y, Tensor h)",
    f"lora_backward(Tensor dy, Tensor x, Tensor h, {_ADAPTER}, Tensor? weight, bool need_dx, bool need_dgate)"
    " -> (Tensor dx, Tensor dA, Tensor dB, Tensor dgate)",
):
    _library.define(_schema, tags=_TAGS)
_ops: Any = torch.ops.ardlora_ext
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _is_direct(first: torch.Tensor) -> bool:
    """Tell whether a kernel may run at once: no tracer or dispatch mode has to see the operator."""
    return type(first) in _PLAIN and not first.is_meta and not torch._C._len_torch_dispatch_stack()


def _dispatch(operator: Any, *arguments: Any) -> Any:
    """Run an operator for whoever has to see it, below autograd where we are a node of it."""
    if torch.is_grad_enabled():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _seed_tensor(seed: int | torch.Tensor | None) -> torch.Tensor | None:
    return torch.tensor(seed, device="cpu") if isinstance(seed, int) else seed


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + scaling * (g o (x A^T)) B with W frozen: y and dx are accumulated in place.

    As the operator, without `prepared`, it returns H too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        gate: torch.Tensor | None,
        rank_table: torch.Tensor,
        scaling: float,
        p: float,
        seed: int | torch.Tensor | None,
        prepared: Prepared | None = None,
        total: GradientSum | None = None,
    ) -> Any:
        adapter = lora_A, lora_B, gate, rank_table, scaling, p
        if _is_direct(x):
            y, h = linear(x, weight, bias, *adapter, seed, prepared)
        else:
            y, h = _dispatch(_ops.lora_linear.default, x, weight, bias, *adapter, _seed_tensor(seed))
        ctx.save_for_backward(x, h, lora_A, lora_B, gate, rank_table, weight)
        ctx.constants = scaling, p, seed, prepared, total
        return y if prepared is not None else _with_hidden(ctx, y, h)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs = ctx.needs_input_grad
        dx, d_a, d_b, d_gate = _backward(ctx, grad[0], needs[0], needs[5])
        return dx, None, None, d_a, d_b, d_gate, None, None, None, None, None, None


class _LoraAccumulate(torch.autograd.Function):
    """y + scaling * (g o (x A^T)) B for a y that any module made. As the operator it returns H too."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        gate: torch.Tensor | None,
        rank_table: torch.Tensor,
        scaling: float,
        p: float,
        seed: int | torch.Tensor | None,
        prepared: Prepared | None = None,
    ) -> Any:
        adapter = lora_A, lora_B, gate, rank_table, scaling, p
        if _is_direct(y):
            out, h = accumulate(y, x, *adapter, seed, prepared)
        else:
            out, h = _dispatch(_ops.lora_accumulate.default, y, x, *adapter, _seed_tensor(seed))
        ctx.save_for_backward(x, h, lora_A, lora_B, gate, rank_table, None)
        ctx.constants = scaling, p, seed, prepared, None
        return out if prepared is not None else _with_hidden(ctx, out, h)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs = ctx.needs_input_grad
        dx, d_a, d_b, d_gate = _backward(ctx, grad[0], needs[1], needs[4])
        return grad[0], dx, d_a, d_b, d_gate, None, None, None, None, None, None


def _with_hidden(ctx: Any, y: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)  # none for h
    return y, h


def _backward(
    ctx: Any, dy: torch.Tensor | None, need_dx: bool, need_dgate: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    if dy is None:
        return None, None, None, None
    x, h, lora_A, lora_B, gate, rank_table, weight = ctx.saved_tensors
    scaling, p, seed, prepared, total = ctx.constants
    with_graph = torch.is_grad_enabled()
    if with_graph and not torch.compiler.is_compiling():  # create_graph
        return backward_with_graph(ctx, dy, None if weight is None else plain(weight), need_dx, need_dgate)
    so_far = None
    if with_graph or not _is_direct(dy):
        adapter = lora_A, lora_B, gate, rank_table, scaling, p, _seed_tensor(seed)
        grads = _dispatch(_ops.lora_backward.default, dy, x, h, *adapter, weight, need_dx, need_dgate)
    else:
        native = (prepared or Prepared()).get("lora_backward", lora_A, lora_B, gate, rank_table, scaling)
        so_far = None if total is None else total.value
        grads = gradients(
            native, dy, x, h, lora_A, lora_B, gate, rank_table, p, seed, weight, need_dx, need_dgate, so_far
        )
    dx, d_a, d_b, d_gate = grads
    if not need_dx:
        dx = None
    elif total is not None:
        if so_far is None:
            total.add(dx)
        dx = None
    return dx, d_a, d_b, d_gate if need_dgate else None


def _hidden_shape(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.numel() // x.shape[-1], hidden_columns(lora_A, lora_B), dtype=hidden_dtype(x))


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
    "lora_linear": (linear, _linear_shapes),
    "lora_accumulate": (accumulate, _accumulate_shapes),
    "lora_backward": (backward, _backward_shapes),
}
for _name, (_kernel, _shapes) in _KERNELS.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ardlora_ext::{_name}", _shapes, lib=_library)
_library.impl("lora_linear", _LoraLinear.apply, "Autograd")
_library.impl("lora_accumulate", _LoraAccumulate.apply, "Autograd")

# `apply` without what it does for functorch, which takes 2 us.
_linear_at_once: Any = super(torch.autograd.Function, _LoraLinear).apply
_accumulate_at_once: Any = super(torch.autograd.Function, _LoraAccumulate).apply


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
    prepared: Prepared | None = None,
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
        dropout: (p, seed) of the adapter's input, the seed an integer or an int64 scalar tensor; the mask is
            `reference.dropout_factors(p, seed, M, K)`, computed again in backward. (0, None) for none. A seed on the
            CUDA device of x is read by the kernels, so that it may change between the replays of a graph.
        total: takes the gradient of an x that comes from `packing.Readers`.
        prepared: of these factors and ranks, for callers that come back with them.

    Returns:
        y [..., N] in the dtype of x; sums are kept in float32 and rounded once.

    Raises:
        NotImplementedError: the build has no kernels for the device.
        ValueError: shapes, dtypes or devices do not fit.
    """
    adapter = lora_A, lora_B, gate, rank_table, scaling, dropout[0]
    if torch.compiler.is_compiling():
        traced: torch.Tensor = _ops.lora_linear.default(x, weight, bias, *adapter, _seed_tensor(dropout[1]))[0]
        return traced
    node = _LoraLinear.apply if torch._C._are_functorch_transforms_active() else _linear_at_once
    out: torch.Tensor = node(x, weight, bias, *adapter, dropout[1], prepared or Prepared(), total)
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
    prepared: Prepared | None = None,
) -> torch.Tensor:
    """Return y + scaling * (g o (x A^T)) B for y [..., N]; arguments as in `lora_linear`.

    For a base of any kind (quantised, another library's): y is what it returned.
    """
    adapter = lora_A, lora_B, gate, rank_table, scaling, dropout[0]
    if torch.compiler.is_compiling():
        traced: torch.Tensor = _ops.lora_accumulate.default(y, x, *adapter, _seed_tensor(dropout[1]))[0]
        return traced
    node = _LoraAccumulate.apply if torch._C._are_functorch_transforms_active() else _accumulate_at_once
    out: torch.Tensor = node(y, x, *adapter, dropout[1], prepared or Prepared())
    return out
