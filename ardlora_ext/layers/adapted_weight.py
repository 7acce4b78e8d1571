"""A stack of experts' weights that brings its adapters along: whatever product an experts module takes of it.

It is no tensor, but torch's functions ask it what to do (`__torch_function__`). What a module may do with it: pick one
expert (`W[e]`) and multiply by it, gather the experts of each row (`W[ids]`), multiply rows sorted by expert
(`grouped_mm`) or rows already dealt out (`bmm`); everything else raises, so that no adapter is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from ardlora_ext.layers.routing import Routing
from ardlora_ext.native import ops
from ardlora_ext.native.compiled import as_rows
from ardlora_ext.native.grouped import Base, Member, lora_grouped
from ardlora_ext.native.prepared import Prepared
from ardlora_ext.native.units import UnitLayout

Places = Callable[[], torch.Tensor | None]

_PRODUCTS = ("matmul", "__matmul__", "mm", "bmm")
_GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")


class Stack(Protocol):
    """What is read of an `ExpertStack`."""

    layout: UnitLayout
    ranks: list[int]
    scaling: float
    lora_dropout: float
    training: bool
    parameter: str
    transposed: bool
    tokens: torch.Tensor
    rank_table: torch.Tensor
    prepared: Prepared

    @property
    def base_layer(self) -> object: ...

    @property
    def weight(self) -> torch.Tensor: ...

    def _adapter(self, dtype: torch.dtype, dropout: ops.Dropout) -> ops.Adapter: ...

    def _draw(self) -> ops.Dropout: ...


@lru_cache(maxsize=1 << 12)
def _single_table(in_features: int, out_features: int, rank: int) -> torch.Tensor:
    return UnitLayout("experts", "independent", 1, in_features, out_features).encode([rank])


class Call:
    """What all products of one forward pass share: the routing, the mask, the factors cut by expert on demand."""

    def __init__(self, stack: Stack, routing: Routing) -> None:
        self.stack, self.routing = stack, routing
        masked = stack.training and stack.lora_dropout > 0.0
        self.dropout = stack._draw() if masked else ops.NO_DROPOUT
        self._parts: list[tuple[torch.Tensor, ...]] | None = None
        self._rows = 0  # that came expert by expert

    def grouped(self, x: torch.Tensor, base: Base | None, ends: torch.Tensor, places: Places) -> torch.Tensor:
        """Return the product of rows of all experts, each up to its end; `places` are asked for if there is a mask."""
        offsets, counts = self.routing.offsets(ends)
        self._count(counts)
        at = None if self.dropout[1] is None else places()
        return lora_grouped(x, base, offsets, *self.stack._adapter(x.dtype, self.dropout), at, self.stack.prepared)

    def single(self, x: torch.Tensor, base: Base | None, expert: int) -> torch.Tensor:
        """Return the product of rows of one expert; all experts' gradients meet in one node (split's)."""
        layout, ranks = self.stack.layout, self.stack.ranks
        if self._parts is None:
            whole = [t for t in self.stack._adapter(x.dtype, self.dropout)[:3] if t is not None]
            live = sum(ranks)
            self._parts = [torch.split(t, [*ranks, len(t) - live]) for t in whole]
        a, b, *gates = (part[expert] for part in self._parts)
        table = _single_table(layout.in_features, layout.out_features, ranks[expert])
        adapter = a, b, gates[0] if gates else None, table, self.stack.scaling, self.dropout
        places = None
        if self.dropout[1] is not None:
            places = self.routing.places_of(expert, len(x))
            if places is None:
                places = torch.arange(self._rows, self._rows + len(x), device=x.device)
            self._rows += len(x)
        member = Member(self.stack.rank_table, expert, layout.units)
        return lora_grouped(x, base, torch.tensor([0, len(x)], device=x.device), *adapter, places, member=member)

    def count_single(self, expert: int, rows: int) -> None:
        """Add rows to what one expert has seen in training."""
        if self.stack.training and torch.is_grad_enabled():
            self.stack.tokens[expert] += rows

    def _count(self, rows: torch.Tensor) -> None:
        """Add [experts] rows to what the experts have seen in training, where the rows are: nothing waits for them."""
        if self.stack.training and torch.is_grad_enabled():
            if self.stack.tokens.device != rows.device:
                self.stack.tokens = self.stack.tokens.to(rows.device)
            self.stack.tokens += rows  # in place: a captured graph adds to the same numbers in each replay


class AdaptedWeight:
    """A stack [experts, ., .], one matrix of it, or the matrices of given experts; `flipped`: seen transposed."""

    def __init__(
        self,
        stack: Stack,
        call: Call,
        pick: int | torch.Tensor | None = None,
        flipped: bool = False,
    ) -> None:
        self.stack, self.call, self.pick, self.flipped = stack, call, pick, flipped

    @property
    def tensor(self) -> torch.Tensor:
        """The frozen weight that it stands for; matrices of given experts are copied."""
        weight = self.stack.weight if self.pick is None else self.stack.weight[self.pick]
        return weight.mT if self.flipped else weight

    @property
    def in_first(self) -> bool:
        """Whether the axes are [in, out]."""
        return self.stack.transposed != self.flipped

    @property
    def shape(self) -> torch.Size:
        """As a tensor's."""
        _, *axes = self.stack.weight.shape
        axes = axes[::-1] if self.flipped else axes
        lead = (
            [self.stack.layout.units] if self.pick is None else [] if isinstance(self.pick, int) else [len(self.pick)]
        )
        return torch.Size([*lead, *axes])

    def size(self, dim: int | None = None) -> Any:
        """As a tensor's."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As a tensor's."""
        return len(self.shape)

    @property
    def ndim(self) -> int:
        """As a tensor's."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As a tensor's."""
        return self.stack.weight.dtype

    @property
    def device(self) -> torch.device:
        """As a tensor's."""
        return self.stack.weight.device

    def data_ptr(self) -> int:
        """As a tensor's: alignment is asked for."""
        return self.stack.weight.data_ptr()

    def transpose(self, first: int, second: int) -> AdaptedWeight:
        """Return it with its last two axes exchanged; no others can be."""
        dims = len(self.shape)
        if {first % dims, second % dims} != {dims - 1, dims - 2}:
            raise self._refusal(f"transpose({first}, {second})")
        return AdaptedWeight(self.stack, self.call, self.pick, not self.flipped)

    @property
    def mT(self) -> AdaptedWeight:  # noqa: N802 - torch's name
        """As a tensor's."""
        return self.transpose(-2, -1)

    T = mT

    def t(self) -> AdaptedWeight:
        """As a tensor's."""
        return self.transpose(-2, -1)

    def to(self, dtype: torch.dtype) -> AdaptedWeight:
        """Return it, in the dtype it has."""
        if dtype != self.dtype:
            raise self._refusal(f"to({dtype})")
        return self

    def float(self) -> AdaptedWeight:
        """Return it, where it is in float32."""
        return self.to(torch.float32)

    def __getattr__(self, name: str) -> Any:
        if "stack" not in vars(self):  # while it is copied or unpickled
            raise AttributeError(name)
        raise AttributeError(str(self._refusal(f".{name}")))

    def __getitem__(self, pick: Any) -> AdaptedWeight:
        if self.pick is not None or not isinstance(pick, int | torch.Tensor):
            raise self._refusal(f"[{pick!r:.40}]")
        if isinstance(pick, torch.Tensor) and (pick.dim() > 1 or pick.dtype == torch.bool):
            raise self._refusal(f"an index of {pick.dim()} dimensions")
        found = int(pick) if isinstance(pick, int) or pick.dim() == 0 else pick
        return AdaptedWeight(self.stack, self.call, found, self.flipped)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> torch.Tensor:
        """Compute a product of which one operand is adapted."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", str(func)).rpartition(".")[2]
        values = [*args, *kwargs.values()]
        place = next(i for i, value in enumerate(values) if isinstance(value, AdaptedWeight))
        own: AdaptedWeight = values[place]
        if name == "linear" and isinstance(own.pick, int):
            bias = values[2] if len(values) > 2 else None
            return own._matrix(values[0], bias, in_first=False)
        if name in _PRODUCTS and len(values) == 2:
            first = place == 0  # W x, as bmm(W[ids], x[..., None]) does
            x = values[1] if first else values[0]
            if isinstance(own.pick, int) and not first:
                return own._matrix(x, None, in_first=True)
            if isinstance(own.pick, torch.Tensor) and x.dim() == 3:
                return own._gathered(x, first)
            if own.pick is None and not first and x.dim() == 3:
                return own._dealt(x)
        if name in _GROUPED and own.pick is None and place == 1:
            offs: torch.Tensor = kwargs["offs"] if "offs" in kwargs else args[2]
            return own._grouped(func, values[0], offs)
        raise own._refusal(name)

    def __rmatmul__(self, x: torch.Tensor) -> torch.Tensor:
        return AdaptedWeight.__torch_function__(torch.matmul, (), (x, self))

    def _refusal(self, what: str) -> TypeError:
        kind = type(self.stack.base_layer).__name__
        return TypeError(
            f"LoraExperts: {kind} must use '{self.stack.parameter}' in products that adapters can follow, got {what}; "
            "choose model.set_experts_implementation('grouped_mm') or 'eager', or leave it out by exclude_modules"
        )

    def _check_axes(self, in_first: bool) -> None:
        if self.in_first != in_first:
            read = "[experts, in, out]" if self.stack.transposed else "[experts, out, in]"
            raise self._refusal(f"a use of it as the transpose of {read}")

    def _matrix(self, x: torch.Tensor, bias: torch.Tensor | None, in_first: bool) -> torch.Tensor:
        """Multiply rows of x by the matrix of one expert."""
        self._check_axes(in_first)
        assert isinstance(self.pick, int)
        expert = self.pick
        weight = self.tensor if in_first else self.tensor.mT  # [in, out]
        self.call.count_single(expert, x.numel() // max(x.shape[-1], 1))
        if self.stack.ranks[expert] == 0 or x.numel() == 0:
            return F.linear(x, weight.mT, bias)
        rows = as_rows(x)
        if x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type):
            y = self.call.single(rows, Base(lambda t, stack: t @ stack[0], weight[None]), expert)
        else:
            y = F.linear(rows, weight.mT)
            y = y + self.call.single(rows.to(y.dtype), None, expert)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    def _grouped(self, func: Any, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        """Multiply rows sorted by expert, `offs` [experts] where each expert's end."""
        self._check_axes(in_first=True)
        base = Base(lambda rows, stack: func(rows, stack, offs=offs), self.tensor)
        return self.call.grouped(x, base, offs, lambda: self.call.routing.order(len(x)))

    def _dealt(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [experts, T, in]: each expert has as many rows."""
        self._check_axes(in_first=True)
        experts, each, _ = x.shape
        ends = torch.arange(1, experts + 1, device=x.device) * each
        base = Base(lambda rows, stack: torch.bmm(rows.view(experts, each, -1), stack).flatten(0, 1), self.tensor)
        return self.call.grouped(x.flatten(0, 1), base, ends, lambda: None).view(experts, each, -1)

    def _gathered(self, x: torch.Tensor, first: bool) -> torch.Tensor:
        """Multiply each of x [S, 1, in], or as columns [S, in, 1], by the matrix of its own expert."""
        self._check_axes(in_first=not first)
        assert isinstance(self.pick, torch.Tensor)
        rows = x[..., 0] if first else x[:, 0]
        experts, order = torch.sort(self.pick, stable=True)
        last = torch.arange(self.stack.layout.units, device=x.device)
        ends = torch.searchsorted(experts, last, right=True)
        y = torch.bmm(self.tensor, x)[..., 0] if first else torch.bmm(x, self.tensor)[:, 0]
        update = self.call.grouped(rows[order], None, ends, lambda: order)
        y = y + update[torch.argsort(order)]
        return y[..., None] if first else y[:, None]
