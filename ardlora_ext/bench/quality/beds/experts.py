"""Bed (e): a mixture of experts that learned many tasks is tuned on one; does rank go to the experts that see it?

A tiny Mixtral is pre-trained to copy digits in several alphabets, one for each task, so that its routers deal tasks out
to experts. It is tuned to reverse them in one alphabet. Routers stay frozen, so which experts see the task is known:
`spearman` compares the ranks of all experts with the tokens they see, `seeing` is the share of rank that the quarter of
experts gets that sees most, beside `tokens`, their share of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import MixtralConfig, MixtralForCausalLM

import ardlora_ext as ard
from ardlora_ext.bench.quality.beds.cache import cached
from ardlora_ext.bench.quality.methods import Ranks
from ardlora_ext.bench.quality.trial import Measure, Row
from ardlora_ext.bench.stats import spearman
from ardlora_ext.layers.experts import ExpertStack

_SYMBOLS, _LENGTH = 8, 6
_EVAL_SEED = 10_000


@dataclass(frozen=True)
class ExpertsBed:
    """Settings of the bed; see the module."""

    tasks: int = 8
    experts: int = 8
    width: int = 48
    depth: int = 2
    rank: int = 2
    steps: int = 200
    batch: int = 32
    pretrain_steps: int = 1000
    eval_rows: int = 512
    lrs: tuple[float, ...] = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)

    name = "experts"
    measure = Measure("loss", "lower", "test loss")

    def task(self, seed: int) -> ExpertsTask:
        return ExpertsTask(self, seed)


def mixtral(bed: ExpertsBed, seed: int) -> MixtralForCausalLM:
    """Return a model with random weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": bed.width, "intermediate_size": bed.width, "num_hidden_layers": bed.depth}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    experts = {"num_local_experts": bed.experts, "num_experts_per_tok": 2}
    config = MixtralConfig(vocab_size=bed.tasks * _SYMBOLS + 1, max_position_embeddings=32, **sizes, **heads, **experts)
    return MixtralForCausalLM(config)


def sequences(bed: ExpertsBed, task: int | None, rows: int, generator: torch.Generator) -> torch.Tensor:
    """Return `rows` sequences [rows, 13]: symbols of a task (None: of any), a mark, and the same again.

    With a task they come again in reverse.
    """
    x = torch.randint(0, _SYMBOLS, (rows, _LENGTH), generator=generator)
    kind = torch.randint(0, bed.tasks, (rows, 1), generator=generator) if task is None else task
    x = x + _SYMBOLS * kind
    mark = torch.full((rows, 1), bed.tasks * _SYMBOLS)
    return torch.cat([x, mark, x if task is None else x.flip(1)], dim=1)


def answer_loss(model: torch.nn.Module, batch: torch.Tensor, balance: float = 0.0) -> torch.Tensor:
    """Return the mean loss over what comes after the mark, and `balance` times that of an even routing."""
    found = model(batch[:, :-1], output_router_logits=balance > 0.0)
    logits = found.logits[:, _LENGTH:]
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, _LENGTH + 1 :].flatten())
    return loss + balance * found.aux_loss if balance > 0.0 else loss


class ExpertsTask:
    """One seed of the bed."""

    clip: float | None = 1.0

    def __init__(self, bed: ExpertsBed, seed: int) -> None:
        self.bed = bed
        self.base: Mapping[str, Any] = {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "experts")}
        self.model: torch.nn.Module = mixtral(bed, seed)
        made_by = asdict(replace(bed, rank=1, steps=1, eval_rows=1, lrs=()))
        cached("experts", made_by, seed, {"base": self.model}, lambda: learn(self.model, bed, seed))
        self.chosen = seed % bed.tasks
        evaluation = torch.Generator().manual_seed(_EVAL_SEED + seed)
        self.held_out, self.tested = (sequences(bed, self.chosen, bed.eval_rows, evaluation) for _ in range(2))
        self.data = torch.Generator().manual_seed(seed + 1)

    def oracle(self, budget: int) -> Ranks | None:
        return None  # nobody knows

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": lr}]

    def loss(self) -> torch.Tensor:
        return answer_loss(self.model, sequences(self.bed, self.chosen, self.bed.batch, self.data))

    def valid(self) -> float:
        return float(answer_loss(self.model, self.held_out))

    def test(self) -> Row:
        seen = tokens_seen(self.model, self.tested)
        ranks = torch.zeros_like(seen)
        for name, layer in ard.adapters(self.model).items():
            if isinstance(layer, ExpertStack):
                ranks[int(name.split("layers.")[1].split(".")[0])] += torch.tensor(layer.ranks, dtype=seen.dtype)
        most = seen.flatten().argsort(descending=True)[: seen.numel() // 4]
        return {
            "loss": float(answer_loss(self.model, self.tested)),
            "spearman": spearman(ranks.flatten().tolist(), seen.flatten().tolist()),
            "seeing": float(ranks.flatten()[most].sum() / ranks.sum()),
            "tokens": float(seen.flatten()[most].sum() / seen.sum()),
        }


@torch.no_grad()
def tokens_seen(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return how many tokens of a batch each expert of each layer sees [layers, experts]."""
    logits = torch.stack(model(batch[:, :-1], output_router_logits=True).router_logits)
    chosen = logits.topk(2, dim=-1).indices.flatten(1)
    return torch.stack([row.bincount(minlength=logits.shape[-1]) for row in chosen]).double()


def learn(model: torch.nn.Module, bed: ExpertsBed, seed: int) -> None:
    """Train all of a model on all tasks: Adam, linear warm-up and decay."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, foreach=True)
    warmup = max(1, bed.pretrain_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / warmup, 1 - t / bed.pretrain_steps))
    for _ in range(bed.pretrain_steps):
        answer_loss(model, sequences(bed, None, 64, generator), 0.02).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
