"""Every native op in plain torch: the specification, the test oracle and the fall-back.

Works in the dtype of its inputs; tests call it in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ardlora_ext.native.units import UnitLayout


def unit_slices(layout: UnitLayout, ranks: Sequence[int]) -> list[tuple[slice, slice, slice, slice]]:
    """Return (rows of A, rows of B, input columns, output columns) of each unit."""
    out = []
    begin = 0
    for u, r in enumerate(ranks):
        own = slice(begin, begin + r)
        common = slice(0, r)
        begin += r
        a_rows = common if layout.shared and not layout.gate_on_a else own
        b_rows = common if layout.gate_on_a else own
        in_cols = slice(u * layout.a_width, (u + 1) * layout.a_width) if layout.kind == "in_heads" else slice(None)
        out_cols = slice(u * layout.b_width, (u + 1) * layout.b_width) if layout.kind == "out_heads" else slice(None)
        out.append((a_rows, b_rows, in_cols, out_cols))
    return out


def lora_delta(
    layout: UnitLayout,
    ranks: Sequence[int],
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Return the dense update scaling * sum_u B_u^T diag(g_u) A_u, shape [out_features, in_features].

    Of experts [units, out_features, in_features], each its own.
    """
    stacked = layout.kind == "experts"
    delta = lora_A.new_zeros(layout.units if stacked else 1, layout.out_features, layout.in_features)
    begin = 0
    for u, ((a_rows, b_rows, in_cols, out_cols), r) in enumerate(zip(unit_slices(layout, ranks), ranks, strict=True)):
        b = lora_B[b_rows]
        if gate is not None:
            b = b * gate[begin : begin + r, None].to(b.dtype)
        delta[u if stacked else 0, out_cols, in_cols] += scaling * b.T @ lora_A[a_rows]
        begin += r
    return delta if stacked else delta[0]


