"""One adapter from several, with PEFT's names and arithmetic: their weighted sum, exact or of a smaller rank."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from ardlora_ext.config import LoraConfig
from ardlora_ext.layers.dora import DoraLinear
from ardlora_ext.layers.experts import ExpertStack
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.inject import inject
from ardlora_ext.model.record import Injection, adapters, home, injection
from ardlora_ext.model.several.named import add_resting

Combination = Literal["svd", "linear", "cat"]
Factors = tuple[torch.Tensor, torch.Tensor]  # A [r, in_features], B [out_features, r]
_OP = "add_weighted_adapter"


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: Combination = "svd",
    svd_rank: int | None = None,
) -> None:
    """Add an adapter that is the weighted sum of others; it rests until `set_adapter`, and is plain LoRA.

    Args:
        model: a wrapped model.
        adapters: names of those to combine, of any method but DoRA. A layer that one of them lacks gets what the others
            have.
        weights: one for each, of either sign.
        adapter_name: not in use yet.
        combination_type: `cat` is the sum, its rank the sum of the ranks; `svd` the best approximation of the sum of
            rank `svd_rank`; `linear` adds up factors, a rough mixture of adapters of one rank. Default of PEFT.
        svd_rank: of `svd`; None: the largest rank among the adapters.

    Raises:
        ValueError: there is no such adapter, the name is in use, weights do not fit, `linear` meets different ranks, an
            adapter is DoRA's, or more than one of them keeps modules or rows of embeddings whole. Nothing has changed
            then.

    Example:
        ard.add_weighted_adapter(model, ["a", "b"], [0.7, 0.3], "both", "cat")
    """
    records = _records(model, adapters, weights, combination_type, svd_rank)
    parts = [_factors(model, record) for record in records]
    largest = max(len(a) for part in parts for a, _, _ in part.values())
    names = list(dict.fromkeys(name for part in parts for name in part))
    made: dict[str, Factors] = {}
    for name in names:
        held = [(w, *part[name]) for w, part in zip(weights, parts, strict=True) if name in part]
        found = _linear(name, held) if combination_type == "linear" or len(records) == 1 else _cat(held)
        limit = min(
            found[0].shape[1], len(found[1]), svd_rank or largest if combination_type == "svd" else len(found[0])
        )
        made[name] = _truncated(*found, limit) if limit < len(found[0]) else found
    keeping = next((r for r in records if r.modules_to_save or r.tokens), None)
    add_resting(model, _OP, adapter_name, lambda: _put_in(home(model), made, keeping, adapter_name))


def _records(
    model: nn.Module, names: Sequence[str], weights: Sequence[float], kind: str, svd_rank: int | None
) -> list[Injection]:
    named = injection(model).named
    if not names or len(names) != len(weights):
        raise ValueError(f"{_OP}: weights must be one for each adapter, got {len(weights)} for {list(names)}")
    if unknown := [name for name in names if name not in named]:
        raise ValueError(f"{_OP}: adapters must be of {list(named)}, got {unknown[0]!r}")
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"{_OP}: weights must be finite, got {list(weights)}")
    if kind not in ("svd", "linear", "cat"):
        raise ValueError(f"{_OP}: combination_type must be 'svd', 'linear' or 'cat', got {kind!r}")
    if svd_rank is not None and svd_rank < 1:
        raise ValueError(f"{_OP}: svd_rank must be >= 1, got {svd_rank}")
    records = [named[name] for name in names]
    for name, record in zip(names, records, strict=True):
        if any(isinstance(layer, DoraLinear) for layer in record.layers):
            raise ValueError(f"{_OP}: adapters must be sums of low rank, got {name!r}: DoRA rescales the base")
        if any(isinstance(layer, ExpertStack) for layer in record.layers):
            raise ValueError(f"{_OP}: adapters must be of linear layers, got experts in {name!r}; exclude them")
    if sum(bool(r.modules_to_save or r.tokens) for r in records) > 1:
        raise ValueError(
            f"{_OP}: at most one adapter must have modules_to_save or trainable_token_indices, got several"
        )
    return records


def _factors(model: nn.Module, record: Injection) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Return plain factors (A, B without scaling) and the scaling of every layer of an adapter, at rest or not."""
    part = home(model)
    places = {id(layer.base_layer): name for name, layer in adapters(part).items()}
    places = {id(m): name for name, m in part.named_modules() if id(m) not in places} | places
    found = {}
    for layer in record.layers:
        a, b = layer.fold()
        if len(a):
            found[places[id(layer.base_layer)]] = a, b / layer.scaling, layer.scaling
    return found


def _linear(name: str, held: Sequence[tuple[float, torch.Tensor, torch.Tensor, float]]) -> Factors:
    """Return sums of factors, each weighted by the root of its share, the sign on A's side, as PEFT does."""
    ranks = [len(a) for _, a, _, _ in held]
    if len(set(ranks)) > 1:
        raise ValueError(f"{_OP}: ranks must be the same for 'linear', got {ranks} in '{name}'; take 'cat' or 'svd'")
    roots = [math.copysign(math.sqrt(abs(w * s)), w * s) for w, _, _, s in held]
    a = torch.stack([root * a for root, (_, a, _, _) in zip(roots, held, strict=True)]).sum(0)
    b = torch.stack([abs(root) * b for root, (_, _, b, _) in zip(roots, held, strict=True)]).sum(0)
    return a, b


def _cat(held: Sequence[tuple[float, torch.Tensor, torch.Tensor, float]]) -> Factors:
    return torch.cat([w * s * a for w, a, _, s in held]), torch.cat([b for _, _, b, _ in held], dim=1)


def _truncated(a: torch.Tensor, b: torch.Tensor, rank: int) -> Factors:
    """Return the best factors of B A of this rank: QR of both, SVD of the small core."""
    (qa, ra), (qb, rb) = torch.linalg.qr(a.double().T), torch.linalg.qr(b.double())
    u, values, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return (vh[:rank] @ qa.T).float(), ((qb @ u[:, :rank]) * values[:rank]).float()


def _put_in(model: nn.Module, made: Mapping[str, Factors], keeping: Injection | None, adapter_name: str) -> None:
    """Make the adapter and fill it; it is the active one then."""
    ranks = {"^" + re.escape(name): len(a) for name, (a, _) in made.items()}
    rank = max(ranks.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules="|".join(re.escape(name) for name in made),
        modules_to_save=() if keeping is None else keeping.modules_to_save,
        trainable_token_indices=None if keeping is None else {n: t.indices for n, t in keeping.tokens.items()} or None,
    )
    inject(model, config, adapter_name)
    layers: dict[str, LoraLinear] = adapters(model)
    for name, (a, b) in made.items():
        layers[name].lora_A[: len(a)] = a.to(layers[name].lora_A)
        layers[name].lora_B[: len(a)] = b.T.to(layers[name].lora_B)
    if keeping is not None:
        record = injection(model)
        for name, value in keeping.values.items():
            model.get_submodule(name.rpartition(".")[0]).state_dict(keep_vars=True)[name.rpartition(".")[2]].copy_(
                value
            )
        for name, rows in record.tokens.items():
            rows.token_rows.copy_(keeping.tokens[name].token_rows)
