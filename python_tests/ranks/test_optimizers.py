"""Which optimizers follow rank changes, exactly; and which are refused by name before they have trained."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import ardlora_ext as ard
from ardlora_ext import RankUpdate, UnitUpdate
from ardlora_ext.ranks import resize
from ardlora_ext.ranks.optimizer import Factored, copies, remember_copies

from helpers.adapters import fingerprint
from helpers.models import trainable
from helpers.optimizers import Curvature, Distance, Fused, Lookahead, Sam, wanting_a_closure
from helpers.resizing import RowProducts, step
from helpers.training import STEPS, bed, fast_config

Make = Callable[[list[nn.Parameter]], Optimizer]


def of_package(name: str, **options: Any) -> Make:
    """One of pytorch_optimizer's, where that is installed."""

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        package = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
        made: Optimizer = getattr(package, name)(parameters, **options)
        return made

    return make


FOLLOWING: dict[str, Make] = {
    "Adafactor": lambda p: Adafactor(p, lr=0.01),
    "Muon": lambda p: Muon(p, lr=0.01),
    "flat, by rows, by columns": Distance,
    "SAM": Sam,
    "CAME": of_package("CAME", lr=0.001),
    "AdaFactor (pytorch_optimizer)": of_package("AdaFactor", lr=0.01),
    "Prodigy": of_package("Prodigy", lr=1.0),
    "SM3": of_package("SM3", lr=0.1),
    "ScheduleFreeAdamW": of_package("ScheduleFreeAdamW", lr=0.01),
    "SAM (pytorch_optimizer)": of_package("SAM", base_optimizer=AdamW, lr=0.01),
}


@pytest.mark.parametrize("make", FOLLOWING.values(), ids=list(FOLLOWING))
def test_ranks_move_under_them(make: Make) -> None:
    model, loss = bed()
    ard.wrap(model, fast_config())
    optimizer = make(trainable(model))
    if hasattr(optimizer, "train"):
        optimizer.train()
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    first = loss(0).item()
    for t in range(STEPS):
        if "SAM" in type(optimizer).__name__.upper():
            wanting_a_closure(optimizer, lambda t=t: loss(t))  # type: ignore[misc]
        else:
            loss(t).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert controller.step == STEPS
    assert {r["event"] for r in controller.records} == {"adapt", "freeze"}
    assert controller.ranks() == {name: layer.ranks for name, layer in ard.adapters(model).items()}
    assert loss(0).item() < first
    for layer in ard.adapters(model).values():
        for parameter, live in zip((layer.lora_A, layer.lora_B), layer.layout.rows(layer.ranks), strict=True):
            assert torch.isfinite(parameter).all()
            assert not parameter[live:].any(), "rows past the live ones are zero"


@pytest.mark.parametrize("given", [True, False])
def test_sam_in_two_steps(given: bool) -> None:
    model, loss = bed()
    ard.wrap(model, fast_config())
    optimizer = Sam(trainable(model))
    controller = ard.attach(model, optimizer if given else None, total_steps=STEPS)
    for t in range(STEPS):
        loss(t).backward()
        optimizer.first_step()
        optimizer.zero_grad()
        loss(t).backward()
        optimizer.second_step()
        optimizer.zero_grad()
    assert controller.step == STEPS
    assert {r["event"] for r in controller.records} == {"adapt", "freeze"}


_APOLLO = {"scale_type": "channel", "projection_type": "random"}
REFUSED: dict[str, tuple[Make, str]] = {
    "another around it": (lambda p: Lookahead(AdamW(p, lr=0.01)), "Lookahead around AdamW: RuntimeError: The size of"),
    "rows by rows": (RowProducts, r"RowProducts: optimizer state 'gram' of RowProducts must have an entry per weight"),
    "step that raises": (lambda p: Fused(p, True), "Fused: its step does nothing"),
    "step that does nothing": (lambda p: Fused(p, False), "Fused: its step does nothing"),
    "Shampoo": (of_package("Shampoo"), "Shampoo: optimizer state 'pre_cond_0'"),
    "SOAP": (of_package("SOAP"), "SOAP: optimizer state 'GG' of SOAP must be a tensor or a number, got list"),
    "TRAC": (lambda p: of_package("TRAC")(AdamW(p)), "TRAC around AdamW"),  # type: ignore[arg-type]
    "APOLLO": (
        lambda p: of_package("APOLLO")([{"params": p, "rank": 2, "update_proj_gap": 10, "scale": 1, **_APOLLO}]),  # type: ignore[list-item]
        "APOLLO: optimizer state 'projector' of APOLLO must be a tensor or a number",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=list(REFUSED))
def test_others_are_refused_when_attached_and_nothing_has_changed(make: Make, message: str) -> None:
    model, _ = bed()
    ard.wrap(model, fast_config())
    optimizer, before = make(trainable(model)), fingerprint(model)
    drawn = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"attach: optimizer must follow rank changes, got {message}") as error:
        ard.attach(model, optimizer, total_steps=STEPS)
    assert "; use AdamW, Adam, SGD" in str(error.value)
    assert str(error.value).count("; use") == 1
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    ard.attach(ard.wrap(bed()[0], ard.LoraConfig(r=2)))  # ranks that stay follow anything


