"""Accelerate and a loss scaler around a raw loop: the steps and the decisions of a plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW, Optimizer

import ardlora_ext as ard

from helpers.models import trainable
from helpers.training import assert_equal, bed, fast_config

pytestmark = pytest.mark.usefixtures("one_process")


def looped(
    make: Callable[[list[nn.Parameter]], Optimizer], run: Callable[[nn.Module, Optimizer, Any], None]
) -> nn.Module:
    model, loss = bed()
    ard.wrap(model, fast_config())
    optimizer = make(trainable(model))
    ard.attach(model, optimizer, total_steps=20)
    run(model, optimizer, loss)
    return model


def test_accelerate_equals_a_plain_loop() -> None:
    def accelerated(model: nn.Module, optimizer: Optimizer, loss: Any) -> None:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        _, prepared = accelerator.prepare(model, optimizer)
        for t in range(40):
            with accelerator.accumulate(model):
                accelerator.backward(loss(t))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trainable(model), 0.1)
                prepared.step()
                prepared.zero_grad()

    def plain(model: nn.Module, optimizer: Optimizer, loss: Any) -> None:
        for t in range(20):
            (loss(2 * t) / 2).backward()
            (loss(2 * t + 1) / 2).backward()
            nn.utils.clip_grad_norm_(trainable(model), 0.1)
            optimizer.step()
            optimizer.zero_grad()

    assert_equal(*(looped(lambda p: AdamW(p, lr=0.01), loop) for loop in (accelerated, plain)))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_no_step(fused: bool) -> None:
    bad = (3, 11)

    def scaled(model: nn.Module, optimizer: Optimizer, loss: Any) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        for t in range(22):
            value = loss(t) * float("inf") if t in bad else loss(t)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    def plain(model: nn.Module, optimizer: Optimizer, loss: Any) -> None:
        for t in range(22):
            if t not in bad:
                loss(t).backward()
                optimizer.step()
                optimizer.zero_grad()

    ours, theirs = (looped(lambda p: AdamW(p, lr=0.01, fused=fused), loop) for loop in (scaled, plain))
    assert_equal(ours, theirs)
    assert ours._ardlora.controller.step == 20  # type: ignore[union-attr]
