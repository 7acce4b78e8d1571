"""Stacks of experts in a trace: products that only say how large they are, and keep what a step would keep.

Which rows an expert sees is chosen by values; how many rows there are in all is not, where they are sorted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ardlora_ext.layers.adapted_weight import Call, Places
from ardlora_ext.layers.experts import ExpertStack, LoraExperts
from ardlora_ext.layers.routing import Routing
from ardlora_ext.native.grouped import Base


class _Kept(torch.autograd.Function):
    """Rows of `columns` zeros; backward is never run."""

    @staticmethod
    def forward(ctx: Any, columns: int, factor: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*kept)
        return kept[0].new_empty(len(kept[0]), columns)


class _PlannedCall(Call):
    """A call whose rows come sorted; rows that are picked by their values stop the trace elsewhere."""

    def __init__(self, names: dict[int, str], rows: dict[str, int], dense: bool, stack: Any, routing: Routing) -> None:
        super().__init__(stack, routing)
        self._name, self._seen, self._dense = names[id(stack)], rows, dense

    def grouped(self, x: torch.Tensor, base: Base | None, ends: torch.Tensor, places: Places) -> torch.Tensor:
        """Keep x and offsets, and, as PEFT does, the stack with its update added."""
        self._seen[self._name] = self._seen.get(self._name, 0) + len(x)
        kept = [x, self.routing.offsets(ends)[0]]
        if self._dense:
            kept.append(torch.empty_like(self.stack.weight))
        y: torch.Tensor = _Kept.apply(  # type: ignore[no-untyped-call]
            self.stack.layout.out_features, self.stack._adapter(x.dtype, self.dropout)[1], *kept
        )
        return y


@contextmanager
def planned_experts(model: nn.Module, stacks: dict[str, ExpertStack], dense: bool = False) -> Iterator[dict[str, int]]:
    """Let experts compute nothing; yield the rows that each stack sees.

    Args:
        model: with adapters.
        stacks: of it, by name.
        dense: whether updates are formed and added to the weights, as PEFT's `target_parameters` does.
    """
    rows: dict[str, int] = {}
    names = {id(stack): name for name, stack in stacks.items()}
    experts = [module for module in model.modules() if isinstance(module, LoraExperts)]
    for module in experts:
        module.calls = partial(_PlannedCall, names, rows, dense)
    try:
        yield rows
    finally:
        for module in experts:
            del module.calls
