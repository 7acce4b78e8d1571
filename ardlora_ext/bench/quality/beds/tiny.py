"""Bed (b): a tiny transformer, pre-trained on one mix of sequence tasks and fine-tuned to another.

A sequence reads `task x_1 .. x_6 = y_1 .. y_6` over 10 digits; only y is predicted. Mix A (pre-training): copy, sort,
and add the first digit modulo 3. Mix B (fine-tuning), under the same task tokens: reverse, sort downwards, and
subtract the first digit modulo 3. The base model, and full fine-tuning that gives the scale, are made once per seed and
cached. All adapted matrices are square, so that methods that count ranks and methods that count parameters end equal.

    recovered = (L_base - L_method) / (L_base - L_full)        on test sequences of mix B
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import ardlora_ext as ard
from ardlora_ext.bench.quality.beds.cache import cached
from ardlora_ext.bench.quality.methods import Ranks
from ardlora_ext.bench.quality.trial import Measure, Row
from ardlora_ext.bench.stats import spearman

_DIGITS, _LENGTH, _TASKS, _MODULUS = 10, 6, 3, 3
_EQUALS = _DIGITS + _TASKS
_VOCABULARY = _EQUALS + 1
_EVAL_SEED = 99


@dataclass(frozen=True)
class TinyBed:
    """Settings of the bed; see the module."""

    width: int = 64
    heads: int = 4
    depth: int = 2
    rank: int = 2
    steps: int = 300
    batch: int = 32
    pretrain_steps: int = 1200
    full_lrs: tuple[float, ...] = (2e-3, 5e-3, 1e-2)
    eval_rows: int = 512
    lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)

    name = "tiny"
    measure = Measure("recovered", "higher", "share of full fine-tuning's gain")

    def task(self, seed: int) -> TinyTask:
        return TinyTask(self, seed)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        q, k, v = (
            p(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o_proj(mixed)
        out: torch.Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Tiny(nn.Module):
    """Token and position embeddings, blocks, logits."""

    def __init__(self, bed: TinyBed) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_VOCABULARY, bed.width)
        self.places = nn.Parameter(0.02 * torch.randn(2 * _LENGTH + 1, bed.width))
        self.layers = nn.ModuleList(Block(bed.width, bed.heads) for _ in range(bed.depth))
        self.norm = nn.LayerNorm(bed.width)
        self.head = nn.Linear(bed.width, _VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places
        for block in self.layers:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x[:, _LENGTH + 1 :]))
        return logits


def sequences(mix: str, rows: int, generator: torch.Generator) -> torch.Tensor:
    """Return `rows` sequences [rows, 14] of mix "A" or "B"."""
    x = torch.randint(0, _DIGITS, (rows, _LENGTH), generator=generator)
    kind = torch.randint(0, _TASKS, (rows, 1), generator=generator)
    if mix == "A":
        answers = (x, x.sort(dim=1).values, (x + x[:, :1]) % _MODULUS)
    else:
        answers = (x.flip(1), x.sort(dim=1, descending=True).values, (x - x[:, :1]) % _MODULUS)
    y = torch.stack(answers).gather(0, kind.T[:, :, None].expand(1, rows, _LENGTH))[0]
    return torch.cat([_DIGITS + kind, x, torch.full((rows, 1), _EQUALS), y], dim=1)


def cross_entropy(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over y."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, _LENGTH + 2 :].flatten())


def train_fully(model: nn.Module, mix: str, steps: int, batch: int, lr: float, seed: int) -> None:
    """Train all parameters with Adam, linear warm-up and decay."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, foreach=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / warmup, 1 - t / steps))
    for _ in range(steps):
        cross_entropy(model, sequences(mix, batch, generator)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


class TinyTask:
    """One seed of the bed."""

    clip: float | None = 1.0

    def __init__(self, bed: TinyBed, seed: int) -> None:
        self.bed = bed
        cut = bed.width // bed.heads
        self.base: Mapping[str, Any] = {
            "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "up", "down"),
            "head_dim": {"q_proj": cut, "k_proj": cut, "v_proj": cut, "o_proj": ("in", cut)},
        }
        self.start, self.full = cached_models(bed, seed)
        self.model: nn.Module = copy.deepcopy(self.start)
        evaluation = torch.Generator().manual_seed(_EVAL_SEED + seed)
        self.held_out, self.tested = (sequences("B", bed.eval_rows, evaluation) for _ in range(2))
        with torch.no_grad():
            self.base_loss, self.full_loss = (float(cross_entropy(m, self.tested)) for m in (self.start, self.full))
        self.data = torch.Generator().manual_seed(seed + 1)

    def oracle(self, budget: int) -> Ranks:
        """Ranks by the largest singular values, per parameter, of what full fine-tuning changed."""
        after = dict(self.full.named_modules())
        components = []
        for name, module in self.start.named_modules():
            if name.rpartition(".")[2] in self.base["target_modules"]:
                change = after[name].get_parameter("weight") - module.get_parameter("weight")
                cost = sum(change.shape)
                components += [(-(float(s) ** 2) / cost, cost, name) for s in torch.linalg.svdvals(change.detach())]
        ranks = {name: [0] for *_, name in components}
        for _, cost, name in sorted(components):
            if cost <= budget:
                ranks[name][0] += 1
                budget -= cost
        return ranks

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": lr}]

    def loss(self) -> torch.Tensor:
        return cross_entropy(self.model, sequences("B", self.bed.batch, self.data))

    def valid(self) -> float:
        return float(cross_entropy(self.model, self.held_out))

    def test(self) -> Row:
        loss = float(cross_entropy(self.model, self.tested))
        layers = ard.adapters(self.model)
        hindsight = self.oracle(sum(layer.layout.parameters(layer.ranks) for layer in layers.values()))
        mean_ranks = {name: float(np.mean(layer.ranks)) for name, layer in layers.items()}
        return {
            "loss": loss,
            "regret": loss - self.full_loss,
            "recovered": (self.base_loss - loss) / (self.base_loss - self.full_loss),
            "spearman": spearman(list(mean_ranks.values()), [hindsight[name][0] for name in mean_ranks]),
        }


def cached_models(bed: TinyBed, seed: int) -> tuple[Tiny, Tiny]:
    """Return the pre-trained and the fully fine-tuned model of a seed, from the cache or made now."""
    shape = asdict(replace(bed, rank=1, lrs=()))  # what the two models depend on
    torch.manual_seed(seed)
    base = Tiny(bed)
    full = copy.deepcopy(base)

    def train() -> None:
        train_fully(base, "A", bed.pretrain_steps, 64, 2e-3, seed)
        full.load_state_dict(_fully_tuned(bed, base, seed).state_dict())

    cached("tiny", shape, seed, {"base": base, "full": full}, train)
    return base, full


def _fully_tuned(bed: TinyBed, base: Tiny, seed: int) -> Tiny:
    """Fine-tune all of `base` to mix B, at the best of a few learning rates."""
    held_out = sequences("B", bed.eval_rows, torch.Generator().manual_seed(_EVAL_SEED + seed))
    found = []
    for lr in bed.full_lrs:
        model = copy.deepcopy(base)
        train_fully(model, "B", bed.steps, bed.batch, lr, seed + 1)
        with torch.no_grad():
            found.append((float(cross_entropy(model, held_out)), lr, model))
    return min(found, key=lambda entry: entry[:2])[2]
