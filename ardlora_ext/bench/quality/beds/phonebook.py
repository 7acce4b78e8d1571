"""Bed (d): store a phonebook, so that capacity binds by construction.

K random keys of 4 letters have random values of 3 digits: about 10 bits a pair, nothing to generalise. A tiny
transformer (`tiny.Block`, all adapted matrices square) is pre-trained to know one phonebook by heart; the adapters
store another one. The score is the loss of a whole value over the pairs that were to be stored, in bits of the 10 that
it has; `recall` is the share of pairs of which every digit is the likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ardlora_ext.bench.quality.beds.cache import cached
from ardlora_ext.bench.quality.beds.tiny import Block
from ardlora_ext.bench.quality.methods import Ranks
from ardlora_ext.bench.quality.trial import Measure, Row

_LETTERS, _KEY, DIGITS, VALUE = 16, 4, 10, 3
_BITS = 1.0 / math.log(2.0)


@dataclass(frozen=True)
class PhonebookBed:
    """Settings of the bed; see the module."""

    pairs: int = 200
    width: int = 32
    heads: int = 4
    depth: int = 2
    rank: int = 1
    steps: int = 400
    batch: int = 64
    pretrain_steps: int = 1500
    lrs: tuple[float, ...] = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)

    measure = Measure("bits", "lower", "bits of a stored value that are missing")

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"phonebook-{self.pairs}"

    def task(self, seed: int) -> PhonebookTask:
        return PhonebookTask(self, seed)


class Book(nn.Module):
    """Embeddings of letters, digits and places, blocks, logits of the digits."""

    def __init__(self, bed: PhonebookBed) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_LETTERS + DIGITS, bed.width)
        self.places = nn.Parameter(0.02 * torch.randn(_KEY + VALUE - 1, bed.width))
        self.layers = nn.ModuleList(Block(bed.width, bed.heads) for _ in range(bed.depth))
        self.norm = nn.LayerNorm(bed.width)
        self.head = nn.Linear(bed.width, DIGITS, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places
        for block in self.layers:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x[:, _KEY - 1 :]))
        return logits


def phonebook(pairs: int, generator: torch.Generator) -> torch.Tensor:
    """Return `pairs` rows [pairs, 7] of a key, no two alike, and its value."""
    numbers = torch.randperm(_LETTERS**_KEY, generator=generator)[:pairs]
    key = torch.stack([numbers // _LETTERS**i % _LETTERS for i in range(_KEY)], dim=1)
    return torch.cat([key, random_values(pairs, generator)], dim=1)


def random_values(pairs: int, generator: torch.Generator) -> torch.Tensor:
    """Return the digits [pairs, 3] of random values, as tokens."""
    return _LETTERS + torch.randint(0, DIGITS, (pairs, VALUE), generator=generator)


def digit_losses(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Return the loss of each digit [rows, 3], those before it given, in bits."""
    logits = model(rows[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), _digits(rows).flatten(), reduction="none")
    return _BITS * losses.view(-1, VALUE)


def _digits(rows: torch.Tensor) -> torch.Tensor:
    return rows[:, -VALUE:] - _LETTERS


class PhonebookTask:
    """One seed of the bed."""

    clip: float | None = 1.0

    def __init__(self, bed: PhonebookBed, seed: int) -> None:
        self.bed = bed
        cut = bed.width // bed.heads
        self.base: Mapping[str, Any] = {
            "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "up", "down"),
            "head_dim": {"q_proj": cut, "k_proj": cut, "v_proj": cut, "o_proj": ("in", cut)},
        }
        torch.manual_seed(seed)
        self.data = torch.Generator().manual_seed(seed)
        known, self.book = (phonebook(bed.pairs, self.data) for _ in range(2))
        self.model: nn.Module = Book(bed)
        made_by = asdict(replace(bed, rank=1, steps=1, lrs=()))
        cached("phonebook", made_by, seed, {"base": self.model}, lambda: learn(self.model, known, bed, seed))

    def oracle(self, budget: int) -> Ranks | None:
        return None  # nobody knows

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": lr}]

    def loss(self) -> torch.Tensor:
        return digit_losses(self.model, draw(self.book, self.bed.batch, self.data)).mean()

    def valid(self) -> float:
        """All of the pairs: nothing is to be generalised, and tuning seeds have phonebooks of their own."""
        return float(digit_losses(self.model, self.book).sum(1).mean())

    def test(self) -> Row:
        known = self.model(self.book[:, :-1]).argmax(-1) == _digits(self.book)
        return {"bits": self.valid(), "recall": float(known.all(dim=1).float().mean())}


def draw(book: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    """Return rows drawn from a phonebook."""
    return book[torch.randint(0, len(book), (rows,), generator=generator)]


def learn(model: nn.Module, book: torch.Tensor, bed: PhonebookBed, seed: int) -> None:
    """Train all of a model until it knows a phonebook by heart: Adam, linear warm-up and decay."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, foreach=True)
    warmup = max(1, bed.pretrain_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / warmup, 1 - t / bed.pretrain_steps))
    for _ in range(bed.pretrain_steps):
        digit_losses(model, draw(book, bed.batch, generator)).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
