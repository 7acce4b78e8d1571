"""Best factors of lower rank, and the matrices by which optimizer state turns with them.

Notation, for the units u that use one common factor (one unit, unless `factoring="shared"`): common rows C [R, .], own
rows O_u [r_u, .], gates g_u; the update of unit u is M_u = O_u^T diag(g_u) C[:r_u] (or its transpose).

**Factors.** With C^T = Q R_C, O_u^T = Q_u R_u (QR), M_u is held by the small core K_u = R_u diag(g_u) R_C[:, :r_u]^T.
New components are orthonormal directions W [R, R'] in the span of C: unit u keeps M_u Q W W^T Q^T with the first r'_u
columns of W. Its change is least when sum_u ||K_u W[:, :r'_u]||^2 is largest. One unit, or equal ranks: W are the top
right singular vectors of the stacked cores, the exact optimum (Eckart-Young). Unequal ranks in one basis have no closed
form; see `best_basis`. Then, with c the typical norm of a row of C, so that factors keep their scales:

    C' = c W^T Q^T = T C,                              T = c W^T R_C^-T
    O_u' = (K_u W)^T Q_u^T / c = D diag(g_u) O_u,      D = W^T R_C / c,      g' = 1

**Moments.** Let G_u = dL/dM_u. Gradients of factors are dC = sum_u diag(g_u) O_u G_u and dO_u = diag(g_u) C G_u^T, so

    dC' = sum_u O_u' G_u = D dC                     dO_u' = C' G_u^T = T diag(g_u)^-1 dO_u

C turns by T, its gradient by D, and T^T D -> 1 where nothing is dropped: the contravariant pair. For rows of C of equal
norm and orthogonal, both are the rotation W^T. First moments (linear in gradients) turn by D and T exactly; where some
heads stop using a component, dC' still holds their share. Second moments are carried by the squares of the
coefficients, E[(sum d_i x_i)^2] = sum d_i^2 E[x_i^2] for uncorrelated x_i.

**Trained gates** (P Lambda Q form): c = 1, O_u' gets rows of norm 1 and their norms n become the gates. So dC' = D dC
as before, dO_u' = diag(n) T diag(g_u)^-1 dO_u, and d(g')_j = O'_j G C'_j^T is carried by its diagonal terms, the sum
over i of D_ji T_ji g_i d(g)_i / n_j.

**Metric of the loss.** R_C and R_u enter by their Grams alone: R_C^T R_C = C C^T and R_u^T R_u = O_u O_u^T, which say
how large M_u is. With the second moments P of h = C x and Q_u of k = O_u dy in their place (`loss_metric`), cores say
what M_u is worth to the loss, and the same equations keep what costs least to second order; the optimum over all
matrices of the rank lies in the span of the present factors. Rows of C' then are orthonormal for the inputs; they are
made orthonormal plainly, C' = L Z with L lower triangular (a unit uses the first rows): T' = c L^-1 T,
D' = L^T D / c.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.native import reference

_REFINEMENTS = 50
_NOISE = 1e-7  # of the largest singular value: rounding of float32 factors


@dataclass(frozen=True)
class Group:
    """Units of one layer that use one common factor, in float64.

    Attributes:
        units: their indices in the layer.
        common: [R, .] rows they share, R the largest of their ranks.
        own: by unit [r_u, .].
        gate: by unit [r_u].
    """

    units: list[int]
    common: torch.Tensor
    own: list[torch.Tensor]
    gate: list[torch.Tensor]


@dataclass(frozen=True)
class Metric:
    """Second moments of a group's hidden activations.

    Attributes:
        common: P [R, R].
        own: Q_u [r_u, r_u] by unit.
        damping: share of the plain Gram matrices that is mixed in, at equal traces.
    """

    common: torch.Tensor
    own: list[torch.Tensor]
    damping: float


@dataclass(frozen=True)
class Recompressed:
    """New rows of a group and the matrices by which gradients turn; shapes as in the module's notation."""

    common: torch.Tensor  # [R', .]
    own: list[torch.Tensor]  # by unit [r'_u, .]
    gate: list[torch.Tensor]  # by unit [r'_u]
    turn_common: torch.Tensor  # [R', R]
    turn_own: list[torch.Tensor]  # by unit [r'_u, r_u]
    turn_gate: list[torch.Tensor]  # by unit [r'_u, r_u]
    common_map: torch.Tensor  # [R', R], common' = common_map common
    own_map: list[torch.Tensor]  # by unit [r'_u, r_u], own' = own_map own
    lost: float  # sum_u ||M_u - M_u'||^2


