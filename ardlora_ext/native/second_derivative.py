"""The backward of the LoRA linear from torch's own operations, which have derivatives in turn."""

from __future__ import annotations

from typing import Any

import torch

from ardlora_ext.native import reference
from ardlora_ext.native.units import UnitLayout


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
    x, _, lora_A, lora_B, gate, rank_table, seed, _ = ctx.saved_tensors
    if seed is not None:
        raise NotImplementedError(
            "lora_backward: a second derivative must be taken without lora_dropout; call model.eval() or set it to 0"
        )
    wanted = [t for t, needed in ((x, need_dx), (lora_A, True), (lora_B, True), (gate, need_dgate)) if needed]
    x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    factors = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
    y = reference.lora_linear(*UnitLayout.decode(rank_table), x2, *factors, gate, ctx.scaling)
    if weight is not None and need_dx:
        y = y + x2 @ weight.t()
    found = iter(torch.autograd.grad(y, wanted, dy2, create_graph=True, allow_unused=True))
    dx, d_a, d_b = next(found) if need_dx else None, next(found), next(found)
    return dx, d_a, d_b, next(found) if need_dgate else None
