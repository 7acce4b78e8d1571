"""DoRA (arXiv:2402.09353): a trained length for each row of W + dW, with any rank, one rank per unit.

    y = (m / ||W + dW||_row) o ((W + dW) x) + bias,   the norm a constant in backward (section 4.3), as in PEFT

The norm is computed without forming dW. With U = W A^T and G = A A^T, both rank-sized in one dimension, and gates and
scaling s folded into B, output row n of one unit has

    ||W + dW||_n^2 = ||W||_n^2 + 2 s <U_n, B_n> + s^2 B_n^T G B_n,      B_n = column n of the rank-major lora_B,

and the units that share output rows (heads cut by input columns) add their two terms. Dropout acts on the input of dW
alone; PEFT's, when it is above 0, also on the part of W x that the magnitude rescales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ardlora_ext.layers.linear import Conv1D, LoraLinear, is_dense
from ardlora_ext.native import reference

_TINY = 1e-30  # squared norm of a row of zeros: its magnitude is 0, and so is what comes out


class _Rescale(torch.autograd.Function):
    """Return c o (y - bias) + bias with c = magnitude / norm; computed in float32, rounded once. No gradient to norm.

    Shapes: y [..., N]; magnitude, norm and bias [N], bias may be None.
    """

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, magnitude: torch.Tensor, norm: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        scale = magnitude.float() / norm
        ctx.save_for_backward(y, scale, norm, bias)
        out = y * scale  # float32
        if bias is not None:
            out += bias.float() * (1.0 - scale)
        return out.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, scale, norm, bias = ctx.saved_tensors
        dy = grad[0].reshape(-1, grad[0].shape[-1]).float()
        d_scale = (dy * y.reshape(dy.shape)).sum(0)
        d_bias = None
        if bias is not None:
            total = dy.sum(0)
            d_scale -= bias.float() * total
            d_bias = (total * (1.0 - scale)).to(bias.dtype) if ctx.needs_input_grad[3] else None
        d_y = (dy * scale).to(y.dtype).view(y.shape)
        return d_y, d_scale / norm, None, d_bias


@dataclass(frozen=True)
class _Norm:
    """A row norm and all it was computed from.

    Version counters alone would go stale: fused optimizers, native 8-bit ones and writes through `.data` do not move
    them. So equal counters are believed only when the rank-sized copies agree as well.
    """

    versions: tuple[Any, ...]
    inputs: list[torch.Tensor]
    value: torch.Tensor  # [N] float32


class DoraLinear(LoraLinear):
    """`LoraLinear` whose output rows have a trained length, `lora_magnitude_vector` [N] float32.

    It starts as the row norms of the base weight, so the function is unchanged bit for bit. At rank 0 only the lengths
    are trained. Beside LoRA it costs one product W A^T per change of the factors (not in evaluation, and once for all
    micro-batches of a step), a rank-sized copy of the factors and one pass over the output, kept for backward.

    Raises:
        ValueError: the base layer has no floating-point weight.
    """

    lora_magnitude_vector: nn.Parameter

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        weight = getattr(base_layer, "weight", None)
        if not is_dense(weight) or weight.dim() != 2:
            raise ValueError(f"wrap: DoRA needs base layers with a dense weight, got {type(base_layer).__name__}")
        super().__init__(base_layer, *args, **kwargs)
        self._cached: _Norm | None = None
        self._squares: tuple[tuple[int, int], torch.Tensor] | None = None
        self.lora_magnitude_vector = nn.Parameter(self._base_squares().sqrt())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cached": None}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LoraLinear:
        """Follow `.to(...)`, but keep the magnitude in float32 and unrounded."""
        magnitude = self.lora_magnitude_vector.data
        super()._apply(fn, recurse)
        self.lora_magnitude_vector.data = magnitude.to(self.lora_magnitude_vector.device)
        self._cached = self._squares = None
        return self

    def parameters_at(self, ranks: Sequence[int]) -> int:
        return super().parameters_at(ranks) + self.layout.out_features

    @property
    def extras(self) -> dict[str, torch.Tensor]:
        return {"lora_magnitude_vector": self.lora_magnitude_vector}

    def _weight(self) -> torch.Tensor:
        """Return the base weight as [N, K]."""
        weight: torch.Tensor = getattr(self.base_layer, "weight").detach()  # noqa: B009 - mypy reads Tensor | Module
        return weight.t() if isinstance(self.base_layer, Conv1D) else weight

    def _base_squares(self) -> torch.Tensor:
        """Return the squared row norms of the base weight [N] float32, computed once."""
        weight = self._weight()
        key = (weight.untyped_storage()._cdata, weight._version)
        if self._squares is None or self._squares[0] != key:
            self._squares = key, weight.float().square().sum(1)
        return self._squares[1]

    @torch.no_grad()
    def weight_norm(self) -> torch.Tensor:
        """Return ||W + dW|| of each output row, [N] float32, from the cache where the factors are the same."""
        a_rows, b_rows = self.layout.rows(self.ranks)
        inputs = [self.lora_A.detach()[:a_rows], self.lora_B.detach()[:b_rows], self._base_squares()]
        if self.gate is not None:
            inputs.append(self.gate.detach()[: sum(self.ranks)])
        versions = (self.lora_A._version, self.lora_B._version, *self.ranks, self.scaling)
        old = self._cached
        if old is None or old.versions != versions or not all(map(torch.equal, old.inputs, inputs)):
            old = self._cached = _Norm(versions, [t.clone() for t in inputs], self._compute_norm())
        return old.value

    def _compute_norm(self) -> torch.Tensor:
        weight, base = self._weight(), self._base_squares()
        square = base.clone()
        own = 0
        slices = reference.unit_slices(self.layout, self.ranks)
        for (a_rows, b_rows, in_cols, out_cols), r in zip(slices, self.ranks, strict=True):
            a, b = self.lora_A[a_rows].float(), self.scaling * self.lora_B[b_rows].float()
            if self.gate is not None:
                b = b * self.gate[own : own + r, None]
            u = (weight[out_cols, in_cols] @ a.to(weight.dtype).T).float()  # [rows, r]
            square[out_cols] += ((2.0 * u + b.T @ (a @ a.T)) * b.T).sum(1)
            own += r
        floor = torch.finfo(torch.float32).eps * base + _TINY  # rounding of a row that dW cancels
        return torch.maximum(square, floor).sqrt()

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = input
        y = super().forward(x, *args, **kwargs)
        if self.undo_merge is not None:
            return y
        bias = getattr(self.base_layer, "bias", None)
        out: torch.Tensor = _Rescale.apply(  # type: ignore[no-untyped-call]
            y, self.lora_magnitude_vector, self.weight_norm(), bias
        )
        return out

    @torch.no_grad()
    def merge_terms(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return *self.fold(), self.lora_magnitude_vector.float() / self.weight_norm()

    @torch.no_grad()
    def get_delta_weight(self) -> torch.Tensor:
        """Return the dense update c o (W + dW) - W [out_features, in_features] in float32, magnitude included."""
        weight = self._weight().float()
        scale = self.lora_magnitude_vector.float() / self.weight_norm()
        return scale[:, None] * (weight + super().get_delta_weight()) - weight
