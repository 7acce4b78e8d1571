"""Bed (e): the phonebook in a pretrained encoder (all-MiniLM-L6-v2).

Keys are 8 random words, their values 3 digits; adapters on the last layer store them, read by a random head that nobody
trains. What the five layers below make of a key is the same in every step, and computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from ardlora_ext.bench.quality.beds.phonebook import DIGITS, VALUE, PhonebookBed, PhonebookTask, random_values
from ardlora_ext.train.packages import MINILM, fetch

_WORDS, _KEY = (1996, 11996), 8  # whole English words of BERT's vocabulary
_PART = 64  # keys that go through the layers below at once


@dataclass(frozen=True)
class EncoderBookBed(PhonebookBed):
    """Settings of the bed; see the module."""

    pairs: int = 1000

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"encoder-book-{self.pairs}"

    def task(self, seed: int) -> PhonebookTask:
        return EncoderBookTask(self, seed)


class EncoderBook(nn.Module):
    """The encoder's last layer over what those below make of each key, and logits of the digits, read at [CLS]."""

    below: torch.Tensor

    def __init__(self, keys: torch.Tensor) -> None:
        super().__init__()
        encoder = AutoModel.from_pretrained(fetch(MINILM), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        *first, self.layer = encoder.encoder.layer
        self.head = nn.Linear(encoder.config.hidden_size, VALUE * DIGITS, bias=False)
        nn.init.orthogonal_(self.head.weight)
        with torch.no_grad():
            starts = range(0, len(keys), _PART)
            parts = [_through(encoder.embeddings(keys[at : at + _PART]), first) for at in starts]
        self.register_buffer("below", torch.cat(parts), persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.layer(self.below[rows[:, 0]])[:, 0])
        return logits.view(-1, VALUE, DIGITS)


def _through(x: torch.Tensor, layers: Iterable[nn.Module]) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


class EncoderBookTask(PhonebookTask):
    """One seed of the bed: rows are the number of a key and its value."""

    base: Mapping[str, Any] = {
        "target_modules": r".*\.dense|.*\.(query|key|value)",
        "head_dim": {"query": 32, "key": 32, "value": 32},
    }

    def __init__(self, bed: PhonebookBed, seed: int) -> None:
        self.bed = bed
        torch.manual_seed(seed)
        self.data = torch.Generator().manual_seed(seed)
        keys = torch.randint(*_WORDS, (bed.pairs, _KEY), generator=self.data)
        self.book = torch.cat([torch.arange(bed.pairs)[:, None], random_values(bed.pairs, self.data)], dim=1)
        self.model = EncoderBook(keys)
