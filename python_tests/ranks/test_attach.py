"""Any training loop: the controller follows the optimizer, and refuses one that it cannot follow."""

from __future__ import annotations

import copy
import gc
import json
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

import ardlora_ext as ard
from ardlora_ext.ranks.controllers.ard.controller import ArdController

from helpers.adapters import fingerprint, scramble, set_ranks
from helpers.models import Attention, trainable
from helpers.resizing import RowProducts, step
from helpers.training import STEPS, bed, fast_config

Loop = Callable[[nn.Module, Optimizer, Callable[[int], torch.Tensor]], None]


def plain(model: nn.Module, optimizer: Optimizer, loss: Any) -> None:
    for t in range(STEPS):
        loss(t).backward()
        optimizer.step()
        optimizer.zero_grad()


def accumulated(model: nn.Module, optimizer: Optimizer, loss: Any) -> None:
    for t in range(STEPS):
        for part in (slice(0, 3), slice(3, 8)):
            loss(t, part).backward()
        optimizer.step()
        optimizer.zero_grad()


def zeroed_in_place(model: nn.Module, optimizer: Optimizer, loss: Any) -> None:
    for t in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        loss(t).backward()
        optimizer.step()


def closure(model: nn.Module, optimizer: Optimizer, loss: Any) -> None:
    """As Lightning calls the optimizer."""
    for t in range(STEPS):

        def run(t: int = t) -> torch.Tensor:
            optimizer.zero_grad()
            value: torch.Tensor = loss(t)
            value.backward()
            return value

        optimizer.step(run)


