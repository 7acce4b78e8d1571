"""One adapted linear in every way we know: this package, PEFT, and what can be composed from torch's own operators.

All start from the same `Site`. PEFT knows no ranks per head, so it runs the zero-padded factors that its users would
load (`LoraLinear.fold`). The torch compositions are written as well as we could: one autograd node, y and dx
accumulated in place, factors cast to the dtype of x so that the products run in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ardlora_ext.bench.speed.layers.patterns import Site
from ardlora_ext.errors import InputError
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.native.reference import unit_slices

Gradients = tuple[torch.Tensor, torch.Tensor]  # of the folded factors: [hidden, K] and [hidden, N]


class Composition(nn.Module):
    """An adapted linear; `folded_gradients` makes the gradients of all of them comparable."""

    def __init__(self, site: Site, dropout: float) -> None:
        super().__init__()
        self.site, self.p = site, dropout

    def folded_gradients(self) -> Gradients:
        """Return the gradients as those of zero-padded factors; entries that a unit does not own are arbitrary."""
        raise NotImplementedError

    def folded(self, a: torch.Tensor, b: torch.Tensor) -> Gradients:
        """Return what belongs to the site's factors in the form that all can be compared in."""
        return fold(self.site, a, b)

    def equation(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return y of folded factors in the dtype of x, by plain products."""
        return x @ self.site.weight.to(x.dtype).T + (x @ a.T) @ b


class Base(Composition):
    """The frozen linear alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.site.weight)


