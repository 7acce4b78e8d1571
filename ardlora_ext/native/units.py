"""Units of an adapted matrix: what gets a rank of its own, and the shapes that follow.

A unit is the whole matrix, one attention head's slice of it (a block of output columns, q, k, v, or of input columns,
the attention output), or one matrix of a stack of experts. See `csrc/include/ardlora/unit_table.h` for how components
are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from ardlora_ext.native.compiled import core

UnitKind = Literal["matrix", "out_heads", "in_heads", "experts"]
Factoring = Literal["independent", "shared"]

_KIND_CODES: dict[UnitKind, int] = {"matrix": 0, "out_heads": 1, "in_heads": 2, "experts": 3}
_FACTORING_CODES: dict[Factoring, int] = {"independent": 0, "shared": 1}


@dataclass(frozen=True)
class UnitLayout:
    """How one matrix [out_features, in_features] is cut into units; ranks come later.

    Attributes:
        kind: `matrix` (one unit), `out_heads` (cut by output rows), `in_heads` (cut by input columns) or `experts` (a
            stack of `units` matrices of this size, each a unit with its own rows of both factors).
        factoring: `independent`: each unit owns rows of both factors. `shared`: the factor that spans the whole
            matrix exists once, unit u uses its first r_u rows.
        units: number of units.
        in_features: K.
        out_features: N.
    """

    kind: UnitKind
    factoring: Factoring
    units: int
    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        cut = {"out_heads": self.out_features, "in_heads": self.in_features}.get(self.kind, self.units)
        if self.units < 1 or cut % self.units:
            raise ValueError(f"UnitLayout: heads must divide the {cut} features they cut, got {self.units} heads")
        if self.kind == "matrix" and self.units != 1:
            raise ValueError(f"UnitLayout: a matrix must be one unit, got {self.units}")

    @property
    def shared(self) -> bool:
        """Whether the units share the factor that spans the whole matrix."""
        return self.factoring == "shared" and self.kind not in ("matrix", "experts")

    @property
    def gate_on_a(self) -> bool:
        """Whether the factor with one row per unit and component, where gates act, is lora_A (else lora_B)."""
        return self.shared and self.kind == "in_heads"

    @property
    def a_width(self) -> int:
        """Columns of a row of lora_A."""
        return self.in_features // self.units if self.kind == "in_heads" else self.in_features

    @property
    def b_width(self) -> int:
        """Columns of a row of lora_B (rank-major)."""
        return self.out_features // self.units if self.kind == "out_heads" else self.out_features

    @property
    def max_rank(self) -> int:
        """Largest rank a unit can use: beyond it a component is a linear combination of others."""
        return min(self.a_width, self.b_width)

    def rows(self, ranks: Sequence[int]) -> tuple[int, int]:
        """Return the live rows of (lora_A, lora_B) at these ranks."""
        total, largest = sum(ranks), max(ranks)
        if not self.shared:
            return total, total
        return (total, largest) if self.gate_on_a else (largest, total)

    def parameters(self, ranks: Sequence[int]) -> int:
        """Return the number of live adapter parameters at these ranks."""
        a_rows, b_rows = self.rows(ranks)
        return a_rows * self.a_width + b_rows * self.b_width

    def encode(self, ranks: Sequence[int]) -> torch.Tensor:
        """Return layout and ranks as one int64 tensor [4 + units] on the CPU: what the ops read."""
        kind, factoring = _KIND_CODES[self.kind], _FACTORING_CODES[self.factoring]
        words = [kind, factoring, self.in_features, self.out_features, *ranks]
        return torch.tensor(words, dtype=torch.int64, device="cpu")  # whatever the default device is

    @staticmethod
    def decode(encoded: torch.Tensor) -> tuple[UnitLayout, list[int]]:
        """Return the layout and the ranks that `encode` made a tensor of."""
        kind, factoring, in_features, out_features, *ranks = encoded.tolist()
        kinds = {code: name for name, code in _KIND_CODES.items()}
        factorings = {code: name for name, code in _FACTORING_CODES.items()}
        return UnitLayout(kinds[kind], factorings[factoring], len(ranks), in_features, out_features), ranks

    def table(self, ranks: Sequence[int]) -> core.UnitTable:
        """Return the native table of these ranks."""
        return native_table(self.encode(ranks))


@lru_cache(maxsize=1 << 14)
def _table(words: bytes) -> core.UnitTable:
    kind, factoring, in_features, out_features, *ranks = memoryview(words).cast("q")
    return core.UnitTable(kind, factoring, in_features, out_features, ranks)


def native_table(encoded: torch.Tensor) -> core.UnitTable:
    """Return the native table of what `UnitLayout.encode` made; tables are immutable and equal ones are shared.

    Raises:
        ValueError: it is of another dtype.
    """
    if encoded.dtype != torch.int64:
        raise ValueError(f"rank table must be int64, got {encoded.dtype}")
    return _table(encoded.numpy().tobytes())
