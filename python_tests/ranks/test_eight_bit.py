"""8-bit moments follow rank changes: whole blocks bit for bit, blocks of several rows to within a code."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer

import ardlora_ext as ard
from ardlora_ext import RankUpdate, UnitUpdate
from ardlora_ext.ranks import eight_bit, resize
from ardlora_ext.ranks.eight_bit import EightBit, find, gathered
from ardlora_ext.ranks.optimizer import check_optimizer

from helpers.models import trainable

BLOCK = 256


def qmap(signed: bool) -> torch.Tensor:
    """A map as 8-bit optimizers use them: codes dense near 0 (in the logarithm), and 0 itself."""
    half = torch.logspace(-7, 0, 128 if signed else 255)
    return torch.cat([-half[1:].flip(0), torch.zeros(1), half] if signed else [torch.zeros(1), half])


class Adam8bit(Optimizer):
    """State as bitsandbytes keeps it; what a step does with it is not the matter here."""

    def __init__(self, parameters: Any, block: int = BLOCK, linear: bool = False) -> None:
        super().__init__(parameters, {"lr": 1e-3})
        self.block, self.linear = block, linear

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p]
            for n in (1, 2):
                codes = torch.linspace(-1, 1, 256) if self.linear else qmap(n == 1)
                state[f"state{n}"] = torch.randint(0, len(codes), p.shape, dtype=torch.uint8)
                state[f"qmap{n}"] = codes
                state[f"absmax{n}"] = torch.rand(-(-p.numel() // self.block))
            state["step"] = 1


def wrapped(width: int, **options: Any) -> nn.Module:
    config = ard.ArdConfig(
        **{"mode": "paper", "r0": 4, "r_max": 16, "granularity": "matrix", "target_modules": ["0"], **options}
    )
    return ard.wrap(nn.Sequential(nn.Linear(width, width)), config)


def stepped(width: int, **options: Any) -> tuple[nn.Module, Adam8bit]:
    model = wrapped(width)
    optimizer = Adam8bit(trainable(model), **options)
    optimizer.step()
    return model, optimizer


PLANS = [((2, 0, 1), 0), ((3, 1, 0, 2), 0), ((1, 3), 2), ((0, 1, 2, 3), 3), ((3,), 9)]


@pytest.mark.parametrize("width", [256, 512, 1280])
@pytest.mark.parametrize(("keep", "grow"), PLANS)
def test_codes_and_scales_follow_their_rows(width: int, keep: tuple[int, ...], grow: int) -> None:
    model, optimizer = stepped(width, linear=True)
    layer = ard.adapters(model)["0"]
    before = {
        (f, n): moment.decode() for f, p in layer.factors.items() for n, moment in find(optimizer.state[p]).items()
    }
    resize.apply(model, RankUpdate({"0": (UnitUpdate(keep, grow),)}), optimizer)
    for (factor, key), old in before.items():
        parameter = layer.factors[factor]
        moment = find(optimizer.state[parameter])[key]
        assert moment.codes.shape == parameter.shape
        assert moment.scale.shape == (parameter.numel() // BLOCK,)
        now = moment.decode()
        assert torch.equal(now[: len(keep)], old[list(keep)])
        assert not now[len(keep) :].any()  # a scale of 0, whatever the codes mean


@settings(max_examples=60, deadline=None)
@given(
    width=st.sampled_from([1, 7, 100, 128, 250, 384, 768]),
    signed=st.booleans(),
    block=st.sampled_from([256, 2048]),
    seed=st.integers(0, 10**6),
)
def test_blocks_of_several_rows(width: int, signed: bool, block: int, seed: int) -> None:
    rng, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = rng.randint(1, 24)
    codes = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=draw)
    scale = torch.rand(-(-rows * width // block), generator=draw) + 1e-3
    moment = EightBit(codes, scale, qmap(signed), block)
    kept = rng.sample(range(rows), rng.randint(0, rows))
    if rng.random() < 0.5:
        kept.sort()
    plan = kept + [-1] * rng.randint(0, 9)
    if not plan:
        return
    old, after = moment.decode(), moment.gather(plan)
    new = after.decode()
    assert after.codes.shape == (len(plan), width)
    assert len(after.scale) == -(-len(plan) * width // block)
    assert not new[len(kept) :].any(), "new rows decode to exact zeros"
    expected = torch.cat([old[kept], torch.zeros(len(plan) - len(kept), width)])
    # The map's steps are 14 % of a value at most, and 1e-7 of the largest value of its block near 0.
    largest = after.scale.repeat_interleave(block)[: new.numel()].view(new.shape)
    assert ((new - expected).abs() <= 0.15 * expected.abs() + 1.01e-7 * largest).all()
    if not signed:
        assert torch.equal(new == 0, expected == 0), "a second moment is 0 only where it was"
    unmoved = next((i for i, row in enumerate(plan) if row != i), len(plan)) * width // block * block
    assert torch.equal(new.view(-1)[:unmoved], old.view(-1)[:unmoved]), (
        "blocks in front of the first change keep their bits"
    )
    again = after.gather(list(range(len(plan))))
    assert torch.equal(again.codes, after.codes)
    assert torch.equal(again.scale, after.scale)


def test_moments_that_move_together_are_each_what_they_would_be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, moments, plans = torch.Generator().manual_seed(1), list[EightBit](), list[list[int]]()
    for i in range(24):
        width, rows, new = (100, 512)[i % 2], 5 + i % 3, 4 + i % 4
        codes = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=draw)
        scale = torch.rand(-(-rows * width // BLOCK), generator=draw)
        moments.append(EightBit(codes, scale, qmap(i % 5 > 1), BLOCK))
        plans.append(torch.randint(-1, rows, (new,), generator=draw).tolist())
    alone = [moment.gather(plan) for moment, plan in zip(moments, plans, strict=True)]
    monkeypatch.setattr(eight_bit, "_TOGETHER", 1500)  # two or three at once
    for together in (gathered(moments, plans), gathered(moments[::-1], plans[::-1])[::-1]):
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.equal(ours.codes, theirs.codes)
            assert torch.equal(ours.scale, theirs.scale)
            assert ours.codes.untyped_storage().nbytes() == ours.codes.numel(), "no memory of its neighbours"
    assert gathered([], []) == []


@pytest.mark.parametrize("width", [100, 384])
def test_a_map_without_zero_is_refused_before_anything_changes(width: int) -> None:
    model, optimizer = stepped(width, linear=True)
    layer = ard.adapters(model)["0"]
    before = layer.lora_A.detach().clone()
    with pytest.raises(ValueError, match="8-bit optimizer state must have a code for 0, got a map without"):
        resize.apply(model, RankUpdate({"0": (UnitUpdate((1,)),)}), optimizer)
    assert torch.equal(layer.lora_A, before)
    assert layer.ranks == [4]


def test_other_blocks_are_refused() -> None:
    model, optimizer = stepped(512)
    p = ard.adapters(model)["0"].lora_A
    optimizer.state[p]["absmax1"] = torch.rand(5)
    with pytest.raises(
        ValueError, match=r"'state1' must be \[rows, width\] in blocks of 256 or 2048 values, got \[4, 512\]"
    ):
        check_optimizer(optimizer, [("0.lora_A", p)])
    optimizer.step()
    resize.apply(model, RankUpdate({"0": (UnitUpdate((0, 1)),)}), optimizer)


@pytest.mark.parametrize("width", [64, 256])
def test_svd_prune_turns_moments_to_within_a_code(width: int) -> None:
    """Decoded, turned as Adam's own would be, encoded again."""
    torch.manual_seed(0)
    model = ard.wrap(nn.Sequential(nn.Linear(width, width)), ard.LoraConfig(r=4, target_modules=["0"]))
    layer = ard.adapters(model)["0"]
    torch.nn.init.normal_(layer.lora_B.data)
    optimizer = Adam8bit(trainable(model))
    optimizer.step()
    plain = copy.deepcopy(model)
    adam = torch.optim.Adam(trainable(plain))
    (factors,) = (g.factors for g in ard.adapters(plain).values())
    for name, factor in layer.factors.items():
        moments = find(optimizer.state[factor])
        values = {"exp_avg": moments["state1"].decode(), "exp_avg_sq": moments["state2"].decode()}
        adam.state[factors[name]] = {"step": torch.tensor(1.0), **values}
    for of, by in ((model, optimizer), (plain, adam)):
        ard.svd_prune(of, {"0": [3]}, by)
    for name, factor in layer.factors.items():
        found, expected = find(optimizer.state[factor]), adam.state[factors[name]]
        for ours, theirs in (("state1", "exp_avg"), ("state2", "exp_avg_sq")):
            decoded = found[ours].decode()[:3]
            assert float((decoded - expected[theirs][:3]).abs().max()) < 0.1 * float(expected[theirs].abs().max())


