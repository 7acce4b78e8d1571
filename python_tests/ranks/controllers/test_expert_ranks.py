"""Ranks of experts: found where they are planted, whoever sees the tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.optim import Adam

import ardlora_ext as ard
from ardlora_ext.config import AdapterConfig
from ardlora_ext.layers.experts import ExpertStack
from ardlora_ext.ranks.controllers.ard.slopes import token_weights

from helpers.experts import ExpertBed
from helpers.models import trainable

PLANTED = (1, 1, 2, 3, 4, 5, 6, 7)


def fit(bed: ExpertBed, config: AdapterConfig, steps: int = 250, seed: int = 0) -> tuple[list[int], Any]:
    torch.manual_seed(seed)
    bed = ard.wrap(bed, config)
    optimizer = Adam(trainable(bed), lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
    controller = ard.attach(bed, optimizer, total_steps=steps)
    for _ in range(steps):
        bed.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return controller.ranks()["experts.weight"], controller


def test_the_papers_mode_finds_planted_ranks_of_experts_on_average() -> None:
    """A run lies between 0.6 and 0.98."""
    found = []
    for seed in range(3):
        bed = ExpertBed(PLANTED, [16] * len(PLANTED))
        config = ard.ArdConfig(mode="paper", granularity="head", r0=3, lora_alpha=3, lr_alpha=0.05)
        ranks, _ = fit(bed, config, seed=seed)
        found.append(spearmanr(ranks, PLANTED).statistic)
        assert sum(ranks) <= 3 * len(PLANTED)
        assert ard.adapters(bed)["experts.weight"].ranks == ranks
    assert np.mean(found) > 0.7


@pytest.mark.parametrize(
    ("metric", "counts"),
    [("loss", [16] * 8), ("loss", [4, 28, 6, 26, 8, 24, 10, 22]), ("update", [4, 28, 6, 26, 8, 24, 10, 22])],
)
def test_the_anneal_finds_planted_ranks_of_experts(metric: Any, counts: list[int]) -> None:
    """From four times the share down, with the optimizer's state, whoever sees the tokens."""
    bed = ExpertBed(PLANTED, counts, vary=True)
    config = ard.ArdConfig(r0=4, lora_alpha=4, metric=metric, budget=sum(PLANTED) * 2 * bed.width)
    ranks, controller = fit(bed, config)
    assert (controller.metric is None) == (metric == "update")
    assert spearmanr(ranks, PLANTED).statistic > 0.97
    assert ard.parameters_report(bed).live <= controller.budget
    assert controller.phase == "frozen"


def test_a_unit_is_an_expert_at_either_granularity() -> None:
    bed = [ard.wrap(ExpertBed(PLANTED, [4] * 8), ard.ArdConfig(r0=2, granularity=g)) for g in ("head", "matrix")]  # type: ignore[arg-type]
    one, other = (ard.adapters(b)["experts.weight"] for b in bed)
    assert one.layout == other.layout
    assert one.layout.units == 8


def test_a_size_is_found_for_experts() -> None:
    bed = ExpertBed((1, 1, 2, 2, 3, 3, 0, 0), [16] * 8)
    config = ard.ArdConfig(r0=2, lora_alpha=2, budget="auto", granularity="head")
    ranks, _ = fit(bed, config)
    assert spearmanr(ranks, (1, 1, 2, 2, 3, 3, 0, 0)).statistic > 0.9
    assert sum(ranks) <= 1.5 * 12


@pytest.mark.parametrize(
    "config",
    [ard.ElaConfig(r=3, lora_alpha=3), ard.AdaConfig(init_r=5, target_r=3, lora_alpha=3)],
    ids=["elalora", "adalora"],
)
def test_importance_moves_ranks_between_experts(config: AdapterConfig) -> None:
    bed = ExpertBed(PLANTED, [16] * len(PLANTED))
    ranks, _ = fit(bed, config)
    assert spearmanr(ranks, PLANTED).statistic > 0.6
    assert sum(ranks) == 3 * len(PLANTED)


def test_an_expert_that_sees_few_tokens_gets_no_rank_for_its_noise() -> None:
    """Half of the experts see few tokens and have nothing to learn; unweighed slopes give them rank 1.75."""
    bed = ExpertBed((2,) * 8 + (0,) * 8, (30,) * 8 + (2,) * 8, noise=3.0, vary=True)
    ranks, _ = fit(bed, ard.ArdConfig(mode="paper", granularity="head", r0=3, lora_alpha=3, lr_alpha=0.05))
    assert np.mean(ranks[8:]) < 1.3
    assert min(ranks[:8]) > max(ranks[8:])


def test_tokens_are_counted_weighed_and_forgotten() -> None:
    bed = ard.wrap(ExpertBed((1, 1, 1, 1), [1, 2, 3, 10]), ard.ArdConfig(mode="paper", granularity="head", r0=2))
    controller = ard.attach(bed, Adam(trainable(bed)), total_steps=10)
    stack = ard.adapters(bed)["experts.weight"]
    assert isinstance(stack, ExpertStack)
    for _ in range(2):  # accumulation
        bed.loss().backward()
    with torch.no_grad():
        bed.loss()
    assert stack.tokens.tolist() == [2, 4, 6, 20]
    np.testing.assert_allclose(token_weights(controller.units)(), [2 / 8, 4 / 8, 6 / 8, 1])
    assert not stack.tokens.any()
    assert (token_weights(controller.units)() == 1).all()
    bed.eval().loss()
    assert not stack.tokens.any()
