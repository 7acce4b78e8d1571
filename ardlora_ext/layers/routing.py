"""Which token is in which row of an experts module's products: so that a token has the same dropout on every path.

A token's place is its number times the experts it goes to, plus which of them this is. Modules that do not say where
tokens go, or lay rows out in an order of their own, have masks by the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Routing:
    """The experts of each token [tokens, top_k], found among what an experts module is called with."""

    def __init__(self, values: Iterable[object]) -> None:
        """Take the first 2-D tensor of integers."""
        tensors = (v for v in values if isinstance(v, torch.Tensor))
        found = (v for v in tensors if v.dim() == 2 and v.dtype in (torch.int64, torch.int32))
        self.index = next(found, None)
        self._order: torch.Tensor | None = None

    def order(self, rows: int) -> torch.Tensor | None:
        """Return the places [rows] of tokens sorted by expert, as transformers does; None where that is not known."""
        if self.index is None or self.index.numel() != rows:
            return None
        if self._order is None:
            self._order = torch.sort(self.index.reshape(-1))[1]
        return self._order

    def places_of(self, expert: int, rows: int) -> torch.Tensor | None:
        """Return the places [rows] of one expert's tokens, slot after slot; None where that is not known."""
        if self.index is None:
            return None
        slots, tokens = torch.eq(self.index.T, expert).nonzero(as_tuple=True)
        return tokens * self.index.shape[1] + slots if len(tokens) == rows else None
