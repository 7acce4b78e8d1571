"""ElaLoRA: step by step against a slow transcription, exact budget, kept optimizer state, both modes, bad input."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from slow_svd import Component, SlowModel, assert_same, batch, chain_and_teacher, gaussians, warmup_decay
from torch import nn

import ardlora_ext as ard
from ardlora_ext.controllers.ela import candidates, exchange, with_ties
from ardlora_ext.controllers.orthogonality import penalty, penalty_gradient, share
from ardlora_ext.controllers.schedule import Phases, exchange_count
from ardlora_ext.start import orthogonal_row, projected_row

STEPS, LR = 300, 1e-2


def prepared(**options: Any) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the wrapped chain and its teacher."""
    model, teacher = chain_and_teacher()
    ard.wrap(model, ard.ElaConfig(**{"r": 4, "lora_alpha": 8.0, "b": 3, "deltaT": 10} | options))
    teacher.requires_grad_(False)
    return model, teacher


class Run:
    """A training loop with Adam and a schedule, one step at a time."""

    def __init__(self, total: int = STEPS, lr: float = LR, **options: Any) -> None:
        self.model, self.teacher = prepared(**options)
        self.total, self.t = total, 0
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=lr)
        self.controller = ard.attach(self.model, self.optimizer, total_steps=total)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: warmup_decay(t, total))

    def step(self) -> float:
        x = batch(self.t)
        loss = (self.model(x) - self.teacher(x)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.t += 1
        return loss.item()

    @property
    def ranks(self) -> list[int]:
        return [r for ranks in self.controller.ranks().values() for r in ranks]


# Against the papers.


def slow_round(slow: SlowModel, t: int, phases: tuple[int, int], config: ard.ElaConfig) -> bool:
    """Prune and expand as `papers` say, one matrix and one component at a time."""
    warm, end = phases
    if not warm < t < end or (t - warm) % config.deltaT:
        return False
    p = (t - warm) / (end - warm)
    b = round(config.b * (1 - p**3)) if config.scheduler else config.b
    if b == 0:
        return False
    code = config.mode == "code"
    grace = 0 if code else round(3 / (1 - config.beta1))
    pool = []
    for m, matrix in enumerate(slow.matrices):
        judged = sorted((c.score(), i) for i, c in enumerate(matrix) if t - c.born >= grace)
        pool += [(score, m, i) for score, i in judged[: min(config.k, len(matrix) - 1)]]
    pool.sort()
    b = min(b, len(pool) // 2)
    low, high = pool[:b], pool[len(pool) - b :]
    doomed = {(m, i) for _, m, i in low}
    for m in {m for _, m, _ in low} | {m for _, m, _ in high}:
        matrix = slow.matrices[m]
        matrix[:] = [c for i, c in enumerate(matrix) if (m, i) not in doomed]
        new = sum(named == m for _, named, _ in high)
        widths = (len(matrix[0].q.value), len(matrix[0].p.value))
        draws = gaussians(config.seed + t + 1, slow.names[m], new, widths)
        old = list(matrix)
        for g_q, g_p in zip(*draws, strict=True):
            q = slow_direction(g_q, [c.q.value.detach() for c in matrix], [c.q.value.detach() for c in old], config)
            p_ = slow_direction(g_p, [c.p.value.detach() for c in matrix], [c.p.value.detach() for c in old], config)
            lam = min(min(abs(float(c.lam.value.detach())) for c in old), 1e-13) if code else 0.0
            matrix.append(Component(p_, q, lam, born=t + 1))
    if code:
        slow.restart()
    return True


def slow_direction(
    v: torch.Tensor, others: list[torch.Tensor], old: list[torch.Tensor], config: ard.ElaConfig
) -> torch.Tensor:
    if config.mode == "code":
        rows = torch.stack(others)
        v = v - rows.T @ (rows @ v)
        return v / (v.norm() + 1e-6)
    basis: list[torch.Tensor] = []
    for row in [*others, v]:  # classical Gram-Schmidt of normalised rows, in float64
        row = row.double()
        for _ in range(2):
            for e in basis:
                row = row - (e @ row) * e
        basis.append(row / row.norm())
    norm = sum(float(o.norm()) for o in old) / len(old) if config.new_norm == "mean" else 1.0
    return norm * basis[-1]


@pytest.mark.parametrize("options", [{}, {"new_norm": "unit", "orth": "norm", "r": 3}, {"mode": "code"}])
def test_equals_the_transcription_step_by_step(options: dict[str, Any]) -> None:
    run = Run(**options)
    config = run.controller.config
    slow = SlowModel(run.model, config.orth_form, config.orth_reg_weight)
    warm, final = config.phases(STEPS)
    rounds = 0
    for t in range(STEPS):
        pinned = config.mode == "code" and rounds > 0
        rate = LR * (1.0 if pinned else warmup_decay(t, STEPS))
        expected, gradients = slow.step(batch(t), run.teacher(batch(t)), rate)
        if t < STEPS - final:
            slow.score(gradients, config.beta1, config.beta2)
        assert run.step() == pytest.approx(expected, rel=1e-5)
        if t < STEPS - final and not (t + 1 - warm) % 10:
            scores = [s for module in run.controller.scores().values() for s in module]
            assert scores == pytest.approx([c.score() for m in slow.matrices for c in m], rel=1e-3, abs=1e-12)
        rounds += slow_round(slow, t, (warm, STEPS - final), config)
        assert_same(run.model, slow)
    assert rounds >= 10
    assert run.controller.rounds == rounds
    assert len(set(run.ranks)) > 1