def loss_scaled(model: nn.Module, optimizer: Optimizer, loss: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(STEPS):
        scaler.scale(loss(t)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def run(loop: Loop, make: Callable[[list[nn.Parameter]], Optimizer], **options: Any) -> tuple[nn.Module, ArdController]:
    model, loss = bed()
    ard.wrap(model, fast_config(**options))
    optimizer = make(trainable(model))
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    assert isinstance(controller, ArdController)
    loop(model, optimizer, loss)
    return model, controller


@pytest.mark.parametrize("loop", [accumulated, zeroed_in_place, closure, loss_scaled])
def test_every_loop_takes_the_decisions_of_the_plain_one(loop: Loop) -> None:
    model, expected = run(plain, lambda p: SGD(p, lr=0.1, momentum=0.5), slope="tangent")
    assert expected.step == STEPS
    assert {r["event"] for r in expected.records} == {"adapt", "freeze"}
    assert expected.ranks() == {name: layer.ranks for name, layer in ard.adapters(model).items()}
    assert len({tuple(units) for units in expected.ranks().values()}) > 1, "ranks moved"
    _, controller = run(loop, lambda p: SGD(p, lr=0.1, momentum=0.5), slope="tangent")
    assert controller.alpha == pytest.approx(expected.alpha, rel=1e-4)
    assert controller.ranks() == expected.ranks()


def test_clipped_gradients_are_the_ones_observed() -> None:
    def clipped(model: nn.Module, optimizer: Optimizer, loss: Any) -> None:
        for t in range(STEPS):
            loss(t).backward()
            nn.utils.clip_grad_norm_(trainable(model), 1e-3)
            optimizer.step()
            optimizer.zero_grad()

    def scaled_by_hand(model: nn.Module, optimizer: Optimizer, loss: Any) -> None:
        for t in range(STEPS):
            loss(t).backward()
            norm = torch.stack([p.grad.norm() for p in trainable(model) if p.grad is not None]).norm()
            for p in trainable(model):
                assert p.grad is not None
                p.grad *= 1e-3 / norm
            optimizer.step()
            optimizer.zero_grad()

    (_, ours), (_, theirs) = (run(loop, lambda p: AdamW(p, lr=0.01)) for loop in (clipped, scaled_by_hand))
    fisher = ours.state_dict()["fisher"]
    assert fisher == pytest.approx(theirs.state_dict()["fisher"], rel=1e-2)
    assert 0 < max(fisher) < 1e-5


def test_a_scheduler_of_the_same_optimizer_goes_on() -> None:
    rates: list[list[float]] = []
    for attached in (False, True):
        model, loss = bed()
        ard.wrap(model, fast_config())
        optimizer = AdamW(trainable(model))
        first = OneCycleLR(optimizer, 0.05, total_steps=STEPS + 1)
        controller = ard.attach(model, optimizer, total_steps=STEPS) if attached else None
        rates.append([])
        for t in range(STEPS):
            loss(t).backward()
            optimizer.step()
            optimizer.zero_grad()
            first.step()
            rates[-1].append(optimizer.param_groups[0]["lr"])
    assert controller is not None
    assert any(r["event"] == "adapt" for r in controller.records)
    assert rates[0] == rates[1]
    assert rates[1][-1] != rates[1][0]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("prepare_first", [False, True])
def test_accelerate(accelerator: Accelerator, prepare_first: bool) -> None:
    model, loss = bed()
    ard.wrap(model, fast_config())
    optimizer: Any = AdamW(trainable(model), lr=0.01)
    if prepare_first:
        model, optimizer = accelerator.prepare(model, optimizer)
    controller = ard.attach(model, optimizer, total_steps=STEPS // 2)
    if not prepare_first:
        model, optimizer = accelerator.prepare(model, optimizer)
    for t in range(STEPS):
        with accelerator.accumulate(model):
            accelerator.backward(loss(t))
            optimizer.step()
            optimizer.zero_grad()
    assert controller.step == STEPS // 2, "one decision per optimizer step, not per backward"
    assert any(r["event"] == "adapt" for r in controller.records)


def test_records_say_what_changed_and_why() -> None:
    _, controller = run(plain, lambda p: AdamW(p, lr=0.01))
    ranks = {(name, u): 2 for name, units in controller.ranks().items() for u in range(len(units))}
    for record in json.loads(json.dumps(controller.records)):
        assert record["from"] == ranks[record["module"], record["unit"]] != record["to"]
        ranks[record["module"], record["unit"]] = record["to"]
        reason = r"marginal gain (\S+) ([<>]) price (\S+): soft rank is now \S+$|final rank from soft rank"
        said = re.match(reason, record["reason"])
        assert said
        if said[1]:
            assert (float(said[1]) > float(said[3])) == (said[2] == ">"), "the reason is true"
        assert {"step", "event", "rho", "gain", "price"} < record.keys()
    assert ranks == {(name, u): r for name, units in controller.ranks().items() for u, r in enumerate(units)}


def test_plain_lora_gets_a_controller_that_changes_nothing() -> None:
    model, loss = bed()
    ard.wrap(model, ard.LoraConfig(r=3))
    optimizer = AdamW(trainable(model), lr=0.01)
    controller = ard.attach(model, optimizer)
    plain(model, optimizer, loss)
    assert controller.ranks() == {name: [3] for name in ("q_proj", "o_proj", "up", "down")}
    assert (controller.step, controller.records, controller.summary()["phase"]) == (STEPS, [], "fixed")


def test_open_ended_run_is_made_final_by_hand() -> None:
    model, loss = bed()
    ard.wrap(model, fast_config())
    optimizer = AdamW(trainable(model), lr=0.01)
    controller = ard.attach(model, optimizer)
    assert isinstance(controller, ArdController)
    plain(model, optimizer, loss)
    assert controller.phase == "adapt"
    controller.finalize()
    assert controller.phase == "frozen"
    for layer in ard.adapters(model).values():
        assert layer.gate is not None
        assert (layer.gate[: sum(layer.ranks)] == 1).all()
    assert controller.ranks() == {name: layer.ranks for name, layer in ard.adapters(model).items()}
    assert ard.parameters_report(model).live <= controller.summary()["budget"]
    final = controller.ranks()
    controller.finalize()
    plain(model, optimizer, loss)
    assert controller.ranks() == final


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("at", [20, 21])  # ranks may change after step 22, counted from 1, and not after step 21
def test_a_gradient_that_is_no_number_skips_the_decision(value: float, factor: str, at: int) -> None:
    model, loss = bed()
    ard.wrap(model, fast_config())
    optimizer = SGD(trainable(model), lr=0.5)
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    assert isinstance(controller, ArdController)
    layer = ard.adapters(model)["o_proj"]
    read = at == 21 or getattr(layer, factor) is layer.gated  # the other factor says nothing about alpha
    # Our user's own guard comes after the controller has looked, so training can go on.
    optimizer.register_step_pre_hook(
        lambda opt, *_: [p.grad.nan_to_num_(0, 0, 0) for g in opt.param_groups for p in g["params"]] and None
    )
    losses = []
    for t in range(STEPS):
        value_t = loss(t)
        value_t.backward()
        before = controller.ranks(), controller.alpha.tolist(), [g.ranks for g in ard.adapters(model).values()]
        if t == at:
            getattr(layer, factor).grad[0, 0] = value
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value_t.item())
        if t == at:
            after = controller.ranks(), controller.alpha.tolist(), [g.ranks for g in ard.adapters(model).values()]
            assert np.isfinite(controller.alpha).all()
            assert after[2] == before[2]
            assert not read or after == before
    skips = [(r["step"], r["reason"]) for r in controller.records if r["event"] == "skip"]
    assert skips == ([(at, "gradients hold NaN or Inf, ranks stay")] if read else [])
    assert controller.phase == "frozen"
    assert max(r["step"] for r in controller.records) > at
    assert sum(losses[-10:]) < sum(losses[:10])


class Unrelated:
    pass


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda m: AdamW([m.up.base_layer.weight]),
            ValueError,
            r"optimizer must hold the adapter parameters, got none of them \(missing: q_proj\.lora_A, q_proj\.lora_B, "
            r"o_proj\.lora_A, \.\.\.\); build it after ardlora_ext\.wrap\(model, \.\.\.\)",
        ),
        (
            lambda m: AdamW([p for n, p in m.named_parameters() if "lora_" in n and n != "up.lora_B"]),
            ValueError,
            r"got 7 of 8 of them \(missing: up\.lora_B\)",
        ),
        (
            lambda m: LBFGS(trainable(m)),
            ValueError,
            "must follow rank changes, got LBFGS: optimizer state 'd' of LBFGS",
        ),
        (lambda m: Unrelated(), TypeError, r"optimizer must be a torch\.optim\.Optimizer, got Unrelated"),
    ],
    ids=["none", "some", "LBFGS", "no optimizer"],
)
def test_optimizers_that_cannot_be_followed(make: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    model = ard.wrap(Attention(), fast_config())
    optimizer, before = make(model), fingerprint(model)
    with pytest.raises(error, match=message):
        ard.attach(model, optimizer)
    assert fingerprint(model) == before
    ard.attach(model, AdamW(trainable(model)))


def test_state_that_cannot_follow_is_refused_at_once() -> None:
    model = ard.wrap(Attention(), fast_config())
    optimizer = RowProducts(trainable(model))
    step(model, optimizer, 0)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="state 'gram' of RowProducts must have an entry per"):
        ard.attach(model, optimizer)
    assert fingerprint(model) == before


