"""From examples to batches to scores: tokens, padding, seeded order, evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DataCollatorWithPadding

from ardlora_ext.train.data import Example

Features = dict[str, Any]
Batch = dict[str, torch.Tensor]


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Features]:
    """Turn examples into features: one per labelled text, or blocks of `max_length` tokens of the joined texts."""
    if examples[0].label is None:
        ids = list(chain.from_iterable(_document(tokenizer, example.text) for example in examples))
        size = min(max_length, len(ids))
        return [{"input_ids": ids[start : start + size]} for start in range(0, len(ids) - size + 1, size)]
    pairs = [example.text_pair or "" for example in examples] if any(e.text_pair for e in examples) else None
    encoded = tokenizer([example.text for example in examples], pairs, truncation=True, max_length=max_length)
    labelled = dict(encoded, labels=[example.label for example in examples])
    return [dict(zip(labelled, values, strict=True)) for values in zip(*labelled.values(), strict=True)]


def _document(tokenizer: Any, text: str) -> list[int]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # verbose=False: the whole document is meant to be longer than the model's window, it is cut into blocks afterwards
    return [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end]


class Collator:
    """Pad a list of features to one batch; blocks of text have one length and are their own labels."""

    def __init__(self, tokenizer: Any, device: torch.device | str = "cpu") -> None:
        self._pad = DataCollatorWithPadding(tokenizer)
        self._device = device

    def __call__(self, features: list[Features]) -> Batch:
        """Return the batch on the collator's device."""
        if "labels" in features[0]:
            return {name: value.to(self._device) for name, value in self._pad(features).items()}
        ids = torch.tensor([feature["input_ids"] for feature in features]).to(self._device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def batches(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of indices for ever, a fresh seeded order in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator, device="cpu").tolist()
        for start in range(0, count, batch_size):
            yield order[start : start + batch_size]


@dataclass(frozen=True)
class Outcome:
    """Results per example, so that a part of the test set can be scored without running it again.

    Attributes:
        losses: Summed cross-entropy, [n].
        hits: Correct predictions, [n].
        counts: Predictions made (1 per labelled text, tokens - 1 per block), [n].
        metric_name: "accuracy" (a share of 1) or "perplexity".
    """

    losses: torch.Tensor
    hits: torch.Tensor
    counts: torch.Tensor
    metric_name: str

    def first(self, count: int) -> Outcome:
        """Return the outcome of the first `count` examples."""
        return Outcome(self.losses[:count], self.hits[:count], self.counts[:count], self.metric_name)

    @property
    def loss(self) -> float:
        """Mean cross-entropy per prediction."""
        return float(self.losses.sum() / self.counts.sum())

    @property
    def metric(self) -> float:
        """Accuracy, or perplexity."""
        if self.metric_name == "accuracy":
            return float(self.hits.sum() / self.counts.sum())
        return math.exp(min(self.loss, 700.0))


def evaluate(model: torch.nn.Module, features: Sequence[Features], collate: Collator, batch_size: int) -> Outcome:
    """Run `model` over `features`, long ones first so that a batch has little padding."""
    order = sorted(range(len(features)), key=lambda index: -len(features[index]["input_ids"]))
    results = torch.zeros(3, len(features), dtype=torch.float64)
    labelled = "labels" in features[0]
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([features[index] for index in chosen])
            labels = batch.pop("labels")
            logits = model(**batch).logits
            if labelled:
                logits, labels = logits[:, None], labels[:, None]
            else:
                logits, labels = logits[:, :-1], labels[:, 1:]
            loss = F.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")  # [batch, predictions]
            hit = logits.argmax(-1) == labels
            parts = (loss, hit, torch.ones_like(hit))
            results[:, chosen] = torch.stack([part.double().sum(1) for part in parts]).cpu()
    model.train()
    losses, hits, counts = results
    return Outcome(losses, hits, counts, "accuracy" if labelled else "perplexity")
