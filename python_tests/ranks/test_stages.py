"""A second stage: a new optimizer means a new schedule, and a contradiction is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import ardlora_ext as ard

from helpers.models import trainable
from helpers.training import bed, fast_config


def test_a_second_stage_moves_ranks_again(tmp_path: Path) -> None:
    model = bed()[0]
    ard.wrap(model, fast_config())
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    first = ard.attach(model, optimizer, total_steps=20)
    with pytest.raises(ValueError, match=r"must not be attached already; call controller.detach\(\) first"):
        ard.attach(model, optimizer)

    def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
        for t in range(steps):
            loss_of(model, t).backward()
            optimizer.step()
            optimizer.zero_grad()

    def loss_of(model: nn.Module, t: int) -> torch.Tensor:
        return (model(torch.full((8, 32), float(t % 5))) - 1).square().mean()

    train(model, optimizer, 20)
    assert first.phase == "frozen"
    ard.save_pretrained(model, tmp_path)

    first.detach()
    second = ard.attach(model, torch.optim.AdamW(trainable(model), lr=0.01), total_steps=30)
    assert (second.step, second.total_steps, second.phase) == (0, 30, "warmup")
    assert second.ranks() == first.ranks()

    loaded = ard.load_pretrained(bed()[0], tmp_path)
    third = ard.attach(loaded, optimizer := torch.optim.AdamW(trainable(loaded), lr=0.01), total_steps=30)
    train(loaded, optimizer, 30)
    assert (third.step, third.phase) == (30, "frozen")
    assert any(record["event"] not in ("harden", "freeze") for record in third.records)
    again = ard.load_pretrained(bed()[0], tmp_path)
    with pytest.warns(UserWarning, match="ranks of this adapter are final since step 20 of 20; give total_steps"):
        assert ard.attach(again, torch.optim.AdamW(trainable(again))).phase == "frozen"


def test_a_schedule_that_is_cut_short_is_named(tmp_path: Path) -> None:
    model, loss = bed()
    ard.wrap(model, fast_config())
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    ard.attach(model, optimizer, total_steps=20)
    for t in range(8):
        loss(t).backward()
        optimizer.step()
        optimizer.zero_grad()
    ard.save_pretrained(model, tmp_path)
    same = ard.load_pretrained(bed()[0], tmp_path)
    assert ard.attach(same, torch.optim.AdamW(trainable(same)), total_steps=20).step == 8
    other = ard.load_pretrained(bed()[0], tmp_path)
    with pytest.warns(UserWarning, match="total_steps=60 begins a new schedule, the adapter was saved at step 8 of 20"):
        assert ard.attach(other, torch.optim.AdamW(trainable(other)), total_steps=60).step == 0
