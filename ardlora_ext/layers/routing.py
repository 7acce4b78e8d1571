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
        self._ends: torch.Tensor | None = None
        self._sorted: tuple[torch.Tensor, torch.Tensor] | None = None

    def offsets(self, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where each expert's rows begin, int64 [experts + 1], and how many it has [experts].

        Args:
            ends: where they end; all stacks of a module that are given the same tensor share the work.
        """
        if self._sorted is None or self._ends is not ends:
            begins = ends.new_zeros(len(ends) + 1, dtype=torch.int64)
            begins[1:] = ends
            self._ends, self._sorted = ends, (begins, begins[1:] - begins[:-1])
        return self._sorted

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
