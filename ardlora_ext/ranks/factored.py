"""Second moments kept as two vectors (Adafactor, CAME): v[i, j] = row[i] * column[j] / mean(row).

A row's number moves with the row. The column's are means over all rows, so they are scaled with the mean of the row's:
then v keeps its value for every row that stays. A new row starts at the mean of those: at zero, its first updates would
be 1 / sqrt(1 - beta2) times too large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Factored:
    """A second moment of one parameter.

    Attributes:
        row: one number per row of the parameter.
        column: one per column.
        column_key: of the state; the other one's is that of the moment.
    """

    row: torch.Tensor
    column: torch.Tensor
    column_key: str

    def gather(self, plan: Sequence[int], live: int) -> Factored:
        """Return the moment whose row i is row `plan[i]` of this one; -1 is a new row below `live`, else none."""
        flat = self.row.reshape(-1)
        source = torch.tensor(plan, dtype=torch.int64, device="cpu").to(flat.device, non_blocking=True)
        row = torch.where(source < 0, 0.0, flat[source.clamp(min=0)]) if len(flat) else flat.new_zeros(len(plan))
        kept = source[:live] >= 0
        if any(number >= 0 for number in plan[:live]):
            row[:live] = torch.where(kept, row[:live], row[:live].sum() / kept.sum())  # new ones are still 0
        before, after = flat.mean(), row.mean()
        ratio = torch.where((before > 0) & (after > 0), after / before, 1.0)
        return Factored(row.view(-1, *self.row.shape[1:]), self.column * ratio, self.column_key)

    def with_rows(self, row: torch.Tensor, rows: int) -> Factored:
        """Return the moment whose first rows have these numbers, of a parameter of so many rows."""
        flat = self.row.new_zeros(rows)
        flat[: len(row)] = row.to(flat.dtype)
        before, after = self.row.mean(), flat.mean()
        ratio = torch.where((before > 0) & (after > 0), after / before, 1.0)
        return Factored(flat.view(-1, *self.row.shape[1:]), self.column * ratio, self.column_key)


def find(state: Mapping[str, Any], rows: int, width: int) -> dict[str, Factored]:
    """Return the factored moments among the optimizer state of a parameter [rows, width], by the key of their rows."""
    found = {}
    for key, row in state.items():
        partner = key.replace("row", "col")
        column = state.get(partner)
        if partner == key or not (isinstance(row, torch.Tensor) and isinstance(column, torch.Tensor)):
            continue
        if row.numel() == len(row) == rows and column.numel() == column.shape[-1] == width:
            found[key] = Factored(row, column, partner)
    return found