def test_plain_lora_takes_any_of_them() -> None:
    model, loss = bed()
    ard.wrap(model, ard.LoraConfig(r=2))
    optimizer = Lookahead(AdamW(trainable(model), lr=0.01))
    controller = ard.attach(model, optimizer)
    for t in range(12):
        loss(t).backward()
        optimizer.step()
    assert controller.step == 12


def test_the_trial_touches_neither_optimizer_nor_scheduler() -> None:
    """Compared with a run of which the adapters never change: those of another name."""
    model, _ = bed()
    ard.wrap(model, ard.ElaConfig(r=4, deltaT=10))
    optimizer = SGD(trainable(model), lr=0.1, momentum=0.9)
    step(model, optimizer, 0)
    LambdaLR(optimizer, lambda t: min(1.0, t / 10))
    wrapper, called = vars(optimizer)["step"], getattr(optimizer, "_opt_called", None)
    state = {p: {k: v.clone() for k, v in entry.items()} for p, entry in optimizer.state.items()}
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    before, drawn = fingerprint(model), torch.get_rng_state()
    ard.attach(model, optimizer, total_steps=STEPS)
    assert vars(optimizer)["step"] is wrapper
    assert getattr(optimizer, "_opt_called", None) == called
    assert options == [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    assert state.keys() == optimizer.state.keys()
    for p, entry in state.items():
        assert all(torch.equal(value, optimizer.state[p][key]) for key, value in entry.items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert fingerprint(model) == before


@pytest.mark.filterwarnings("ignore:Using backward")
def test_state_that_a_copy_could_not_show_is_refused_after_the_first_step() -> None:
    model, loss = bed()
    ard.wrap(model, fast_config())
    optimizer = Curvature(trainable(model))
    ard.attach(model, optimizer, total_steps=STEPS)
    loss(0).backward(create_graph=True)
    with pytest.raises(ValueError, match="optimizer state 'gram' of Curvature must have an entry per weight"):
        optimizer.step()


def test_copies_of_the_weights_begin_as_the_new_rows() -> None:
    """Prodigy measures how far weights have come: a new row has come from where it began."""
    model, _ = bed()
    ard.wrap(model, fast_config())
    optimizer = Distance(trainable(model))
    ard.attach(model, optimizer, total_steps=STEPS).detach()
    step(model, optimizer, 0)
    layer = ard.adapters(model)["up"]
    (start,) = copies(optimizer, layer.lora_A).values()
    kept = start[:2].clone()
    grown = UnitUpdate((1, 0), 6)
    resize.apply(model, RankUpdate({"up": (grown,)}), optimizer)
    (start,) = copies(optimizer, layer.lora_A).values()
    assert start.shape == layer.lora_A.shape
    assert torch.equal(start[:2], kept[[1, 0]])
    assert torch.equal(start[2:8], layer.lora_A[2:8])
    assert layer.lora_A[2:8].any()
    assert not start[8:].any()
    assert copies(optimizer, layer.lora_B) == {}, "one zero stands for all of them"
    assert optimizer.state[layer.lora_B]["p0"].item() == 0.0
    state = optimizer.state[layer.lora_A]
    assert state["sum"].shape == (layer.lora_A.numel(),)
    assert state["rows"].shape == (len(layer.lora_A), 1)
    assert not state["rows"][2:].any()
    remember_copies(optimizer, set())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), shaped=st.booleans())
def test_factored_second_moments_keep_their_values(seed: int, shaped: bool) -> None:
    rng, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    old_rows, width = rng.randint(1, 16), rng.randint(1, 20)
    squares = torch.rand(old_rows, width, generator=draw).double() ** 3 + 1e-6
    row, column = squares.mean(1, keepdim=shaped), squares.mean(0, keepdim=shaped)

    def whole(moment: Factored) -> torch.Tensor:
        return moment.row.view(-1, 1) * moment.column.view(1, -1) / moment.row.mean()

    kept = rng.sample(range(old_rows), rng.randint(1, old_rows))
    grown, empty = rng.randint(0, 4), rng.randint(0, 5)
    before = Factored(row, column, "column")
    after = before.gather(kept + [-1] * (grown + empty), len(kept) + grown)
    assert after.row.shape == (len(kept) + grown + empty, *row.shape[1:])
    assert after.column.shape == column.shape
    assert torch.equal(after.row[: len(kept)], row[kept]), "rows move bit for bit"
    torch.testing.assert_close(whole(after)[: len(kept)], whole(before)[kept])
    assert after.row.mean().item() == pytest.approx(after.column.mean().item()), "both are means of one matrix"
    assert torch.allclose(after.row[len(kept) : len(kept) + grown], row[kept].mean())
    assert not after.row[len(kept) + grown :].any()


def test_factored_moments_at_their_edges() -> None:
    zero = Factored(torch.zeros(4), torch.zeros(3), "column").gather([1, -1, -1, -1], 2)
    assert not zero.row.any()
    assert not zero.column.any()
    empty = Factored(torch.rand(4), torch.rand(3), "column").gather([-1] * 4, 0)
    assert torch.isfinite(empty.column).all()
