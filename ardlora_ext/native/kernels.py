"""One LoRA linear, forward and backward, on plain tensors: torch's product of the base, then ours in place.

x is kept by reference with H [M, rank capacity]; nothing of the size of x is created.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ardlora_ext.native import observers, reference
from ardlora_ext.native.compiled import DTYPE_CODES, as_rows
from ardlora_ext.native.dispatch import NativeAdapter, check_device, lora_backward, lora_forward
from ardlora_ext.native.prepared import Prepared
from ardlora_ext.native.units import UnitLayout

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _can_begin(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Tell whether y may begin with the bias, and the base's product be added to it."""
    return type(weight) in _PLAIN and (bias is None or (bias.dtype is x.dtype and bias.is_contiguous()))


def can_decode(weight: torch.Tensor) -> bool:
    """Tell whether a weight is quantised by a tensor subclass with a `dequantize` of its own."""
    return type(weight).dequantize is not torch.Tensor.dequantize


def plain(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight, decoded where it is quantised."""
    return weight.dequantize() if can_decode(weight) else weight


def _check(op: str, native: NativeAdapter, x: torch.Tensor, other: torch.Tensor, name: str) -> None:
    """Check that x and what it is multiplied with, or added to, fit each other and the adapter."""
    dtype = x.dtype
    if not (x.is_cpu and other.is_cpu and not native.on_cuda) and not x.device == other.device == native.device:
        check_device(op, x.device, other.device, native.device)
    if dtype not in DTYPE_CODES:
        raise ValueError(f"{op}: dtype must be float32, bfloat16 or float16, got {dtype}")
    if dtype is not other.dtype:
        raise ValueError(f"{op}: x must have the dtype of {name} ({other.dtype}), got {dtype}")


def linear(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y = x W^T + bias + the adapter's output, [..., N], and H; arguments as in `ops.lora_linear`."""
    native = (prepared or Prepared()).get("lora_linear", lora_A, lora_B, gate, rank_table, scaling)
    _check("lora_linear", native, x, weight, "weight")
    shape, (n, k) = x.shape, weight.shape
    if shape[-1] != k:
        raise ValueError(f"lora_linear: x must be [..., K] = [..., {k}], got {list(shape)}")
    if len(shape) == 2 and x.is_contiguous() and not native.base_last:
        y = F.linear(x, weight, bias)
        return y, lora_forward(native, x, y, shape[0], p, seed)
    x2 = as_rows(x)
    if native.base_last and _can_begin(x2, weight, bias):
        y = x2.new_empty(x2.shape[0], n)
        h = lora_forward(native, x2, y, x2.shape[0], p, seed, True, bias)
        y.addmm_(x2, weight.t())
    else:
        y = F.linear(x2, weight, bias)
        h = lora_forward(native, x2, y, x2.shape[0], p, seed)
    # In the shape of x, as no view: what follows may change it in place (ReLU(inplace=True)). The same memory.
    return y if len(shape) == 2 else y.resize_(*shape[:-1], n), h


def accumulate(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y + the adapter's output, and H; arguments as in `ops.lora_accumulate`."""
    native = (prepared or Prepared()).get("lora_accumulate", lora_A, lora_B, gate, rank_table, scaling)
    _check("lora_accumulate", native, x, y, "y")
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"lora_accumulate: x must have the rows of y ({list(y.shape)}), got {list(x.shape)}")
    # A copy: the base, its hooks or its backward may still need what it returned.
    out = torch.empty_like(y, memory_format=torch.contiguous_format).copy_(y)
    x2 = as_rows(x)
    return out, lora_forward(native, x2, out, x2.shape[0], p, seed)


def gradients(
    native: NativeAdapter,
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    rank_table: torch.Tensor,
    p: float,
    seed: int | torch.Tensor | None,
    weight: torch.Tensor | None,
    need_dx: bool,
    need_dgate: bool,
    so_far: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return dx, dA, dB and dgate of one call, None for what is not wanted.

    dx starts as dy W (zeros without a weight), or that is added to the dx `so_far` of other layers; the adapter's
    part is accumulated into it in place.
    """
    shape, single, dx = x.shape, lora_A.dtype is torch.float32, None
    x = x if x.is_contiguous() else as_rows(x)
    dy = dy if dy.is_contiguous() else as_rows(dy)
    if need_dx and weight is None:
        dx = dy.new_zeros(shape)
    elif need_dx and weight is not None:
        weight = weight if type(weight) is torch.Tensor else plain(weight)
        if so_far is not None:
            dx = so_far.view(-1, shape[-1]).addmm_(as_rows(dy), weight)
        else:
            dx = dy.new_empty(h.shape[0], shape[-1]) if native.base_last else dy @ weight
    fresh = native.base_last and dx is not None and weight is not None and so_far is None
    d_a = torch.empty_like(lora_A) if single else torch.empty_like(lora_A, dtype=torch.float32)
    d_b = torch.empty_like(lora_B) if single else torch.empty_like(lora_B, dtype=torch.float32)
    d_gate = torch.zeros_like(gate) if need_dgate and gate is not None else None
    d_h = torch.empty_like(h) if observers.watched else None
    lora_backward(native, x, h, dy, d_h, dx, d_a, d_b, d_gate, (p, seed), fresh)
    if fresh and dx is not None and weight is not None:
        dx.addmm_(as_rows(dy), weight)
    if d_h is not None:
        observers.tell(rank_table, as_rows(x), h, as_rows(dy), d_h)
    if not single:
        d_a, d_b = d_a.to(lora_A.dtype), d_b.to(lora_B.dtype)
    return (dx if dx is None or dx.dim() == len(shape) else dx.view(shape)), d_a, d_b, d_gate


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    rank_table: torch.Tensor,
    scaling: float,
    p: float,
    seed: int | torch.Tensor | None,
    weight: torch.Tensor | None,
    need_dx: bool,
    need_dgate: bool,
) -> tuple[torch.Tensor, ...]:
    """The operator: what is not wanted comes back empty.

    Raises:
        ValueError: x, h and dy are not of one call.
    """
    native = Prepared().get("lora_backward", lora_A, lora_B, gate, rank_table, scaling)
    _check("lora_backward", native, x, dy, "dy")
    rows = dy.shape[:-1].numel()
    if x.shape[:-1] != dy.shape[:-1] or h.shape != (rows, native.hidden) or not h.is_contiguous():
        shapes = ", ".join(str(list(t.shape)) for t in (dy, x, h))
        raise ValueError(f"lora_backward: dy [..., N], x [..., K] and h [M, hidden] must be of one call, got {shapes}")
    dx, d_a, d_b, d_gate = gradients(
        native, dy, x, h, lora_A, lora_B, gate, rank_table, p, seed, weight, need_dx, need_dgate
    )
    return dy.new_empty(0) if dx is None else dx, d_a, d_b, h.new_empty(0) if d_gate is None else d_gate


def backward_with_graph(
    ctx: Any, dy: torch.Tensor, weight: torch.Tensor | None, need_dx: bool, need_dgate: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return dx, dA, dB and dgate of a saved forward pass from torch's own operations, which have derivatives in turn.

    Args:
        ctx: of the node.
        dy: gradient of its output.
        weight: the dense base weight [N, K], None where the base has a node of its own.
        need_dx: whether x needs a gradient.
        need_dgate: whether the gate does.

    Raises:
        NotImplementedError: the adapter has dropout, whose mask the kernels never write down.
    """
    x, _, lora_A, lora_B, gate, rank_table, _ = ctx.saved_tensors
    scaling, _, seed, _, _ = ctx.constants
    if seed is not None:
        raise NotImplementedError(
            "lora_backward: a second derivative must be taken without lora_dropout; call model.eval() or set it to 0"
        )
    adapter = {"x": x, "A": lora_A, "B": lora_B, "gate": gate}
    needed = {"x": need_dx, "A": lora_A.requires_grad, "B": lora_B.requires_grad, "gate": need_dgate}
    x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    factors = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
    y = reference.lora_linear(*UnitLayout.decode(rank_table), x2, *factors, gate, scaling)
    if weight is not None and need_dx:
        y = y + x2 @ weight.t()
    names = [name for name, wanted in needed.items() if wanted]
    grads = torch.autograd.grad(y, [adapter[name] for name in names], dy2, create_graph=True, allow_unused=True)
    found = dict(zip(names, grads, strict=True))
    return found.get("x"), found.get("A"), found.get("B"), found.get("gate")