def factor_names(layer: LoraLinear) -> tuple[str, str]:
    """Return the names of the common and the own factor of a layer's units; gates act on the own one."""
    return ("lora_B", "lora_A") if layer.layout.gate_on_a else ("lora_A", "lora_B")


def check_finite(name: str, layer: LoraLinear) -> None:
    """Check that the factors hold numbers; no SVD says so in words.

    Raises:
        ValueError: they do not.
    """
    if not all(bool(torch.isfinite(p).all()) for p in layer.factors.values()):
        raise ValueError(
            f"rank change: adapters must be finite, got NaN or Inf in '{name}'; a loss or gradient was not finite at "
            "an earlier step"
        )


def groups(layer: LoraLinear) -> list[Group]:
    """Return the layer's units by the common factor they use."""
    names = factor_names(layer)
    common, own = (getattr(layer, name).detach().double() for name in names)
    order = (1, 0) if layer.layout.gate_on_a else (0, 1)
    slices = [tuple(s[i] for i in order) for s in reference.unit_slices(layer.layout, layer.ranks)]
    ends = list(itertools.accumulate(layer.ranks))
    gates = common.new_ones(sum(layer.ranks))
    if layer.gate is not None:
        gates = layer.gate.detach().double()
    gate = [gates[end - r : end] for end, r in zip(ends, layer.ranks, strict=True)]
    every = range(layer.layout.units)
    members = [list(every)] if layer.layout.shared else [[u] for u in every]
    return [
        Group(
            units,
            common[slices[units[0]][0]] if len(units) == 1 else common[: max(layer.ranks)],
            [own[slices[u][1]] for u in units],
            [gate[u] for u in units],
        )
        for units in members
    ]


