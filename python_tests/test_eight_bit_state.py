"""8-bit Adam state follows rank changes: codes and the scale of each block of 256 values move with their row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import ardlora_ext as ard
from ardlora_ext import RankUpdate, UnitUpdate, resize
from ardlora_ext.optim import check_optimizer

BLOCK = 256


class Adam8bit(Optimizer):
    """State as bitsandbytes keeps it; what a step does with it is not the matter here."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p]
            for n, codes in ((1, torch.linspace(-1, 1, 256)), (2, torch.linspace(0, 1, 256))):
                state[f"state{n}"] = torch.randint(0, 256, p.shape, dtype=torch.uint8)
                state[f"qmap{n}"] = codes
                state[f"absmax{n}"] = torch.rand(-(-p.numel() // BLOCK))
            state["step"] = 1


def values(optimizer: Optimizer, p: nn.Parameter, n: int) -> torch.Tensor:
    """Decode a moment."""
    state = optimizer.state[p]
    numbers = state[f"qmap{n}"][state[f"state{n}"].long()].view(-1)
    return (numbers * state[f"absmax{n}"].repeat_interleave(BLOCK)[: numbers.numel()]).view(p.shape)


def model_and_optimizer(width: int) -> tuple[nn.Module, Adam8bit]:
    model = ard.wrap(
        nn.Sequential(nn.Linear(width, width)),
        ard.ArdConfig(r0=4, r_max=16, granularity="matrix", target_modules=["0"]),
    )
    optimizer = Adam8bit([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("width", [256, 512, 1280])
@pytest.mark.parametrize(
    ("keep", "grow"), [((2, 0, 1), 0), ((3, 1, 0, 2), 0), ((1, 3), 2), ((0, 1, 2, 3), 3), ((3,), 9)]
)
def test_codes_and_scales_follow_their_rows(width: int, keep: tuple[int, ...], grow: int) -> None:
    model, optimizer = model_and_optimizer(width)
    layer = ard.adapters(model)["0"]
    before = {(f, n): values(optimizer, p, n) for f, p in layer.factors.items() for n in (1, 2)}
    resize.apply(model, RankUpdate({"0": (UnitUpdate(keep, grow),)}), optimizer)
    for (factor, n), old in before.items():
        parameter = layer.factors[factor]
        state = optimizer.state[parameter]
        assert state[f"state{n}"].shape == parameter.shape
        assert state[f"absmax{n}"].shape == (parameter.numel() // BLOCK,)
        assert state[f"qmap{n}"].shape == (256,)
        now = values(optimizer, parameter, n)
        assert torch.equal(now[: len(keep)], old[list(keep)])
        assert not now[len(keep) :].any()  # a scale of 0, whatever the codes mean


@pytest.mark.parametrize("width", [100, 128, 250, 384])
def test_blocks_that_span_rows_are_refused(width: int) -> None:
    model, optimizer = model_and_optimizer(width)
    layer = ard.adapters(model)["0"]
    before = layer.lora_A.detach().clone()
    message = f"must have whole blocks of 256 values in each row, got rows of {width} values"
    with pytest.raises(ValueError, match=message):
        resize.apply(model, RankUpdate({"0": (UnitUpdate((1,)),)}), optimizer)
    assert torch.equal(layer.lora_A, before)
    assert layer.ranks == [4]
    with pytest.raises(ValueError, match=message):
        check_optimizer(optimizer, [("0.lora_A", layer.lora_A)])


def test_larger_blocks_than_a_row_are_refused() -> None:
    model, optimizer = model_and_optimizer(512)
    p = ard.adapters(model)["0"].lora_A
    optimizer.state[p]["absmax1"] = torch.rand(1)  # older versions: blocks of 2048
    with pytest.raises(ValueError, match="must have whole blocks of 256 values in each row"):
        check_optimizer(optimizer, [("0.lora_A", p)])
