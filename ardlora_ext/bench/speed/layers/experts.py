"""A stack of experts in every way we know: this package, PEFT, and what can be composed from torch's own operators.

Rows come sorted by expert, as transformers' experts get them. PEFT's `target_parameters` forms the dense update of all
experts. What others do that keep the factors apart is `torch-grouped_mm`: stacked factors of one rank, two more grouped
products; `torch-loop` is one expert after the other at its own rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ardlora_ext.bench.speed.layers.compositions import Composition, Gradients
from ardlora_ext.bench.speed.layers.patterns import Site
from ardlora_ext.layers.experts import ExpertStack, LoraExperts, fold_stack


def _grouped_mm(x: torch.Tensor, stack: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = getattr(F, "grouped_mm")(x, stack, offs=ends)  # noqa: B009 - not in every torch
    return out


class _Module(nn.Module):
    """The experts module: one stack [experts, out, in], and rows sorted by expert."""

    ends: torch.Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.num_experts = site.layout.units
        self.weight = nn.Parameter(site.weight, requires_grad=False)
        self.register_buffer("ends", torch.tensor(site.counts).cumsum(0).to(torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _grouped_mm(x, self.weight.mT, self.ends)


class ExpertComposition(Composition):
    """An adapted stack; gradients are compared as those of factors [experts, largest rank, .]."""

    def folded(self, a: torch.Tensor, b: torch.Tensor) -> Gradients:
        wide_a, wide_b = fold_stack(self.site.layout, self.site.ranks, a, b, None, 1.0)
        return wide_a, wide_b.mT

    def equation(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        weight, parts = self.site.weight.to(x.dtype), torch.split(x, list(self.site.counts))
        return torch.cat([p @ weight[e].T + (p @ a[e].T) @ b[e] for e, p in enumerate(parts)])


class Base(ExpertComposition):
    """The frozen stack alone."""

    def __init__(self, site: Site, dropout: float) -> None:
        super().__init__(site, dropout)
        self.module = _Module(site)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.module(x)
        return out


class Ours(ExpertComposition):
    """`LoraExperts`."""

    def __init__(self, site: Site, dropout: float) -> None:
        super().__init__(site, dropout)
        module = _Module(site)
        options: Any = {"parameter": "weight", "transposed": False, "lora_dropout": dropout}
        self.stack = ExpertStack(module, site.layout, max(site.ranks), 1.0, **options)
        self.stack.lora_A, self.stack.lora_B = nn.Parameter(site.lora_A.clone()), nn.Parameter(site.lora_B.clone())
        self.stack.set_ranks(site.ranks)
        self.module = LoraExperts(module, [self.stack])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.module(x)
        return out

    def folded_gradients(self) -> Gradients:
        a, b = self.stack.lora_A.grad, self.stack.lora_B.grad
        assert a is not None
        assert b is not None
        return self.folded(a, b)


class Peft(ExpertComposition):
    """PEFT's `target_parameters`, with factors padded to one rank; PEFT knows no dropout there."""

    def __init__(self, site: Site, dropout: float) -> None:
        super().__init__(site, dropout)
        import peft

        root = nn.Module()
        root.experts = _Module(site)
        a, b = self.folded(site.lora_A, site.lora_B)
        self.shape = a.shape
        rank = a.shape[1]
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=["experts.weight"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped: Any = peft.get_peft_model(root, config)
        self.layer = wrapped.base_model.model.experts
        self.lora_A = self.layer.lora_A["default"].weight  # [experts r, in], the expert slowest
        self.lora_B = self.layer.lora_B["default"].weight  # [out, r experts], the expert fastest
        with torch.no_grad():
            self.lora_A.copy_(a.flatten(0, 1))
            self.lora_B.copy_(b.permute(2, 1, 0).flatten(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out

    def folded_gradients(self) -> Gradients:
        experts, rank, _ = self.shape
        return self.lora_A.grad.view(self.shape), self.lora_B.grad.view(-1, rank, experts).permute(2, 1, 0)


class TorchGrouped(ExpertComposition):
    """Two more grouped products, of stacked factors of one rank."""

    def __init__(self, site: Site, dropout: float) -> None:
        super().__init__(site, dropout)
        self.module = _Module(site)
        more = -max(site.ranks) % 8  # rows must be multiples of 16 bytes
        a, b = (F.pad(t, (0, 0, 0, more)) for t in self.folded(site.lora_A, site.lora_B))
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        masked = F.dropout(x, self.p, self.training) if self.p > 0.0 else x
        ends = self.module.ends
        h = _grouped_mm(masked, self.a.to(x.dtype).mT, ends)
        y: torch.Tensor = self.module(x)
        return y.add_(_grouped_mm(h, self.b.to(x.dtype), ends))

    def folded_gradients(self) -> Gradients:
        assert self.a.grad is not None
        assert self.b.grad is not None
        rank = max(self.site.ranks)
        return self.a.grad[:, :rank], self.b.grad[:, :rank]


class _Loop(torch.autograd.Function):
    """Experts one after the other by `addmm_` into their rows of y and dx."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, module: _Module, a: torch.Tensor, b: torch.Tensor, site: Site, p: float
    ) -> torch.Tensor:
        keep = torch.empty_like(x).bernoulli_(1.0 - p).div_(1.0 - p) if p > 0.0 else None
        source: torch.Tensor = x if keep is None else x * keep
        y: torch.Tensor = module(x)
        a, b = a.to(x.dtype), b.to(x.dtype)
        hidden = []
        for rows, own in _parts(site):
            hidden.append(source[rows] @ a[own].T)
            y[rows].addmm_(hidden[-1], b[own])
        ctx.save_for_backward(x, a, b, keep, *hidden)
        ctx.module, ctx.site = module, site
        return y

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grad
        x, a, b, keep, *hidden = ctx.saved_tensors
        source = x if keep is None else x * keep
        dx = _grouped_mm(dy, ctx.module.weight, ctx.module.ends)
        into = dx if keep is None else torch.zeros_like(dx)
        d_a, d_b = torch.zeros_like(a), torch.zeros_like(b)
        for h, (rows, own) in zip(hidden, _parts(ctx.site), strict=True):
            d_h = dy[rows] @ b[own].T
            torch.mm(h.T, dy[rows], out=d_b[own])
            torch.mm(d_h.T, source[rows], out=d_a[own])
            into[rows].addmm_(d_h, a[own])
        if keep is not None:
            dx.addcmul_(into, keep)
        return dx, None, d_a.float(), d_b.float(), None, None


def _parts(site: Site) -> list[tuple[slice, slice]]:
    """Return the rows of the activations and of the factors of all experts that have both."""
    found, row, begin = [], 0, 0
    for count, rank in zip(site.counts, site.ranks, strict=True):
        if count and rank:
            found.append((slice(row, row + count), slice(begin, begin + rank)))
        row, begin = row + count, begin + rank
    return found


class TorchLoop(ExpertComposition):
    """Expert by expert, without padding."""

    def __init__(self, site: Site, dropout: float) -> None:
        super().__init__(site, dropout)
        self.module = _Module(site)
        self.a, self.b = nn.Parameter(site.lora_A.clone()), nn.Parameter(site.lora_B.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.p if self.training else 0.0
        out: torch.Tensor = _Loop.apply(  # type: ignore[no-untyped-call]
            x, self.module, self.a, self.b, self.site, p
        )
        return out

    def folded_gradients(self) -> Gradients:
        assert self.a.grad is not None
        assert self.b.grad is not None
        return self.folded(self.a.grad, self.b.grad)


EXPERTS: Mapping[str, Callable[[Site, float], Composition]] = {
    "base": Base,
    "ours": Ours,
    "peft": Peft,
    "torch-grouped_mm": TorchGrouped,
    "torch-loop": TorchLoop,
}
