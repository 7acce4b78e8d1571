"""Rows of an embedding that train alone, as PEFT's `trainable_token_indices`: the rest of the matrix stays frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ardlora_ext.layers.linear import is_dense


class TokenRows(nn.Module):
    """An embedding, or the output head that is tied to one, some of whose rows are replaced by trained ones.

    PEFT copies the whole matrix in every forward pass; here the rows take the place of what the base layer gives for
    them, so a pass costs what the base costs and a lookup.

    Attributes:
        base_layer: the wrapped layer, frozen.
        token_rows: [tokens, width], shared with the modules that are tied to this one. They start as in the base.
        indices: rows of the matrix that they stand for, ascending or not, no two alike.
    """

    slots: torch.Tensor

    def __init__(self, base_layer: nn.Module, indices: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.indices = list(indices)
        self.token_rows = rows
        weight: torch.Tensor = getattr(base_layer, "weight")  # noqa: B009 - typed as Tensor | Module
        slots = torch.full((len(weight),), -1, dtype=torch.int64, device=weight.device)
        slots[self.indices] = torch.arange(len(self.indices), device=weight.device)
        self.register_buffer("slots", slots, persistent=False)
        self.held: torch.Tensor | None = None  # what the rows of the base were, while the trained ones are in them

    def __getattr__(self, name: str) -> Any:
        """Return what models ask an embedding for (`padding_idx`, `embed_scale`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix with the trained rows in it, for models that compute with it themselves."""
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        if self.held is not None:
            return weight
        index = torch.tensor(self.indices, device=weight.device)
        return weight.index_copy(0, index, self.token_rows.to(weight.dtype))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return what the base gives, [..., width] or [..., tokens of the vocabulary], with the trained rows."""
        y: torch.Tensor = self.base_layer(input)
        if self.held is not None:
            return y
        if not isinstance(self.base_layer, nn.Embedding):
            weight: torch.Tensor = getattr(self.base_layer, "weight")  # noqa: B009
            index = torch.tensor(self.indices, device=y.device)
            change = self.token_rows - weight[index]  # zero at the start: the function is unchanged bit for bit
            return y.index_add(-1, index, nn.functional.linear(input, change.to(y.dtype)).to(y.dtype))
        slot = self.slots[input]
        rows = nn.functional.embedding(slot.clamp(min=0), self.token_rows).to(y.dtype)
        scale = getattr(self.base_layer, "embed_scale", None)  # Gemma and BART multiply what they look up
        rows = rows if scale is None else rows * (scale.to(y.dtype) if isinstance(scale, torch.Tensor) else scale)
        trains = (
            slot >= 0 if self.base_layer.padding_idx is None else (slot >= 0) & (input != self.base_layer.padding_idx)
        )
        rows = torch.where(trains[..., None], rows, rows.detach())  # as in torch, the padding row gets no gradient
        return torch.where(slot[..., None] >= 0, rows, y)

    def ready_to_merge(self) -> Callable[[], None]:
        """Return what writes the trained rows into the base, if they are not there; it only assigns."""
        weight, index = self._place()
        before, rows = weight[index], self.token_rows.detach().to(weight.dtype)

        def merge() -> None:
            if self.held is None:
                weight.index_copy_(0, index, rows)
                self.held = before

        return merge

    def ready_to_unmerge(self) -> Callable[[], None]:
        """Return what takes the trained rows out of the base again, bit for bit; it only assigns."""
        weight, index = self._place()

        def unmerge() -> None:
            if self.held is not None:
                weight.index_copy_(0, index, self.held)
                self.held = None

        return unmerge

    def _place(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight: torch.Tensor = getattr(self.base_layer, "weight").detach()  # noqa: B009
        return weight, torch.tensor(self.indices, device=weight.device)


def start_rows(layer: nn.Module, indices: Sequence[int], dtype: torch.dtype | None) -> nn.Parameter:
    """Return a parameter with these rows of a layer's weight, in `dtype` or that of the weight."""
    weight: torch.Tensor = getattr(layer, "weight").detach()  # noqa: B009
    return nn.Parameter(weight[list(indices)].clone().to(weight.dtype if dtype is None else dtype))


def has_rows(layer: nn.Module) -> bool:
    """Tell whether rows of a layer can train alone: an embedding or a linear layer of plain numbers."""
    kinds = isinstance(layer, nn.Embedding | nn.Linear)
    return kinds and is_dense(getattr(layer, "weight", None)) and getattr(layer, "max_norm", None) is None