def test_models_that_cannot_be_attached() -> None:
    model = Attention()
    with pytest.raises(ValueError, match=r"Attention must be wrapped: call ardlora_ext\.wrap"):
        ard.attach(model, AdamW(model.parameters()))
    ard.wrap(model, fast_config())
    optimizer = AdamW(trainable(model))
    with pytest.raises(TypeError, match=r"attach: model must be a torch\.nn\.Module, got AdamW"):
        ard.attach(optimizer, model)  # type: ignore[arg-type]
    for steps in (0, -1, "100", 1.5):
        with pytest.raises(ValueError, match=f"attach: total_steps must be a whole number >= 1, got {steps!r}"):
            ard.attach(model, optimizer, total_steps=steps)  # type: ignore[arg-type]
    ard.attach(model, optimizer)
    with pytest.raises(ValueError, match="model must not be attached already"):
        ard.attach(model, optimizer)


@pytest.mark.parametrize("call", [ard.adapters, ard.unwrap, ard.merge, lambda name: ard.wrap(name, ard.LoraConfig())])
def test_a_name_is_no_model(call: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        call("bert-base-uncased")


@pytest.mark.parametrize("leave", [ard.unwrap, ard.merge], ids=["unwrap", "merge"])
def test_the_optimizer_outlives_the_adapters(leave: Callable[[nn.Module], nn.Module]) -> None:
    model, loss = bed()
    ard.wrap(model, fast_config(modules_to_save=["down"]))
    optimizer = AdamW(trainable(model), lr=0.01)
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    loss(0).backward()
    optimizer.step()
    leave(model)
    plain(model, optimizer, loss)  # `down` goes on training, nothing else happens
    assert not ard.adapters(model)
    assert controller.step == 1
    ard.wrap(model, fast_config())
    ard.attach(model, AdamW(trainable(model)))


def test_ranks_set_by_hand_before_attach() -> None:
    model, loss = bed()
    ard.wrap(model, fast_config())
    scramble(model)
    set_ranks(model, lambda _, u: 1 + u % 2)  # alpha begins at rank 2
    optimizer = AdamW(trainable(model), lr=0.01)
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    plain(model, optimizer, loss)
    assert controller.ranks() == {name: layer.ranks for name, layer in ard.adapters(model).items()}


def test_a_copy_is_attached_on_its_own() -> None:
    model, loss = bed()
    ard.wrap(model, fast_config())
    optimizer = AdamW(trainable(model), lr=0.01)
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    clone = copy.deepcopy(model)
    before = fingerprint(clone)
    plain(model, optimizer, loss)
    assert fingerprint(clone) == before
    other = ard.attach(clone, AdamW(trainable(clone)), total_steps=STEPS)
    assert other is not controller
    assert other.step == 0


@pytest.mark.parametrize("loop", [plain, closure, loss_scaled])
@pytest.mark.parametrize("fused", [False, True])
def test_one_line_before_the_optimizer_is_made(loop: Loop, fused: bool) -> None:
    expected, _ = run(loop, lambda p: AdamW(p, lr=0.01, fused=fused))
    model, loss = bed()
    controller = ard.attach(ard.wrap(model, fast_config(total_steps=STEPS)))
    SGD([nn.Parameter(torch.zeros(()))], lr=0.1).step()  # not of this model
    loop(model, AdamW(trainable(model), lr=0.01, fused=fused), loss)
    ours, theirs = model.state_dict(), expected.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert controller.step == STEPS
    assert controller.summary()["phase"] == "frozen"


def test_the_first_step_of_an_optimizer_that_cannot_follow_says_so() -> None:
    model, _ = bed()
    ard.attach(ard.wrap(model, fast_config()))
    with pytest.raises(ValueError, match="must hold the adapter parameters, got 7 of 8"):
        AdamW(trainable(model)[1:]).step()
    with pytest.raises(ValueError, match="must follow rank changes, got LBFGS"):
        LBFGS(trainable(model)).step(lambda: torch.zeros(()))
    ard.unwrap(model)
    AdamW(trainable(model)).step()


def test_waiting_keeps_no_model_alive() -> None:
    model = bed()[0]
    ard.attach(ard.wrap(model, fast_config()))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
