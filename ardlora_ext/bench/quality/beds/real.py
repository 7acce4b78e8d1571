"""Bed (c): a real encoder (all-MiniLM-L6-v2) on real labelled texts, at small budgets.

The pooler and the new head are trained in full by every method, with a learning rate of their own; the adapters differ.
The score is accuracy, or for numbers Spearman's correlation with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import DataCollatorWithPadding
from transformers.trainer_pt_utils import get_length_grouped_indices

import ardlora_ext as ard
from ardlora_ext.bench.quality.beds.tasks import Data, Sample, load
from ardlora_ext.bench.quality.methods import Ranks
from ardlora_ext.bench.quality.trial import Measure, Row
from ardlora_ext.bench.stats import spearman
from ardlora_ext.train.base_model import head_modules, load_model, load_tokenizer
from ardlora_ext.train.packages import MINILM, fetch

_MAX_LENGTH = 96
_EVAL_BATCH = 64


@dataclass(frozen=True)
class RealBed:
    """Settings of the bed; see the module."""

    task_name: str = "trec6"
    examples: int | None = None  # to train on, None: 1 000
    rank: int = 1
    steps: int = 189  # three epochs of 1 000 examples
    batch: int = 16
    head_lr: float = 1e-2
    lrs: tuple[float, ...] = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    measure = Measure("score", "higher", "score on the test set")

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"real-{self.task_name}" + (f"-{self.examples}" if self.examples else "")

    def task(self, seed: int) -> RealTask:
        if not self._loaded:
            self._loaded["text"] = Texts(load(self.task_name, self.examples))
        return RealTask(self, self._loaded["text"], seed)


@dataclass(frozen=True)
class Texts:
    """A data set in tokens, with what its model needs."""

    data: Data

    @cached_property
    def tokenizer(self) -> Any:
        """The encoder's tokenizer."""
        return load_tokenizer(fetch(MINILM))

    @cached_property
    def parts(self) -> dict[str, list[dict[str, Any]]]:
        """Features of `train`, `valid` and `test`."""
        return {part: self._features(getattr(self.data, part)) for part in ("train", "valid", "test")}

    def _features(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        pairs = [sample.pair or "" for sample in samples] if any(sample.pair for sample in samples) else None
        texts = [sample.text for sample in samples]
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=_MAX_LENGTH)
        encoded["labels"] = [(int if self.data.labels else float)(sample.target) for sample in samples]
        return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]

    def model(self) -> nn.Module:
        """Load the encoder with a new head, without dropout: the methods differ, not their noise."""
        transformers.logging.set_verbosity_error()  # a new head is expected to have new weights
        transformers.logging.disable_progress_bar()
        return load_model(fetch(MINILM), "classification", self.data.labels or ("value",), self.tokenizer)


class RealTask:
    """One seed of the bed: it decides the head's start and the order of the examples."""

    clip: float | None = 1.0

    def __init__(self, bed: RealBed, texts: Texts, seed: int) -> None:
        self.bed, self.texts = bed, texts
        self.model: nn.Module = texts.model()
        self.heads = head_modules(self.model)
        self.base: Mapping[str, Any] = {"modules_to_save": self.heads}
        self.collate = DataCollatorWithPadding(texts.tokenizer)
        self.order = _like_lengths([len(f["input_ids"]) for f in texts.parts["train"]], bed.batch, seed)

    def oracle(self, budget: int) -> Ranks | None:
        return None  # nobody knows

    def groups(self, lr: float) -> list[dict[str, Any]]:
        own = {id(p) for layer in ard.adapters(self.model).values() for p in layer.parameters() if p.requires_grad}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if id(p) in own], "lr": lr},
            {"params": [p for p in trained if id(p) not in own], "lr": self.bed.head_lr},
        ]

    def _batch(self, part: str, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        return dict(self.collate([self.texts.parts[part][i] for i in indices]))

    def loss(self) -> torch.Tensor:
        loss: torch.Tensor = self.model(**self._batch("train", next(self.order))).loss
        return loss

    def _predict(self, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [n, classes] and targets [n], long texts first so that a batch has little padding."""
        features = self.texts.parts[part]
        order = sorted(range(len(features)), key=lambda i: -len(features[i]["input_ids"]))
        logits, targets = [], []
        for start in range(0, len(order), _EVAL_BATCH):
            batch = self._batch(part, order[start : start + _EVAL_BATCH])
            targets.append(batch.pop("labels"))
            logits.append(self.model(**batch).logits)
        return torch.cat(logits), torch.cat(targets)

    def valid(self) -> float:
        logits, targets = self._predict("valid")
        if self.texts.data.labels:
            return float(F.cross_entropy(logits, targets))
        return float(F.mse_loss(logits[:, 0], targets))

    def test(self) -> Row:
        logits, targets = self._predict("test")
        if self.texts.data.labels:
            score = float((logits.argmax(-1) == targets).float().mean())
            return {"score": score, "nll": float(F.cross_entropy(logits, targets))}
        return {"score": spearman(logits[:, 0].tolist(), targets.tolist())}


def _like_lengths(lengths: list[int], size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of texts of like length for ever, which have half the padding; a fresh seeded order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = get_length_grouped_indices(lengths, size, generator=generator)
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        yield from (chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist())
