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