def _qr(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (Q, R) with rows^T = Q R."""
    q, r = torch.linalg.qr(rows.T)
    return q, r


def _root(rows: torch.Tensor, moment: torch.Tensor | None, damping: float) -> torch.Tensor:
    """Return R with R^T R = rows rows^T, or the damped `moment` in its place."""
    if moment is None:
        return _qr(rows)[1]
    plain = rows @ rows.T
    size = float(plain.diagonal().sum())
    if size > 0.0:
        moment = moment + plain * (damping * float(moment.diagonal().sum()) / size)
    values, vectors = torch.linalg.eigh(moment)
    root: torch.Tensor = values.clamp(min=0.0).sqrt()[:, None] * vectors.T
    return root


def cores(group: Group, metric: Metric | None = None) -> list[torch.Tensor]:
    """Return K_u of each unit, rank-sized [min(r_u, .), R].

    Orthogonally equivalent to its update, or in the metric of the loss to sqrt(Q_u) X sqrt(P).
    """
    moments = [None] * len(group.own) if metric is None else metric.own
    damping = 0.0 if metric is None else metric.damping
    r_common = common_root(group, metric)
    return [
        (_root(own, moment, damping) * gate) @ r_common[:, : len(own)].T
        for own, gate, moment in zip(group.own, group.gate, moments, strict=True)
    ]


def common_root(group: Group, metric: Metric | None) -> torch.Tensor:
    """Return R_C [., R]."""
    if metric is None:
        return _root(group.common, None, 0.0)
    return _root(group.common, metric.common, metric.damping)


def top_directions(stack: Sequence[torch.Tensor], width: int, like: torch.Tensor) -> torch.Tensor:
    """Return all right singular vectors of the stacked cores as columns [width, width], the largest first.

    Args:
        stack: cores [any, width]; there may be none.
        width: of the cores.
        like: any tensor of their device and dtype.
    """
    stacked = torch.cat([*stack, like.new_zeros(1, width)])
    vh: torch.Tensor = torch.linalg.svd(torch.linalg.qr(stacked).R, full_matrices=True).Vh
    return vh.T


def _first_rows(count: int, rows: torch.Tensor) -> torch.Tensor:
    """Return the matrix [count, R] that takes the first of `rows` [R, any]."""
    return torch.eye(count, len(rows), dtype=rows.dtype, device=rows.device)


def _forward(stack: Sequence[torch.Tensor], ranks: Sequence[int], common: torch.Tensor) -> torch.Tensor:
    """Choose directions from the first level on: each the best for the units that use it."""
    free = _first_rows(len(common), common)
    chosen = []
    for low, high in itertools.pairwise([0, *sorted(set(ranks) - {0})]):
        users = [core @ free for core, r in zip(stack, ranks, strict=True) if r >= high]
        turn = top_directions(users, free.shape[1], free)
        chosen.append(free @ turn[:, : high - low])
        free = free @ turn[:, high - low :]
    return torch.cat(chosen, dim=1)


def _backward(stack: Sequence[torch.Tensor], ranks: Sequence[int], common: torch.Tensor) -> torch.Tensor:
    """Choose directions from the last level on: each the one that matters least to the units that do not use it."""
    free = _first_rows(len(common), common)
    chosen: list[torch.Tensor] = []
    levels = sorted({0, *ranks, len(common)}, reverse=True)
    for high, low in itertools.pairwise(levels):
        others = [core @ free for core, r in zip(stack, ranks, strict=True) if r < high]
        turn = top_directions(others, free.shape[1], free)
        chosen.insert(0, free @ turn[:, low:])
        free = free @ turn[:, :low]
    return torch.cat(chosen, dim=1)[:, : max(ranks)]


def _refined(basis: torch.Tensor, stack: Sequence[torch.Tensor], ranks: Sequence[int]) -> torch.Tensor:
    """Take polar steps from `basis` until they gain nothing."""
    before = -1.0
    for _ in range(_REFINEMENTS):
        slope = torch.zeros_like(basis)
        kept = 0.0
        for core, r in zip(stack, ranks, strict=True):
            image = core @ basis[:, :r]
            kept += float(image.square().sum())
            slope[:, :r] += core.T @ image
        if kept <= before * (1.0 + 1e-9):
            break
        before = kept
        u, _, vh = torch.linalg.svd(slope, full_matrices=False)
        basis = u @ vh
    return basis


def best_basis(
    group: Group, stack: Sequence[torch.Tensor], ranks: Sequence[int], metric: Metric | None = None
) -> torch.Tensor:
    """Return orthonormal columns W [R, max rank] that keep most of sum_u ||K_u W[:, :r'_u]||^2.

    Equal ranks (or one unit): the exact optimum. Unequal ranks: from each of five starts (all units' top directions;
    greedy from the first and from the last level; the spans of the first components and of those with most energy)
    polar steps W <- polar(sum_u K_u^T K_u W[:, :r'_u]), which never lower the objective because it is convex in W; then
    the best. So the result is never worse than dropping components in their order, or the least in energy first.
    """
    width, most = len(group.common), max(ranks)
    everything = top_directions(stack, width, group.common)[:, :most]
    if len(set(ranks)) == 1:
        return everything

    def kept(basis: torch.Tensor) -> float:
        return sum(float((k @ basis[:, :r]).square().sum()) for k, r in zip(stack, ranks, strict=True))

    energy = group.common.new_zeros(width)
    for own, gate in zip(group.own, group.gate, strict=True):
        energy[: len(own)] += (gate[:, None] * own).square().sum(1)
    order = torch.argsort(energy * group.common.square().sum(1), descending=True, stable=True)
    r_common = common_root(group, metric)
    spans = [torch.linalg.qr(r_common[:, o]).Q[:, :most] for o in (slice(None), order)]
    starts = [everything, _forward(stack, ranks, group.common), _backward(stack, ranks, group.common), *spans]
    best: torch.Tensor = max((_refined(start, stack, ranks) for start in starts), key=kept)
    return best


def _first(group: Group, ranks: Sequence[int]) -> Recompressed:
    """Keep the first components as they are."""
    turns = [_first_rows(r, own) for own, r in zip(group.own, ranks, strict=True)]
    common = _first_rows(max(ranks), group.common)
    own = [rows[:r] for rows, r in zip(group.own, ranks, strict=True)]
    gate = [values[:r] for values, r in zip(group.gate, ranks, strict=True)]
    lost = sum(float(core.square().sum()) for core, r in zip(cores(group), ranks, strict=True) if r == 0)
    return Recompressed(group.common[: max(ranks)], own, gate, common, turns, turns, common, turns, lost)


def recompress(
    group: Group, ranks: Sequence[int], trained_gate: bool = False, metric: Metric | None = None
) -> Recompressed:
    """Return the factors of these ranks nearest to the present update, by the module's equations.

    Units whose update is zero, and groups whose ranks stay, keep their first components bit for bit.

    Args:
        group: the present factors.
        ranks: new rank of each unit, none above its present one.
        trained_gate: put singular values into the gates instead of folding gates into the factors.
        metric: what the loss says of the group; None: all changes of one size are worth the same.
    """
    stack = cores(group, metric)
    same = list(ranks) == [len(own) for own in group.own]
    if same or max(ranks) == 0 or not any(float(core.abs().max()) > 0 for core in stack if core.numel()):
        return _first(group, ranks)
    r_common = common_root(group, metric)
    basis = best_basis(group, stack, ranks, metric)
    scale = 1.0 if trained_gate else float(group.common.square().sum(1).mean().sqrt())
    turn = basis.T @ r_common / scale  # D
    back = scale * basis.T @ torch.linalg.pinv(r_common, rtol=_NOISE).T  # T
    lower = basis.new_zeros(0, 0)  # L, where rows are not orthonormal already
    if metric is not None:
        lower = torch.linalg.qr((back @ group.common).T).R.T / scale
        diagonal = lower.diagonal().abs()
        if lower.shape[0] != lower.shape[1] or float(diagonal.min()) <= _NOISE * float(diagonal.max()):
            lower = basis.new_zeros(0, 0)
    whole = turn
    if len(lower):
        whole, back = lower.T @ turn, torch.linalg.solve_triangular(lower, back, upper=False)
    own, gate, turn_own, turn_gate, own_map = [], [], [], [], []
    for rows, old_gate, r in zip(group.own, group.gate, ranks, strict=True):
        d, t = turn[:r, : len(rows)], back[:r, : len(rows)]
        if len(lower):
            d = lower[:r, :r].T @ d
        new = (d * old_gate) @ rows
        norm = new.new_ones(r)
        if trained_gate:
            new, norm = _normalised(new, rows)
        inverse = torch.where(old_gate == 0, 0.0, 1.0 / old_gate)
        own.append(new)
        gate.append(norm)
        own_map.append(torch.where(norm[:, None] == 0, 0.0, d * old_gate / norm[:, None]))
        turn_own.append(norm[:, None] * t * inverse)
        turn_gate.append(torch.where(norm[:, None] == 0, 0.0, d * t * old_gate / norm[:, None]))
    common = back @ group.common
    lost = _distance(group, common, own, gate)
    return Recompressed(common, own, gate, whole, turn_own, turn_gate, back, own_map, lost)


def _distance(group: Group, common: torch.Tensor, own: list[torch.Tensor], gate: list[torch.Tensor]) -> float:
    """Return sum_u ||M_u - M_u'||^2 from rank-sized products."""
    both = torch.cat([group.common, common])
    wide = both @ both.T
    total, first = 0.0, len(group.common)
    for rows, old_gate, new, norm in zip(group.own, group.gate, own, gate, strict=True):
        change = torch.cat([old_gate[:, None] * rows, -norm[:, None] * new])
        at = [*range(len(rows)), *range(first, first + len(new))]
        total += float(((change @ change.T) * wide[at][:, at]).sum())
    return max(0.0, total)


def _normalised(new: torch.Tensor, old: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of norm 1 and their norms; a row of zeros takes a present direction, so that its gate can learn."""
    norm = new.norm(dim=1)
    dead = norm <= _NOISE * norm.max() if len(norm) else norm > 0
    spare = old[: len(new)] / old[: len(new)].norm(dim=1, keepdim=True).clamp(min=1e-30)
    rows = torch.where(dead[:, None], spare, new / torch.where(dead, 1.0, norm)[:, None])
    return rows, torch.where(dead, 0.0, norm)
