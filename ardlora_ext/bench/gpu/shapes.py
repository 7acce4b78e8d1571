"""The shapes of the day: what people train, and what divides, loops or splits inside the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ardlora_ext.native import ops
from ardlora_ext.native.units import Factoring, UnitKind, UnitLayout


@dataclass(frozen=True)
class Shape:
    """One call of an adapter, forward and backward."""

    rows: int
    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    kind: UnitKind = "matrix"
    factoring: Factoring = "shared"
    dtype: str = "bfloat16"
    dropout: float = 0.0

    @property
    def layout(self) -> UnitLayout:
        """How the matrix is cut."""
        return UnitLayout(self.kind, self.factoring, len(self.ranks), self.in_features, self.out_features)

    def __str__(self) -> str:
        ranks = str(self.ranks[0]) if len(self.ranks) == 1 else f"{min(self.ranks)} to {max(self.ranks)}"
        cut = "" if self.kind == "matrix" else f", {len(self.ranks)} {self.kind} {self.factoring}"
        drop = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.rows} x {self.in_features} to {self.out_features}, rank {ranks}{cut}, {self.dtype}{drop}"


RAGGED = tuple(0 if u % 16 == 7 else 1 + u % 16 for u in range(32))
_CUTS: tuple[UnitKind, ...] = ("out_heads", "in_heads")
_FACTORINGS: tuple[Factoring, ...] = ("shared", "independent")
REAL = (
    *(Shape(4096, 4096, 4096, (r,)) for r in (1, 4, 8, 16, 37, 64, 128, 300)),
    *(Shape(m, 4096, 11008, (16,)) for m in (1, 128, 8192)),
    Shape(8192, 11008, 4096, (64,)),
    Shape(4096, 4096, 1024, (8,)),  # k and v of grouped-query attention
    Shape(4096, 4096, 4096, (16,), dtype="float16"),
    Shape(2048, 4096, 4096, (8,), dtype="float32"),
    Shape(2048, 4096, 4096, (64,), dtype="float32"),
    *(
        Shape(2048, 4096, 4096, RAGGED, kind, f)
        for kind in ("out_heads", "in_heads")
        for f in ("shared", "independent")
    ),
    Shape(1023, 4100, 4104, (9,)),  # rows and columns that are no multiple of a tile
    Shape(515, 1030, 1030, (8,)),  # rows that begin at no 16 bytes
    Shape(512, 1024, 1024, (8,), dropout=0.1),
    Shape(512, 1024, 1024, (64,), dropout=0.1, dtype="float32"),
)
SMALL = (  # a rehearsal: the same kinds
    Shape(300, 264, 136, (5,)),
    Shape(130, 136, 264, (70,)),
    Shape(129, 72, 64, (37,), dtype="float32"),
    Shape(70, 64, 128, (3, 0, 8, 5), "out_heads", "independent"),
    Shape(70, 128, 64, (3, 0, 8, 5), "in_heads", dtype="float16"),
    Shape(64, 136, 136, (8,), dropout=0.1),
)
TOOLS = (*(Shape(520, 1024, 1024, (r,)) for r in (4, 8, 37, 64, 80)), *SMALL[2:])  # under a sanitizer


@dataclass
class Call:
    """The tensors of a shape on a device; `run` computes the adapter alone, forward and backward."""

    shape: Shape
    x: torch.Tensor
    dy: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor]
    gate: torch.Tensor

    def run(self) -> list[torch.Tensor]:
        """Return y and the gradients of x, lora_A, lora_B and the gates."""
        shape, leaves = self.shape, [self.x, *self.factors, self.gate]
        for leaf in leaves:
            leaf.grad = None
        dropout = (shape.dropout, 11) if shape.dropout else ops.NO_DROPOUT
        table, nothing = shape.layout.encode(shape.ranks), torch.zeros_like(self.dy)
        y = ops.lora_accumulate(nothing, self.x, *self.factors, self.gate, table, 0.5, dropout)
        y.backward(self.dy)  # type: ignore[no-untyped-call]
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def make(shape: Shape, device: torch.device) -> Call:
    """Return the tensors of a shape; the same numbers each time."""
    layout, dtype = shape.layout, getattr(torch, shape.dtype)
    a_rows, b_rows = layout.rows(shape.ranks)
    generator = torch.Generator(device).manual_seed(5)

    def randn(*size: int, to: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).to(to)

    x, dy = randn(shape.rows, layout.in_features, to=dtype), randn(shape.rows, layout.out_features, to=dtype)
    a = randn(a_rows + 3, layout.a_width) / layout.a_width**0.5
    b = randn(b_rows + 3, layout.b_width)
    gate = randn(len(a) if layout.gate_on_a else len(b))
    return Call(shape, x.requires_grad_(), dy, (a.requires_grad_(), b.requires_grad_()), gate.requires_grad_())
