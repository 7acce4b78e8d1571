"""Experts in several processes: each sees other tokens, and the ranks and weights are those of one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ardlora_ext as ard
from ardlora_ext.config import AdapterConfig

from helpers import workers
from helpers.experts import tiny_experts
from helpers.models import trainable

STEPS = 10
_SVD: dict[str, Any] = {"tinit": 1, "tfinal": 3, "deltaT": 2, "seed": 3, "target_modules": ["experts"]}
METHODS: dict[str, AdapterConfig] = {
    "ard": ard.ArdConfig(
        mode="paper",
        r0=2,
        r_max=4,
        update_interval=2,
        lr_alpha=0.2,
        warmup_ratio=0.1,
        freeze_ratio=0.2,
        seed=3,
        target_modules=["experts"],
    ),
    "elalora": ard.ElaConfig(r=2, r_max=4, k=2, b=3, **_SVD),
    "adalora": ard.AdaConfig(init_r=3, target_r=2, **_SVD),
}
Found = tuple[dict[str, list[int]], dict[str, torch.Tensor]]


def train(rank: int, size: int, config: AdapterConfig) -> Found:
    """Train on this process's sequences of each batch; return ranks and live rows."""
    model = tiny_experts("mixtral").train()
    ard.wrap(model, config)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if size > 1 else model
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01, eps=1e-4)
    controller = ard.attach(wrapped, optimizer, total_steps=STEPS)
    ids = torch.randint(3, 96, (STEPS, 4, 12), generator=torch.Generator().manual_seed(5))
    for batch in ids:
        share = batch[rank::size]
        wrapped(input_ids=share, labels=share).loss.backward()
        nn.utils.clip_grad_norm_(trainable(model), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    weights = {}
    for name, layer in ard.adapters(model).items():
        live = sum(layer.ranks)
        weights |= {f"{name}.lora_A": layer.lora_A.detach()[:live], f"{name}.lora_B": layer.lora_B.detach()[:live]}
    return controller.ranks(), {name: weight.clone() for name, weight in weights.items()}


def train_all(rank: int, size: int) -> dict[str, Found]:
    return {name: train(rank, size, config) for name, config in METHODS.items()}


def test_two_processes_train_experts_as_one() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = train_all(0, 1)
    finally:
        torch.set_num_threads(threads)
    first, second = workers.run(2, train_all, 2)
    for name, (ranks, weights) in expected.items():
        assert len({r for units in ranks.values() for r in units}) > 1, f"{name}: ranks moved"
        assert first[name][0] == second[name][0] == ranks, name
        for key, weight in weights.items():
            assert torch.equal(first[name][1][key], second[name][1][key]), "processes hold the same bits"
            torch.testing.assert_close(first[name][1][key], weight, rtol=1e-3, atol=1e-4)
