"""Stages that compare numbers: a smoke test, float64 at real shapes, and bits that must repeat."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ardlora_ext.bench.gpu.context import Context, overlapping
from ardlora_ext.bench.gpu.shapes import REAL, SMALL, Call, Shape, make
from ardlora_ext.bench.machine import Json
from ardlora_ext.native import reference

# Of the norm and of the largest entry: factors and H are rounded to the dtype of x on their way (three tf32 products
# for float32).
_BOUNDS = {"float32": (2e-6, 2e-5), "float16": (1.5e-3, 1e-2), "bfloat16": (1e-2, 6e-2)}
_NAMES = ("y", "dx", "dA", "dB", "dgate")


def _reference(call: Call) -> list[torch.Tensor]:
    """Return what `Call.run` does, in float64 by torch's own operations."""
    shape = call.shape
    leaves = [t.detach().double().requires_grad_() for t in (call.x, *call.factors, call.gate)]
    x, a, b, gate = leaves
    if shape.dropout:
        kept = reference.dropout_factors(shape.dropout, 11, shape.rows, shape.in_features)
        x = x * kept.to(x)
    y = reference.lora_linear(shape.layout, list(shape.ranks), x, a, b, gate, 0.5)
    y.backward(call.dy.double())  # type: ignore[no-untyped-call]
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _row(shape: Shape, context: Context) -> Json:
    call = make(shape, context.device)
    with context.kernels():
        got = call.run()
    of_norm, of_entry = _BOUNDS[shape.dtype]
    worst, ok = 0.0, True
    for name, ours, theirs in zip(_NAMES, got, _reference(call), strict=True):
        difference = ours.double() - theirs
        norm = float(difference.norm() / theirs.norm())
        entry = float(difference.abs().max() / theirs.abs().max())
        worst = max(worst, norm)
        if not (norm <= of_norm and entry <= of_entry):
            return {"case": f"{shape}: {name}", "ok": False, "error": norm, "largest": entry}
    return {"case": str(shape), "ok": ok, "error": worst}


def smoke(context: Context) -> Iterator[Json]:
    """One call of each type, as small as it gets."""
    for dtype in ("float32", "bfloat16", "float16"):
        yield _row(Shape(40, 64, 72, (5,), dtype=dtype), context)


def precise(context: Context) -> Iterator[Json]:
    """Real shapes against float64."""
    for shape in SMALL if context.dry else REAL:
        yield _row(shape, context)


def repeated(context: Context) -> Iterator[Json]:
    """Two runs give the same bits, on a stream of their own and with launches that overlap, too."""
    for shape in SMALL[:2] if context.dry else (REAL[2], REAL[6], REAL[9], *REAL[-6:]):
        call = make(shape, context.device)
        with context.kernels():
            first = [t.clone() for t in call.run()]
            second = [t.clone() for t in call.run()]
            third = second if context.dry else _aside(call)
            with overlapping():
                fourth = [t.clone() for _ in range(5) for t in call.run()][-len(first) :]
        others = {"again": second, "aside": third, "overlapping": fourth}
        wrong = [name for name, found in others.items() if not all(map(torch.equal, first, found))]
        yield {"case": str(shape), "ok": not wrong, "other bits": ", ".join(wrong)}


def _aside(call: Call) -> list[torch.Tensor]:
    """Run on a side stream, while the allocator hands out memory on the other."""
    side, here = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(5):
            found = [t.clone() for t in call.run()]
    for _ in range(20):
        torch.empty_like(call.x).fill_(float("nan"))
    here.wait_stream(side)
    return found