class Ours(Composition):
    """`LoraLinear`."""

    def __init__(self, site: Site, dropout: float) -> None:
        super().__init__(site, dropout)
        self.layer = ours_layer(site, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out

    def folded_gradients(self) -> Gradients:
        a, b = self.layer.lora_A.grad, self.layer.lora_B.grad
        assert a is not None
        assert b is not None
        return fold(self.site, a, b)


class Peft(Composition):
    """`peft.tuners.lora.Linear` with factors padded to one rank."""

    def __init__(self, site: Site, dropout: float) -> None:
        super().__init__(site, dropout)
        import peft

        self.layer: Any

        a, b = fold(site, site.lora_A, site.lora_B)
        root = nn.Module()
        root.linear = frozen_linear(site)
        if not len(a):  # PEFT leaves such a matrix out
            self.layer = root.linear
            return
        config = peft.LoraConfig(r=len(a), lora_alpha=len(a), lora_dropout=dropout, target_modules=["linear"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped: Any = peft.get_peft_model(root, config)
        self.layer = wrapped.base_model.model.linear
        self.lora_A = self.layer.lora_A["default"].weight
        self.lora_B = self.layer.lora_B["default"].weight
        with torch.no_grad():
            self.lora_A.copy_(a)
            self.lora_B.copy_(b.T)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out

    def folded_gradients(self) -> Gradients:
        return self.lora_A.grad, self.lora_B.grad.T


class _Addmm(torch.autograd.Function):
    """Units one after the other by `addmm_` into slices of y and dx; one unit is plain LoRA."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, units: Any, p: float
    ) -> torch.Tensor:
        y = F.linear(x, weight)
        keep = torch.empty_like(x).bernoulli_(1.0 - p).div_(1.0 - p) if p > 0.0 else None
        source = x if keep is None else x * keep
        a, b = a.to(x.dtype), b.to(x.dtype)
        hidden = []
        for a_rows, b_rows, in_cols, out_cols in units:
            hidden.append(source[:, in_cols] @ a[a_rows].T)
            y[:, out_cols].addmm_(hidden[-1], b[b_rows])
        ctx.save_for_backward(x, weight, a, b, keep, *hidden)
        ctx.units = units
        return y

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grad
        x, weight, a, b, keep, *hidden = ctx.saved_tensors
        dx = dy @ weight
        source = x if keep is None else x * keep
        into = dx if keep is None else torch.zeros_like(dx)
        d_a, d_b = torch.zeros_like(a), torch.zeros_like(b)
        for h, (a_rows, b_rows, in_cols, out_cols) in zip(hidden, ctx.units, strict=True):
            d_h = dy[:, out_cols] @ b[b_rows].T
            d_b[b_rows].addmm_(h.T, dy[:, out_cols])
            d_a[a_rows].addmm_(d_h.T, source[:, in_cols])
            into[:, in_cols].addmm_(d_h, a[a_rows])
        if keep is not None:
            dx.addcmul_(into, keep)
        return dx, None, d_a.float(), d_b.float(), None, None


class TorchPadded(Composition):
    """Zero-padded factors, as one product each."""

    def __init__(self, site: Site, dropout: float) -> None:
        super().__init__(site, dropout)
        self.a, self.b = map(nn.Parameter, fold(site, site.lora_A, site.lora_B))
        self.units = [(slice(None),) * 4]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.p if self.training else 0.0
        out: torch.Tensor = _Addmm.apply(  # type: ignore[no-untyped-call]
            x, self.site.weight, self.a, self.b, self.units, p
        )
        return out

    def folded_gradients(self) -> Gradients:
        assert self.a.grad is not None
        assert self.b.grad is not None
        return self.a.grad, self.b.grad


class TorchLoop(TorchPadded):
    """Unit by unit, without padding."""

    def __init__(self, site: Site, dropout: float) -> None:
        super().__init__(site, dropout)
        slices = unit_slices(site.layout, site.ranks)
        self.units = [unit for unit, rank in zip(slices, site.ranks, strict=True) if rank > 0]
        self.a, self.b = nn.Parameter(site.lora_A.clone()), nn.Parameter(site.lora_B.clone())

    def folded_gradients(self) -> Gradients:
        return fold(self.site, *super().folded_gradients())


class _Heads(Composition):
    """Heads of the output from a batched product; what is common to its two kinds."""

    def __init__(self, site: Site, dropout: float) -> None:
        super().__init__(site, dropout)
        rows = sum(site.ranks)
        self.a = nn.Parameter(site.lora_A[: site.layout.rows(site.ranks)[0]].clone())
        self.b = nn.Parameter(site.lora_B[:rows].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        masked = F.dropout(x, self.p, self.training) if self.p > 0.0 else x
        h = masked @ self.a.to(x.dtype).T
        heads = self.product(h, self.b.to(x.dtype))  # [units, M, width]
        y = F.linear(x, self.site.weight)
        return (y.view(len(y), len(heads), -1) + heads.transpose(0, 1)).view(len(y), -1)

    def product(self, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return [units, M, width] from h [M, hidden] and the rows of all units."""
        raise NotImplementedError

    def folded_gradients(self) -> Gradients:
        assert self.a.grad is not None
        assert self.b.grad is not None
        return fold(self.site, self.a.grad, self.b.grad)


class TorchBmm(_Heads):
    """`torch.bmm` over units padded to the largest rank."""

    def __init__(self, site: Site, dropout: float) -> None:
        super().__init__(site, dropout)
        largest, own = max(site.ranks), torch.zeros(len(site.ranks), max(site.ranks), dtype=torch.int64)
        begin, columns = 0, own.clone()
        for u, rank in enumerate(site.ranks):
            own[u, :rank] = torch.arange(begin, begin + rank)
            columns[u, :rank] = torch.arange(rank) if site.layout.shared else own[u, :rank]
            begin += rank
        self.own, self.columns = own, columns
        self.live = torch.arange(largest) < torch.tensor(site.ranks)[:, None]

    def product(self, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        padded = b[self.own] * self.live[:, :, None]
        if self.site.layout.shared:
            return h.expand(len(padded), -1, -1) @ padded
        return h.T[self.columns].transpose(1, 2) @ padded


class TorchGrouped(_Heads):
    """`torch.nn.functional.grouped_mm` over the ragged segments of H; only for units with rows of their own."""

    def __init__(self, site: Site, dropout: float) -> None:
        super().__init__(site, dropout)
        self.ends = torch.tensor(site.ranks, dtype=torch.int32).cumsum(0).to(torch.int32)
        more = -len(self.a) % 8  # rows of H must be multiples of 16 bytes
        self.a, self.b = (nn.Parameter(F.pad(t.detach(), (0, 0, 0, more))) for t in (self.a, self.b))

    def product(self, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = getattr(F, "grouped_mm")(h, b, offs=self.ends)  # noqa: B009 - not in every torch
        return out


def fold(site: Site, a: torch.Tensor, b: torch.Tensor) -> Gradients:
    """Return what belongs to rank-major factors [rows, width] as zero-padded [hidden, K] and [hidden, N]."""
    layout, ranks = site.layout, site.ranks
    hidden = max(ranks) if layout.shared else sum(ranks)
    wide_a, wide_b = torch.zeros(hidden, layout.in_features), torch.zeros(hidden, layout.out_features)
    begin = 0
    for (a_rows, b_rows, in_cols, out_cols), rank in zip(unit_slices(layout, ranks), ranks, strict=True):
        rows = slice(0, rank) if layout.shared else slice(begin, begin + rank)
        wide_a[rows, in_cols], wide_b[rows, out_cols] = a[a_rows].float(), b[b_rows].float()
        begin += rank
    return wide_a, wide_b


def frozen_linear(site: Site) -> nn.Linear:
    """Return the base layer of a site, on the site's own weight."""
    base = nn.Linear(site.layout.in_features, site.layout.out_features, bias=False, device="meta")
    base.weight = nn.Parameter(site.weight, requires_grad=False)
    return base


def ours_layer(site: Site, dropout: float = 0.0) -> LoraLinear:
    """Return the site as our layer, with the site's ranks and values."""
    layer = LoraLinear(frozen_linear(site), site.layout, max(site.ranks), 1.0, lora_dropout=dropout)
    layer.lora_A, layer.lora_B = nn.Parameter(site.lora_A.clone()), nn.Parameter(site.lora_B.clone())
    layer.set_ranks(site.ranks)
    return layer


LINEARS: Mapping[str, Callable[[Site, float], Composition]] = {
    "base": Base,
    "ours": Ours,
    "peft": Peft,
    "torch-padded": TorchPadded,
    "torch-loop": TorchLoop,
    "torch-bmm": TorchBmm,
    "torch-grouped_mm": TorchGrouped,
}


def _reference(made: Composition, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return (y, dx, dA, dB) in float64, the gradients folded."""
    a, b = (t.double().requires_grad_() for t in made.folded(made.site.lora_A, made.site.lora_B))
    wide = x.double().requires_grad_()
    y = made.equation(wide, a, b)
    return (y.detach(), *torch.autograd.grad(y, (wide, a, b), dy.double()))


def check(name: str, composition: Composition, x: torch.Tensor, dy: torch.Tensor) -> float:
    """Return the largest error of y, dx and the gradients against float64, relative to the largest value.

    Raises:
        InputError: it is beyond what the dtype explains.
    """
    site = composition.site
    leaf = x.clone().requires_grad_()
    y = composition(leaf)
    y.backward(dy)
    own = [torch.ones_like(site.lora_A), torch.ones_like(site.lora_B)]
    masks = [torch.ones(()), torch.ones(()), *composition.folded(*own)]
    results = [y.detach(), leaf.grad, *composition.folded_gradients()]
    bound = {torch.float32: 1e-4, torch.bfloat16: 4e-2}[x.dtype]
    worst = 0.0
    for got, wanted, mask in zip(results, _reference(composition, x, dy), masks, strict=True):
        assert got is not None
        error = ((got.double() - wanted) * mask).abs().max() / (wanted * mask).abs().max()
        worst = max(worst, float(error))
    if not worst <= bound:
        raise InputError(f"bench: {name} must agree with float64 to {bound:g}, got a relative error of {worst:.2g}")
    return worst
