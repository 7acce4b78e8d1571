"""`LoraLinear`: a frozen linear layer and its adapter, with one rank per unit that can change in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ardlora_ext import processes
from ardlora_ext.layers import spectra
from ardlora_ext.layers.base import Conv1D, dense_base, fused_dtype, is_dense, is_plain
from ardlora_ext.layers.rows import HOST, capacity_of, fit_rows, initial_rows
from ardlora_ext.native import ops, reference
from ardlora_ext.native.compiled import core
from ardlora_ext.native.packing import Readers
from ardlora_ext.native.prepared import Prepared
from ardlora_ext.native.transfers import is_capturing
from ardlora_ext.native.units import UnitLayout, native_table
from ardlora_ext.unbroken import unbroken

__all__ = [
    "Capacity",
    "Conv1D",
    "Gate",
    "LoraLinear",
    "is_dense",
    "is_plain",
]

Capacity = Literal["elastic", "fixed"]
Gate = Literal["none", "controlled", "trained"]


class LoraLinear(nn.Module):
    """y = base(x) + scaling * sum_u (g_u o (x A_u^T)) B_u over the units of one matrix.

    `lora_A` [capacity, a_width] and `lora_B` [capacity, b_width] are rank-major: row i of both is component i, rows
    past the live ones are zero. lora_A starts as Kaiming uniform (bound 1/sqrt(a_width), as in PEFT), lora_B at zero.

    Attributes:
        base_layer: the wrapped layer, frozen.
        layout: how the matrix is cut into units.
        ranks: live components of each unit.
        rank_table: the same as the tensor that the ops read, `UnitLayout.encode(ranks)`.
        scaling: constant in front of the update; does not change with the ranks.
        lora_gate: [capacity of the gated factor] float32 gates that a controller sets, or None.
        lora_E: [capacity, 1] gates that the optimizer trains (the singular values of the P Lambda Q form), or None.
        readers: shared with the layers that may read the same tensor, see `packing`, or None.
        prepared: the adapter as native calls take it.
        undo_merge: what takes the update out of the base weight again while it is merged, else None.
        loaded: whether its ranks came with a state_dict and no controller has taken them over yet.
    """

    changes: ClassVar[int] = 0  # of ranks, gate buffers and devices of all layers: what was derived is stale

    lora_gate: torch.Tensor | None
    lora_E: nn.Parameter | None  # noqa: N815
    undo_merge: tuple[torch.Tensor, ...] | None
    loaded: bool = False

    def __init__(
        self,
        base_layer: nn.Module,
        layout: UnitLayout,
        r: int,
        scaling: float,
        *,
        max_rank: int | None = None,
        capacity: Capacity = "elastic",
        lora_dropout: float = 0.0,
        gate: Gate = "none",
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layout = layout
        self.max_rank = min(r if max_rank is None else max_rank, layout.max_rank)
        self.scaling = scaling
        self.capacity = capacity
        self.lora_dropout = lora_dropout
        self.undo_merge = None
        self.loaded = False
        self.readers: Readers | None = None
        self.prepared = Prepared()
        self.ranks: list[int] = []
        self.rank_table = layout.encode([0] * layout.units)
        self.set_ranks([min(r, layout.max_rank)] * layout.units)
        a_rows, b_rows = layout.rows(self.ranks)
        a_cap, b_cap = self.capacities(a_rows, b_rows)
        lora_A = torch.zeros(a_cap, layout.a_width, dtype=dtype, device="cpu")
        lora_A[:a_rows] = initial_rows(a_rows, layout.a_width, generator)
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(torch.zeros(b_cap, layout.b_width, dtype=dtype, device="cpu"))
        self.register_buffer("lora_gate", self._gates(1.0) if gate == "controlled" else None)
        trained = torch.zeros(len(self.gated), 1, **HOST)
        self.register_parameter("lora_E", nn.Parameter(trained) if gate == "trained" else None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "lora_gate":
            LoraLinear.changes += 1
        super().__setattr__(name, value)

    def set_ranks(self, ranks: Sequence[int], encoded: torch.Tensor | None = None) -> None:
        """Record the live ranks; the caller has brought the buffers in line, and may have encoded them."""
        if self.ranks == list(ranks):
            return
        encoded = self.layout.encode(ranks) if encoded is None else encoded
        with unbroken():
            vars(self)["ranks"] = list(ranks)  # torch's __setattr__ takes longer than all else here
            self.prepared.clear()
            LoraLinear.changes += 1
            self.rank_table.copy_(encoded)  # in place: compiled code holds on to it

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's: models that look at it (T5 asks for the dtype of `wo.weight`) find what they know."""
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's."""
        bias: torch.Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return bias

    @property
    def replacement(self) -> nn.Module:
        """What stands in the place of the base layer."""
        return self

    def placed(self, update: torch.Tensor) -> torch.Tensor:
        """Return an update [out_features, in_features] in the layout of the base weight."""
        return update.T if isinstance(self.base_layer, Conv1D) else update

    @property
    def in_features(self) -> int:
        """Of the matrix, as nn.Linear's."""
        return self.layout.in_features

    @property
    def out_features(self) -> int:
        """Of the matrix, as nn.Linear's."""
        return self.layout.out_features

    @property
    def table(self) -> core.UnitTable:
        """The native table of the live ranks."""
        return native_table(self.rank_table)

    def _gates(self, value: float) -> torch.Tensor:
        gates = torch.zeros(len(self.gated), dtype=torch.float32, device=self.gated.device)
        gates[: sum(self.ranks)] = value
        return gates

    def capacities(self, a_rows: int, b_rows: int) -> tuple[int, int]:
        """Return the rows to allocate for (lora_A, lora_B) given the live ones."""
        if self.capacity == "fixed":
            return self.layout.rows([self.max_rank] * self.layout.units)
        return capacity_of(a_rows), capacity_of(b_rows)

    def _apply(self, fn: Any, recurse: bool = True) -> LoraLinear:
        """Follow `.to(...)`, but keep gates in float32, the type the kernels read, bit for bit."""
        gate = None if self.gate is None else self.gate.detach()
        LoraLinear.changes += 1
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if gate is not None and self.lora_E is None:
            self.lora_gate = gate.to(self.lora_A.device)
        elif gate is not None and self.lora_E is not None:
            self.lora_E.data = gate.to(self.lora_A.device).view(-1, 1)
        return self

    def get_extra_state(self) -> torch.Tensor:
        """Return the ranks: the shapes in a state_dict depend on them."""
        return torch.tensor(self.ranks, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Do nothing: the ranks are needed, and taken over, before the factors are."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Take over the ranks of the state, then load it; `lists` ends with the error messages."""
        ranks = state_dict.get(prefix + "_extra_state")
        if isinstance(ranks, torch.Tensor):
            rows = {name: len(state_dict.get(prefix + name, value)) for name, value in self.factors.items()}
            problem = self._take_sizes(ranks.tolist(), rows)
            if problem:
                lists[-1].append(f"ranks of '{prefix.removesuffix('.')}' must {problem}, got {ranks.tolist()}")
            else:  # a state of another capacity differs in the rows past the live ones
                sizes = {name: len(value) for name, value in self.factors.items()} | {"lora_gate": len(self.gated)}
                self.loaded = True
                found = {prefix + name: size for name, size in sizes.items() if prefix + name in state_dict}
                state_dict.update({name: fit_rows(state_dict[name], size) for name, size in found.items()})
        for name in (prefix + "lora_gate", prefix + "lora_E"):  # with assign=True the tensors themselves are taken
            if isinstance(state_dict.get(name), torch.Tensor):
                state_dict[name] = state_dict[name].to(torch.float32)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    @torch.no_grad()
    def _take_sizes(self, ranks: list[int], rows: Mapping[str, int]) -> str:
        """Re-allocate for a state that is about to be loaded; return what is wrong with it, or nothing."""
        if len(ranks) != self.layout.units or not all(0 <= r <= self.max_rank for r in ranks):
            return f"be {self.layout.units} numbers from 0 to {self.max_rank}"
        if any(rows[name] < live for name, live in zip(("lora_A", "lora_B"), self.layout.rows(ranks), strict=True)):
            return f"fit the factors of {rows['lora_A']} and {rows['lora_B']} rows"
        a_rows, b_rows = self.capacities(*self.layout.rows(ranks))
        sizes = {"lora_A": a_rows, "lora_B": b_rows, "lora_E": a_rows if self.layout.gate_on_a else b_rows}
        for name, parameter in self.factors.items():
            if sizes[name] != len(parameter):
                parameter.grad = None  # set_ resets the gradient accumulator, which must not see the old shape
                parameter.set_(parameter.new_zeros(sizes[name], parameter.shape[1]))  # type: ignore[call-overload]
        self.set_ranks(ranks)
        if self.lora_gate is not None and len(self.lora_gate) != len(self.gated):
            self.lora_gate = self._gates(0.0)
        return ""

    def parameters_at(self, ranks: Sequence[int]) -> int:
        """Return the trained parameters of the adapter at these ranks: factors and, where they are trained, gates."""
        return self.layout.parameters(ranks) + (0 if self.lora_E is None else sum(ranks))

    @property
    def live_parameters(self) -> int:
        """Adapter parameters in use."""
        return self.parameters_at(self.ranks)

    @property
    def gate(self) -> torch.Tensor | None:
        """The gates, [capacity of the gated factor], or None for 1."""
        return self.lora_gate if self.lora_E is None else self.lora_E.view(-1)

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The trained factors by name."""
        own = self._parameters  # straight from there: a rank change asks every layer
        return {name: p for name in ("lora_A", "lora_B", "lora_E") if (p := own[name]) is not None}

    @property
    def extras(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the adapter that have no row per component, by name: kept in checkpoints."""
        return {}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Everything of the adapter that the optimizer trains, by name."""
        return self.factors | {name: value for name, value in self.extras.items() if isinstance(value, nn.Parameter)}

    @property
    def gated(self) -> nn.Parameter:
        """The factor with one row per unit and component, on which gates act."""
        return self.lora_A if self.layout.gate_on_a else self.lora_B

    @property
    def ungated(self) -> nn.Parameter:
        """The other factor."""
        return self.lora_B if self.layout.gate_on_a else self.lora_A

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return base(input) plus the adapter's output, [..., out_features]; other arguments are for the base layer.

        Raises:
            TypeError: the base layer returns something else than one tensor.
        """
        if self.undo_merge is not None:
            merged: torch.Tensor = self.base_layer(input, *args, **kwargs)
            return merged
        dropout = self._draw() if self.training and self.lora_dropout > 0.0 else ops.NO_DROPOUT
        base: Any = self._modules["base_layer"]  # straight from there: the attribute takes a microsecond
        dense = None if args or kwargs else dense_base(base)
        dtype = None if dense is None else fused_dtype(input, dense[0])
        if dense is not None and dtype is not None:
            return self._fused(input, *dense, dtype, dropout)
        y = base(input, *args, **kwargs)
        if not isinstance(y, torch.Tensor) or y.shape[-1] != self.out_features:
            got = list(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
            raise TypeError(
                f"LoraLinear: base layer must return one tensor [..., {self.out_features}], got {got} from "
                f"{type(base).__name__}; leave it out by exclude_modules"
            )
        return ops.lora_accumulate(y, self._cast(input, y.dtype), *self._adapter(y.dtype, dropout), self.prepared)

    def _fused(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        dropout: ops.Dropout,
    ) -> torch.Tensor:
        """Return base and adapter in one autograd node, computed in `dtype`."""
        total = None
        if x.dtype != dtype:
            x = self._cast(x, dtype)
        elif not torch.compiler.is_compiling() and self.readers is not None:
            x, total = self.readers.read(x, self)
        if weight.dtype != dtype:
            weight = weight.to(dtype)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        return ops.lora_linear(x, weight, bias, *self._adapter(dtype, dropout), total, self.prepared)

    def _cast(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if x.dtype == dtype:
            return x
        if torch.compiler.is_compiling() or self.readers is None:  # compiled code must not depend on who reads
            return x.to(dtype)
        return self.readers.cast(x, dtype, self)

    def _draw(self) -> ops.Dropout:
        """Return dropout with a seed from torch's generator.

        Activation checkpointing restores it, so recomputation sees the same mask. Processes that were seeded alike draw
        alike: their number makes the masks differ. A captured graph draws its seed on the device in each replay.
        """
        if torch.compiler.is_compiling():
            return self.lora_dropout, torch.randint(2**62, (), device="cpu") ^ processes.rank()
        if is_capturing() and self.lora_A.is_cuda:
            drawn = torch.empty((), dtype=torch.int64, device=self.lora_A.device).random_(2**62)
            return self.lora_dropout, drawn.bitwise_xor_(processes.rank())
        seed = torch.empty((), dtype=torch.int64, device="cpu").random_(2**62)  # as randint, in a third of its time
        return self.lora_dropout, int(seed) ^ processes.rank()

    def _adapter(self, dtype: torch.dtype, dropout: ops.Dropout) -> ops.Adapter:
        """Return what the ops take of the adapter, for activations of this dtype."""
        own = self._parameters
        lora_A, lora_B, lora_E = own["lora_A"], own["lora_B"], own["lora_E"]
        assert lora_A is not None
        assert lora_B is not None
        if lora_E is None:
            gate = self._buffers["lora_gate"]
        else:
            if lora_E.dtype != torch.float32:  # somebody has cast all that trains
                lora_E.data = lora_E.data.to(torch.float32)
                LoraLinear.changes += 1
            gate = lora_E.view(-1)
        if lora_A.dtype not in (torch.float32, dtype):  # QLoRA recipes cast adapters to bfloat16, whatever is computed
            return lora_A.float(), lora_B.float(), gate, self.rank_table, self.scaling, dropout
        return lora_A, lora_B, gate, self.rank_table, self.scaling, dropout

    @torch.no_grad()
    def get_delta_weight(self) -> torch.Tensor:
        """Return the dense update [out_features, in_features] in float32."""
        factors = self.lora_A.float(), self.lora_B.float()
        return reference.lora_delta(self.layout, self.ranks, *factors, self.gate, self.scaling)

    def singular_values(self) -> torch.Tensor:
        """Return the singular values of each unit's update, [units, largest rank] float64, descending, 0-padded."""
        return spectra.singular_values([self])

    @torch.no_grad()
    def fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return plain LoRA factors (A [hidden, in_features], B [out_features, hidden]) in float32, B A = the update.

        Units, gates and scaling are folded in; `hidden` is the rank of the result.
        """
        return fold(self.layout, self.ranks, self.lora_A, self.lora_B, self.gate, self.scaling)

    def merge_terms(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return (A, B, scale) of the merged weight scale o (W + B A), float32; scale [out_features], or None for 1."""
        return *self.fold(), None

    def extra_repr(self) -> str:
        lay = self.layout
        ranks = self.ranks[0] if len(self.ranks) == 1 else self.ranks
        return f"in_features={lay.in_features}, out_features={lay.out_features}, kind={lay.kind}, ranks={ranks}"


def fold(
    layout: UnitLayout,
    ranks: Sequence[int],
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return plain LoRA factors (A [hidden, in_features], B [out_features, hidden]) in float32 of units at `ranks`."""
    hidden = layout.table(ranks).hidden
    a, b = (lora_A.new_zeros(hidden, n, dtype=torch.float32) for n in (layout.in_features, layout.out_features))
    own = 0
    for (a_rows, b_rows, in_cols, out_cols), r in zip(reference.unit_slices(layout, ranks), ranks, strict=True):
        h = slice(0, r) if layout.shared else slice(own, own + r)
        gates = lora_A.new_ones(r, 1, dtype=torch.float32) if gate is None else gate[own : own + r, None]
        on_a, on_b = (gates, 1.0) if layout.gate_on_a else (1.0, gates)
        a[h, in_cols] = on_a * lora_A[a_rows].float()
        b[h, out_cols] = scaling * on_b * lora_B[b_rows].float()
        own += r
    return a, b.T.contiguous()