# --- The real ones ------------------------------------------------------------------------------------------------


def bitsandbytes(parameters: list[nn.Parameter]) -> Optimizer:
    bnb = _quietly("bitsandbytes")
    made: Optimizer = bnb.optim.AdamW8bit(parameters, lr=0.01, min_8bit_size=512)
    return made


def torchao(parameters: list[nn.Parameter]) -> Optimizer:
    made: Optimizer = _quietly("torchao.optim").AdamW8bit(parameters, lr=0.01)
    return made


def _quietly(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def loss_of(model: nn.Module, t: int) -> torch.Tensor:
    """The mean squared error of the adapter alone to an update of rank 4."""
    base, teacher = model[0].base_layer, torch.Generator().manual_seed(1)
    width = base.in_features
    u, v = torch.randn(2, 4, width, generator=teacher)
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(t))
    error: torch.Tensor = (model(x) - base(x) - x @ u.T @ v / width**0.5).square().mean() / 4
    return error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [bitsandbytes, torchao])
@pytest.mark.parametrize("width", [320, 1024], ids=["blocks of several rows", "whole blocks"])
def test_training_in_8_bit_follows_training_in_32(make: Callable[[list[nn.Parameter]], Optimizer], width: int) -> None:
    """Through the same rank changes, the loss ends where AdamW's with moments in float32 does."""
    losses = {}
    torch.compiler.set_stance("force_eager")  # torchao compiles its step for each shape
    for maker in (make, lambda p: torch.optim.AdamW(p, lr=0.01)):
        torch.manual_seed(0)
        model = wrapped(width, capacity="fixed")
        optimizer = maker(trainable(model))
        moved = 0
        for t in range(40):
            loss_of(model, t).backward()
            optimizer.step()
            optimizer.zero_grad()
            if t % 8 == 4:
                layer = ard.adapters(model)["0"]
                keep = tuple(random.Random(t).sample(range(layer.ranks[0]), layer.ranks[0] - 1))
                resize.apply(model, RankUpdate({"0": (UnitUpdate(keep, 2),)}, seed=t), optimizer)
                layer.lora_gate.fill_(1.0)
                coded = find(optimizer.state[layer.lora_A])
                moved += len(coded)
                live = layer.layout.rows(layer.ranks)[0]
                assert all(not moment.decode()[live - 2 :].any() for moment in coded.values())
        assert moved == (0 if maker is not make else 10)
        losses[maker is make] = [loss_of(model, t).item() for t in range(100, 104)]
    torch.compiler.set_stance("default")
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    assert losses[True][0] < 0.5 < loss_of(wrapped(width), 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [bitsandbytes, torchao])
@pytest.mark.parametrize("width", [320, 1024], ids=["blocks of several rows", "whole blocks"])
def test_a_resumed_run_goes_on_bit_for_bit(
    make: Callable[[list[nn.Parameter]], Optimizer], width: int, tmp_path: Path
) -> None:
    ends = []
    torch.compiler.set_stance("force_eager")  # torchao compiles its step for each shape
    for parts in ([range(12)], [range(7), range(7, 12)]):
        for part in parts:
            torch.manual_seed(0)
            model = wrapped(width, update_interval=2, lr_alpha=0.1, freeze_ratio=0.2, capacity="fixed")
            optimizer = make(trainable(model))
            controller = ard.attach(model, optimizer, total_steps=12)
            if part.start:
                ard.load_state(model, optimizer, tmp_path)
            for t in part:
                loss_of(model, t).backward()
                optimizer.step()
                optimizer.zero_grad()
            ard.save_state(model, optimizer, tmp_path)
        assert controller.records, "ranks moved"
        coded = find(optimizer.state[ard.adapters(model)["0"].lora_A])
        assert coded, "moments are in 8 bit"
        ends.append([ard.adapters(model)["0"].get_delta_weight(), *(coded[key].decode() for key in sorted(coded))])
    torch.compiler.set_stance("default")
    assert all(map(torch.equal, *ends))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("package", "name", "message"),
    [
        ("torchao.optim", "AdamW4bit", "optimizer state 'exp_avg' of AdamW4bit must be plain or 8-bit"),
        ("torchao.optim", "AdamWFp8", "optimizer state 'exp_avg' of AdamWFp8 must be plain or 8-bit"),
        ("bitsandbytes.optim", "AdEMAMix8bit", "8-bit optimizer state 'state1' must be"),
    ],
)
def test_formats_that_cannot_follow_are_refused_by_name(package: str, name: str, message: str) -> None:
    model = wrapped(1024)
    optimizer = getattr(_quietly(package), name)(trainable(model), lr=0.01)
    with pytest.raises(ValueError, match=f"must follow rank changes, got {name}: {message}"):
        ard.attach(model, optimizer)


def test_state_elsewhere_is_refused_by_name() -> None:
    model = wrapped(64)
    optimizer = type("CPUOffloadOptimizer", (torch.optim.AdamW,), {})(trainable(model))
    with pytest.raises(ValueError, match="must not be CPUOffloadOptimizer: it steps on copies of the parameters"):
        ard.attach(model, optimizer)
