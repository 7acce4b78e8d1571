"""The layer under an adapter: whether it is a plain frozen linear, which one node can compute with the adapter."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ardlora_ext.native.compiled import DTYPE_CODES
from ardlora_ext.native.kernels import can_decode

try:
    from transformers.pytorch_utils import Conv1D
except ImportError:  # pragma: no cover - transformers is a dependency, its layout is not ours

    class Conv1D(nn.Module):  # type: ignore[no-redef]
        """Stands in where transformers has no Conv1D."""


__all__ = ["Conv1D", "dense_base", "fused_dtype", "is_dense", "is_plain"]


_PLAIN = (nn.Parameter, torch.Tensor, FakeTensor)
_BASES = (nn.Linear, Conv1D)


def is_plain(weight: torch.Tensor) -> bool:
    """Tell whether a weight is its own data, not a subclass that stands for quantised data (torchao, bitsandbytes).

    Fake tensors, by which costs are planned, stand for the plain ones.
    """
    return type(weight) in _PLAIN


def fused_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype | None:
    """Return the dtype in which x W^T is computed where one node can hold it with the adapter: autocast's, or x's."""
    kind = "cpu" if x.is_cpu else x.device.type
    if not torch.is_autocast_enabled(kind):
        return x.dtype if x.dtype == weight.dtype else None
    dtype = torch.get_autocast_dtype(kind)
    if x.dtype not in DTYPE_CODES or dtype not in DTYPE_CODES:  # float64, which autocast leaves as it is
        return None
    return dtype if weight.dtype == dtype or (is_dense(weight) and weight.dtype in DTYPE_CODES) else None


def is_dense(weight: object) -> TypeGuard[torch.Tensor]:
    """Tell whether `weight` holds plain floating-point numbers: not quantised, not sharded."""
    return isinstance(weight, torch.Tensor) and is_plain(weight) and weight.is_floating_point()


def dense_base(base: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return (weight [N, K], bias) when the base layer is a plain frozen linear that nobody listens to, else None.

    Also where the weight is a quantised subclass that can be decoded (torchao's): the node then decodes it for the
    length of its own backward, while the base's would keep decoded weights of all layers or give no gradient.
    """
    if type(base) not in _BASES:
        return None
    own = base.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return None
    if "forward" in own:  # accelerate's hooks
        return None
    held = own["_parameters"]
    weight: torch.Tensor | None = held.get("weight")
    bias: torch.Tensor | None = held.get("bias")
    if weight is None:  # FSDP1 keeps it as an attribute
        weight, bias = base.weight, base.bias
    assert weight is not None
    if type(weight) not in _PLAIN and (torch.compiler.is_compiling() or not can_decode(weight)):
        return None
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    return (weight if type(base) is nn.Linear else weight.t()), bias