def lora_linear(
    layout: UnitLayout,
    ranks: Sequence[int],
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Return the adapter's output [M, out_features] for x [M, in_features], unit by unit, without the dense update."""
    out = x.new_zeros(x.shape[0], layout.out_features)
    begin = 0
    for (a_rows, b_rows, in_cols, out_cols), r in zip(unit_slices(layout, ranks), ranks, strict=True):
        h = x[:, in_cols] @ lora_A[a_rows].T
        if gate is not None:
            h = h * gate[begin : begin + r].to(h.dtype)
        out[:, out_cols] = out[:, out_cols] + scaling * (h @ lora_B[b_rows])
        begin += r
    return out


def lora_grouped(
    layout: UnitLayout,
    ranks: Sequence[int],
    x: torch.Tensor,
    offsets: Sequence[int],
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gate: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Return the adapters' output [M, out_features] for rows of x [M, in_features] sorted by expert.

    Expert e has rows [offsets[e], offsets[e + 1]); rows past the last offset belong to none and get zeros.
    """
    out = [x.new_zeros(0, layout.out_features)]
    begin = 0
    for (a_rows, b_rows, _, _), r, first, last in zip(
        unit_slices(layout, ranks), ranks, offsets[:-1], offsets[1:], strict=True
    ):
        h = x[first:last] @ lora_A[a_rows].T
        if gate is not None:
            h = h * gate[begin : begin + r].to(h.dtype)
        out.append(scaling * (h @ lora_B[b_rows]))
        begin += r
    return torch.cat([*out, x.new_zeros(len(x) - offsets[-1], layout.out_features)])


def philox(seed: int, counter: tuple[int, int, int, int], rounds: int = 7) -> tuple[int, int, int, int]:
    """Return four 32-bit words of Philox4x32 (Salmon et al., SC 2011)."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return c0, c1, c2, c3


def dropout_factors(p: float, seed: int, rows: int | Sequence[int], cols: int) -> torch.Tensor:
    """Return what dropout multiplies x [rows, cols] with: 0 or 1 / (1 - p), p in steps of 1/65536.

    `rows` may be each row's number in the counter instead: rows that come sorted keep the masks of their tokens.
    """
    threshold = math.floor(p * 65536.0 + 0.5)
    places = range(rows) if isinstance(rows, int) else rows
    out = torch.empty(len(places), cols, dtype=torch.float64)
    for m, place in enumerate(places):
        lanes = [philox(seed, (lane, place, 0, 0)) for lane in range(16 * math.ceil(cols / 128))]
        for n in range(cols):
            word = lanes[n // 128 * 16 + n % 16][n % 128 // 32]
            bits = word >> 16 if n // 16 % 2 else word & 0xFFFF
            out[m, n] = 0.0 if bits < threshold else 65536.0 / (65536.0 - threshold)
    return out


def row_dots(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Return <weight_i, grad_i> for each row, shape [rows]."""
    return (weight * grad).sum(dim=1)


def importance_step(
    weight: torch.Tensor,
    grad: torch.Tensor,
    sensitivity: torch.Tensor,
    uncertainty: torch.Tensor,
    beta1: float,
    beta2: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next running means of I = |w dL/dw| and of |I - its mean| (AdaLoRA); the latter sees the new mean."""
    entry = (weight * grad).abs()
    sensitivity = beta1 * sensitivity + (1.0 - beta1) * entry
    return sensitivity, beta2 * uncertainty + (1.0 - beta2) * (entry - sensitivity).abs()


def orthogonal_rows(rows: torch.Tensor, new: Sequence[int], norm: float) -> torch.Tensor:
    """Return `rows` [count, width] with those in `new` orthogonal to the others and to each other, of norm `norm`."""
    out, old = rows.clone(), [i for i in range(len(rows)) if i not in new]
    q, r = torch.linalg.qr(torch.cat([rows[old], rows[list(new)]]).T)
    out[list(new)] = norm * (q * r.diagonal().sign()).T[len(old) :]
    return out


def rank_resize(buffer: torch.Tensor, index: Sequence[int]) -> torch.Tensor:
    """Return the rows `index` of `buffer`; -1 gives a row of zeros."""
    out = buffer.new_zeros(len(index), *buffer.shape[1:])
    for i, source in enumerate(index):
        if source >= 0:
            out[i] = buffer[source]
    return out


def secant_slopes(
    dots: Sequence[torch.Tensor], rho: torch.Tensor, spectrum: torch.Tensor, fisher: torch.Tensor, ema: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each unit's -sqrt(fisher * share of its boundary component) and its next Fisher information.

    Args:
        dots: <dL/dW_i, W_i> of the live components of each unit.
        rho: [units] soft ranks; the boundary component is the floor, at most the last live one.
        spectrum: [units, width] squared singular values.
        fisher: [units] running means of the squared sums of dots.
        ema: of them.
    """
    fisher = ema * fisher + (1.0 - ema) * torch.stack([d.sum() for d in dots]) ** 2
    last = torch.tensor([min(len(d), spectrum.shape[1]) - 1 for d in dots])
    boundary = spectrum.gather(1, torch.minimum(rho.long().clamp(min=0), last)[:, None])[:, 0]
    total = spectrum.sum(dim=1)
    return -torch.sqrt(fisher * torch.where(total > 0, boundary / total, 0.0)), fisher


def unit_costs(
    own: torch.Tensor, common: torch.Tensor, module_of: torch.Tensor, ranks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the parameters at `ranks` [units] and the cost of each unit's next component.

    A row that the units of a module share [modules] is there for the largest rank; (r_u / max r)^8 says who pays it.
    """
    each = [ranks[module_of == m] for m in range(len(common))]
    largest = torch.stack([r.max() for r in each])
    reach = [(r / r.max().clamp(min=1e-300)) ** 8 for r in each]
    shares = [w / w.sum().clamp(min=1e-300) * c for w, c in zip(reach, common, strict=True)]
    marginal = own.clone()
    for m, share in enumerate(shares):
        marginal[module_of == m] += share
    return own @ ranks + common @ largest, marginal


def prox_step(
    alpha: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    step: float,
    price: float,
    tv: float,
) -> torch.Tensor:
    """Return argmin_a grad*a + price*weight*|a| + price*tv/2 (a - alpha)^2 + (a - alpha)^2 / (2 step), in [lo, hi]."""
    damped = step / (1.0 + step * price * tv)
    moved = alpha - damped * grad
    shrunk = torch.sign(moved) * torch.clamp(moved.abs() - damped * price * weight, min=0.0)
    return torch.minimum(torch.maximum(shrunk, lo), hi)


def gates(kind: str, rho: float, count: int, floor: float, width: float = 1.0) -> torch.Tensor:
    """Return the gates [count] of a unit with soft rank rho, component 0 open.

    `ramp`: 1 up to floor(rho), the rest (at least `floor`), then the look-ahead. `ste`: 1 for the first round(rho).
    `sigmoid`: sigma((rho - j - 1/2) / width). `scale`: rho / width for the first round(rho).
    """
    j = torch.arange(count, dtype=torch.float64)
    d = rho - j
    inside = j < math.floor(rho + 0.5)
    if kind == "scale":
        return torch.where(inside | (j == 0), torch.full_like(d, rho / width), torch.full_like(d, floor))
    if kind == "ste":
        gate = torch.where(inside, torch.ones_like(d), torch.full_like(d, floor))
    elif kind == "sigmoid":
        gate = torch.sigmoid((d - 0.5) / width)
    else:
        ahead = torch.clamp(floor * (1.0 + d), min=0.0)
        gate = torch.where(d >= 0, torch.clamp(d, min=floor, max=1.0), ahead)
    gate[:1] = 1.0
    return gate
