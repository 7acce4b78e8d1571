"""PiSSA (arXiv:2404.02948): a linear layer whose adapter starts as the principal components of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ardlora_ext.layers.linear import Conv1D, LoraLinear, fold, is_dense
from ardlora_ext.layers.start.orthogonal import blocks, spread
from ardlora_ext.native import ops, reference


class PissaLinear(LoraLinear):
    """PiSSA (arXiv:2404.02948): A and B start as the top singular triplets of W; what trains is the principal part.

        y = W x + bias + s B A x - s B0 A0 x,      s B0 A0 = best rank-r approximation of W at the start

    PiSSA subtracts s B0 A0 from the frozen weight. Here the weight stays as it is and the frozen initial factors are
    subtracted as a second, rank-sized adapter: the same function and gradients, but no copy of W, no rounding of the
    residual, tied weights stay tied, `unwrap` is exact, and the checkpoint fits the original base as the plain update
    B A - B0 A0 of rank 2 r (what PEFT's conversion of PiSSA gives). It costs one more adapter pass per layer, and one
    full SVD of each weight when the model is wrapped.

    Raises:
        ValueError: the base layer has no dense floating-point weight.
    """

    initial_A: torch.Tensor  # noqa: N815 - as lora_A
    initial_B: torch.Tensor  # noqa: N815

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        weight = getattr(base_layer, "weight", None)
        if not is_dense(weight) or weight.dim() != 2:
            raise ValueError(
                f"wrap: init='pissa' needs base layers with a dense weight, got {type(base_layer).__name__}"
            )
        super().__init__(base_layer, *args, **kwargs)
        self.initial_ranks = list(self.ranks)
        self.initial_table = self.layout.encode(self.initial_ranks)
        a_rows, b_rows = self.layout.rows(self.ranks)
        with torch.no_grad():
            self._start(weight.detach().T if isinstance(base_layer, Conv1D) else weight.detach())
        self.register_buffer("initial_A", self.lora_A.detach()[:a_rows].clone())
        self.register_buffer("initial_B", self.lora_B.detach()[:b_rows].clone())

    def _start(self, weight: torch.Tensor) -> None:
        """Set both factors to the top singular triplets of each block of the weight [N, K]."""
        for block in blocks(self.layout, self.ranks):
            u, sigma, vh = torch.linalg.svd(weight[block.out, block.cols].float(), full_matrices=False)
            root = (sigma[: block.rank] / self.scaling).sqrt()[:, None]
            rows_a, rows_b = root * vh[: block.rank], root * u.T[: block.rank]
            spread(self.layout, self.ranks, block, rows_a.to(self.lora_A.dtype), self.lora_A)
            for unit in block.units:
                _, b_rows, _, out = reference.unit_slices(self.layout, self.ranks)[unit]
                part = rows_b[: self.ranks[unit]]
                self.lora_B[b_rows] = part[:, out] if self.layout.kind == "out_heads" and self.layout.shared else part

    @property
    def extras(self) -> dict[str, torch.Tensor]:
        return {"initial_A": self.initial_A, "initial_B": self.initial_B}

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = input
        y = super().forward(x, *args, **kwargs)
        if self.undo_merge is not None:
            return y
        initial = self.initial_A, self.initial_B, None, self.initial_table, -self.scaling
        return ops.lora_accumulate(y, x.to(y.dtype), *initial)

    @torch.no_grad()
    def get_delta_weight(self) -> torch.Tensor:
        """Return the dense update s (B A - B0 A0) [out_features, in_features] in float32."""
        a, b = self.initial_A.float(), self.initial_B.float()
        initial = reference.lora_delta(self.layout, self.initial_ranks, a, b, None, self.scaling)
        return super().get_delta_weight() - initial

    @torch.no_grad()
    def fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return plain factors of B A - B0 A0: the two products side by side, of the sum of their ranks."""
        a, b = super().fold()
        a0, b0 = fold(self.layout, self.initial_ranks, self.initial_A, self.initial_B, None, -self.scaling)
        return torch.cat([a, a0]), torch.cat([b, b0], dim=1)
