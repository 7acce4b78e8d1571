"""`bench prune`: dropping components against SVD pruning with and without state transport.

A stack of tanh layers learns a teacher whose weights differ by low-rank updates of falling size. LoRA of rank 16 trains
for 150 steps, is brought to rank 4 everywhere, and trains for 50 more. Shown: change of the updates, loss right after,
mean loss of the next 5 and of the next 50 steps, as means over paired seeds with the 95 % interval of the difference to
dropping.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext.bench.quality.methods import largest
from ardlora_ext.ranks import resize

WIDTH, LAYERS, HIGH, LOW, BEFORE, AFTER = 48, 4, 16, 4, 150, 50


def _student(generator: torch.Generator) -> tuple[nn.Sequential, nn.Sequential]:
    """Return (student, teacher)."""
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    student = nn.Sequential(*layers[:-1])
    for parameter in student.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / WIDTH**0.5
    teacher = copy.deepcopy(student)
    sizes = 2.0 ** -torch.arange(8.0)
    for layer in teacher:
        if isinstance(layer, nn.Linear):
            u, v = (torch.randn(WIDTH, 8, generator=generator) / WIDTH**0.5 for _ in range(2))
            layer.weight.data += 2.0 * (u * sizes) @ v.T
    return student, teacher.requires_grad_(False)


def _drop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Keep the components with the largest ||a_i|| ||b_i||."""
    updates = {}
    for name, layer in ard.adapters(model).items():
        updates[name] = (ard.UnitUpdate(largest(layer, LOW)),)
    resize.apply(model, ard.RankUpdate(updates), optimizer)


def _svd(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ard.svd_prune(model, {name: [LOW] for name in ard.adapters(model)}, optimizer)


def _svd_zero(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """SVD pruning whose moments and step count start from zero again."""
    _svd(model, optimizer)
    for state in optimizer.state.values():
        state.clear()


METHODS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], None]] = {
    "drop": _drop,
    "svd, state carried": _svd,
    "svd, state zeroed": _svd_zero,
}


def _updates(model: nn.Module) -> torch.Tensor:
    return torch.cat([layer.get_delta_weight().flatten() for layer in ard.adapters(model).values()])


def trial(seed: int, method: str, lr: float) -> list[float]:
    """Return [relative change, loss right after, mean loss of 5 steps, of 50 steps]."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = _student(generator)
    ard.wrap(student, ard.LoraConfig(r=HIGH, lora_alpha=HIGH, seed=seed))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses: list[float] = []
    change = 0.0
    for step in range(BEFORE + AFTER):
        if step == BEFORE:
            before = _updates(student)
            METHODS[method](student, optimizer)
            change = float((_updates(student) - before).norm() / before.norm())
        x = torch.randn(64, WIDTH, generator=generator)
        loss = (student(x) - teacher(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = losses[BEFORE:]
    return [change, after[0], statistics.fmean(after[:5]), statistics.fmean(after)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `prune`."""
    parser.add_argument("--seeds", type=int, default=20, help="paired runs of each method")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate")


def run(arguments: argparse.Namespace, _command: str) -> None:
    """Print the table."""
    runs = {m: [trial(seed, m, arguments.lr) for seed in range(arguments.seeds)] for m in METHODS}
    print(f"{'':20}{'change':>10}{'loss':>10}{'5 steps':>10}{'50 steps':>10}   50 steps against drop")
    for method, rows in runs.items():
        means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
        gaps = [row[3] - other[3] for row, other in zip(rows, runs["drop"], strict=True)]
        half = 1.96 * statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        print(f"{method:20}" + "".join(f"{m:10.4f}" for m in means) + f"   {statistics.fmean(gaps):+.5f} ± {half:.5f}")
