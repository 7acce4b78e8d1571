"""State dicts that a user saves and loads by hand, in any order; copies of the model that average it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ardlora_ext as ard

from helpers.models import trainable
from helpers.training import STEPS, assert_equal, bed, fast_config

CONFIGS: dict[str, ard.config.AdapterConfig] = {
    "ard": fast_config(),
    "ela": ard.ElaConfig(r=4, deltaT=3, grace=2),
    "ada": ard.AdaConfig(init_r=4, target_r=2, removal=True),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
HALF = STEPS // 2


def made(config: Any) -> tuple[nn.Module, Any, AdamW]:
    model, loss = bed()
    ard.wrap(model, config)
    return model, loss, AdamW(trainable(model), lr=0.01)


def steps(loss: Any, optimizer: Any, part: range) -> None:
    for t in part:
        loss(t).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved_half_way(config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """An unbroken run, and the three states after half of it."""
    model, loss, optimizer = made(config)
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    steps(loss, optimizer, range(HALF))
    parts = {"model": model, "optimizer": optimizer, "controller": controller}
    states = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    steps(loss, optimizer, range(HALF, STEPS))
    assert len(controller.records) > 3
    return model, states


@every_config
@pytest.mark.parametrize("order", ["aMOC", "MaOC", "MOaC", "OMaC"])
def test_any_order_goes_on_bit_for_bit(config: Any, order: str) -> None:
    """a: attach; M, O, C: load the state of the model, the optimizer, the controller."""
    expected, states = saved_half_way(config)
    model, loss, optimizer = made(config)
    controller: Any = None
    for act in order:
        if act == "a":
            controller = ard.attach(model, optimizer, total_steps=STEPS)
        elif act == "C":
            controller.load_state_dict(states["controller"])
        else:
            part, name = {"M": (model, "model"), "O": (optimizer, "optimizer")}[act]
            part.load_state_dict(copy.deepcopy(states[name]))
    steps(loss, optimizer, range(HALF, STEPS))
    assert_equal(model, expected)


@every_config
@pytest.mark.parametrize("order", ["attach first", "attach last"])
def test_a_forgotten_controller_is_said_at_the_first_step(config: Any, order: str) -> None:
    _, states = saved_half_way(config)
    model, loss, optimizer = made(config)
    controller = ard.attach(model, optimizer, total_steps=STEPS) if order == "attach first" else None
    model.load_state_dict(copy.deepcopy(states["model"]))
    optimizer.load_state_dict(copy.deepcopy(states["optimizer"]))
    controller = controller or ard.attach(model, optimizer, total_steps=STEPS)
    ranks = {name: layer.ranks for name, layer in ard.adapters(model).items()}
    for _ in range(2):  # no second try trains on
        loss(HALF).backward()
        with pytest.raises(ValueError, match="controller must be resumed with model and optimizer, got one at step 0"):
            optimizer.step()
    assert ranks == {name: layer.ranks for name, layer in ard.adapters(model).items()}
    controller.load_state_dict(states["controller"])
    steps(loss, optimizer, range(HALF, HALF + 2))
    assert controller.step == HALF + 2


def test_ranks_that_are_loaded_alone_begin_a_new_schedule_from_there() -> None:
    _, states = saved_half_way(CONFIGS["ard"])
    model, loss, optimizer = made(CONFIGS["ard"])
    model.load_state_dict(copy.deepcopy(states["model"]))
    before = {name: list(layer.ranks) for name, layer in ard.adapters(model).items()}
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    loss(0).backward()
    optimizer.step()
    alpha = controller.state_dict()["alpha"]
    assert controller.step == 1
    assert [a * 2 for a in alpha] == pytest.approx([r for ranks in before.values() for r in ranks], rel=0.1)
    steps(loss, optimizer, range(1, STEPS))
    assert controller.summary()["phase"] == "frozen"


def test_ranks_that_are_loaded_under_a_new_controller_are_refused() -> None:
    _, states = saved_half_way(CONFIGS["ela"])
    model, loss, optimizer = made(CONFIGS["ela"])
    ard.attach(model, optimizer, total_steps=STEPS)
    model.load_state_dict(copy.deepcopy(states["model"]))
    loss(0).backward()
    with pytest.raises(ValueError, match="ranks must not be loaded after it without a state of the controller"):
        optimizer.step()


@pytest.mark.parametrize("registered", [True, False])
def test_accelerate(registered: bool, tmp_path: Any) -> None:
    def begun() -> tuple[Accelerator, nn.Module, Any, Any]:
        accelerator = Accelerator(cpu=True)
        model, loss, optimizer = made(CONFIGS["ard"])
        model, prepared = accelerator.prepare(model, optimizer)
        controller = ard.attach(model, prepared, total_steps=STEPS)
        if registered:
            accelerator.register_for_checkpointing(controller)
        return accelerator, model, loss, prepared

    accelerator, expected, loss, optimizer = begun()
    steps(loss, optimizer, range(HALF))
    accelerator.save_state(str(tmp_path))
    steps(loss, optimizer, range(HALF, STEPS))
    accelerator, model, loss, optimizer = begun()
    accelerator.load_state(str(tmp_path))
    if registered:
        steps(loss, optimizer, range(HALF, STEPS))
        assert_equal(model, expected)
    else:
        with pytest.raises(ValueError, match=r"accelerator\.register_for_checkpointing\(controller\) does"):
            steps(loss, optimizer, range(HALF, STEPS))
    AcceleratorState._reset_state(reset_partial_state=True)


@every_config
@pytest.mark.parametrize("capacity", ["elastic", "fixed"])
def test_an_average_follows_ranks(config: Any, capacity: str) -> None:
    options = {**vars(config), "capacity": capacity} | ({"r_max": 12} if hasattr(config, "r_max") else {})
    model, loss, optimizer = made(type(config)(**options))
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    controller.follow(average)
    for t in range(STEPS):
        steps(loss, optimizer, range(t, t + 1))
        average.update_parameters(model)
    assert controller.records
    ours, theirs = ard.adapters(model), ard.adapters(average.module)
    for name, layer in ours.items():
        assert theirs[name].ranks == layer.ranks
        assert theirs[name].lora_A.shape == layer.lora_A.shape
        change = theirs[name].get_delta_weight() - layer.get_delta_weight()
        assert change.norm() < 0.5 * layer.get_delta_weight().norm() + 1e-6
    again = AveragedModel(made(type(config)(**options))[0])
    again.load_state_dict(average.state_dict())
    assert [layer.ranks for layer in ard.adapters(again).values()] == [layer.ranks for layer in ours.values()]


def test_new_rows_of_an_average_begin_as_the_models() -> None:
    model, _, optimizer = made(CONFIGS["ard"])
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    average = copy.deepcopy(model)
    controller.follow(average)
    with torch.no_grad():
        ard.adapters(average)["up"].lora_A.mul_(0.5)
    rank = ard.adapters(model)["up"].ranks[0]
    assert controller.apply is not None
    keep = tuple(reversed(range(rank)))
    controller.apply(ard.RankUpdate({"up": (ard.UnitUpdate(keep, 4),)}))
    ours, theirs = ard.adapters(model)["up"].lora_A, ard.adapters(average)["up"].lora_A
    assert torch.equal(theirs[:rank], 0.5 * ours[:rank])
    assert torch.equal(theirs[rank:], ours[rank:])
    assert ours[rank : rank + 4].any()


def test_copies_that_cannot_follow_are_refused_and_dead_ones_forgotten() -> None:
    model, _, optimizer = made(CONFIGS["ard"])
    early = copy.deepcopy(model)
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    with pytest.raises(ValueError, match=r"copy must have the model's adapters and ranks .*copy the model after"):
        controller.follow(early)
    with pytest.raises(ValueError, match="follow: copy must have the model's adapters and ranks"):
        controller.follow(nn.Linear(2, 2))
    controller.follow(copy.deepcopy(model))
    assert controller.apply is not None
    controller.apply(ard.RankUpdate({"up": (ard.UnitUpdate((0,)),)}))


@pytest.mark.parametrize(("dtype", "warned"), [(torch.bfloat16, True), (torch.float32, False)])
def test_adapters_of_few_digits_are_named(dtype: torch.dtype, warned: bool) -> None:
    model = ard.wrap(bed()[0].to(dtype), fast_config(adapter_dtype="auto"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ard.attach(model, AdamW(trainable(model)), total_steps=STEPS)
    assert [str(w.message)[:40] for w in said] == ["attach: adapters in torch.bfloat16 lose "] * warned
