"""Everything that runs on a CUDA device, on a fake one: nothing may mix it with the host (`far_device.py`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import ardlora_ext as ard
from ardlora_ext.config import AdapterConfig
from ardlora_ext.layers.experts import ExpertStack
from ardlora_ext.layers.start.orthogonal import blocks
from ardlora_ext.model.gradient_start import _point, _Sketch
from ardlora_ext.model.merge import merge_adapter, unmerge_adapter
from ardlora_ext.ranks.eight_bit import EightBit, gathered

from helpers.experts import tiny_experts, tokens
from helpers.far_device import FAR, far_device
from helpers.models import Attention, trainable

ARD = ard.ArdConfig(
    mode="paper", granularity="head", r0=3, r_max=6, head_dim=8, update_interval=2, lr_alpha=0.1, lora_dropout=0.1
)
ELA = {"r": 4, "b": 2, "deltaT": 2, "tinit": 2, "tfinal": 4}
ADA = {"init_r": 6, "target_r": 4, "tinit": 2, "tfinal": 4, "deltaT": 2}
CONFIGS: dict[str, AdapterConfig] = {
    "lora": ard.LoraConfig(r=4, init="orthogonal", capacity="fixed"),
    "lora heads": ard.LoraConfig(r=4, granularity="head", head_dim=8),
    "pissa": ard.LoraConfig(r=4, init="pissa"),
    "dora": ard.DoraConfig(r=4),
    "ard": ARD,
    "ard tangent": ard.ArdConfig(
        mode="paper", granularity="head", r0=3, head_dim=8, update_interval=2, slope="tangent", factoring="independent"
    ),
    "ard layer": ard.ArdConfig(mode="paper", r0=3, granularity="layer", update_interval=2, variation="layer_sq"),
    "elalora": ard.ElaConfig(**ELA, grace=0),  # type: ignore[arg-type]
    "elalora code": ard.ElaConfig(**ELA, mode="code"),  # type: ignore[arg-type]
    "elalora heads": ard.ElaConfig(**ELA, granularity="head", head_dim=8, factoring="independent"),  # type: ignore[arg-type]
    "adalora": ard.AdaConfig(**ADA),  # type: ignore[arg-type]
    "adalora removal": ard.AdaConfig(**ADA, removal=True),  # type: ignore[arg-type]
}


def wrapped(config: AdapterConfig) -> nn.Module:
    return ard.wrap(Attention().to(FAR), config)


def loss(model: nn.Module) -> torch.Tensor:
    x = torch.randn(6, 32, device=FAR)
    result: torch.Tensor = (model(x) - x).square().mean()
    return result


def fit(model: nn.Module, steps: int, **options: Any) -> tuple[ard.Controller[Any], AdamW]:
    optimizer = AdamW(trainable(model), lr=1e-2)
    controller = ard.attach(model, optimizer, total_steps=20, **options)
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return controller, optimizer


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_training_with_rank_changes(config: AdapterConfig) -> None:
    with far_device():
        model = wrapped(config)
        for layer in ard.adapters(model).values():
            assert layer.rank_table.device.type == "cpu"  # native tables are made of it
            assert layer.get_delta_weight().device == FAR
        controller, _ = fit(model, 20)
        assert {t.device for t in (*model.parameters(), *model.buffers())} == {FAR}
        controller.load_state_dict(controller.state_dict())
        assert controller.step == 20


@pytest.mark.parametrize("config", ["lora", "ard", "elalora", "adalora"])
def test_experts_with_rank_changes(config: str) -> None:
    options: dict[str, AdapterConfig] = {
        "lora": ard.LoraConfig(r=2, lora_dropout=0.1),
        "ard": ard.ArdConfig(mode="paper", r0=2, r_max=4, update_interval=2, lr_alpha=0.1, lora_dropout=0.1),
        "elalora": ard.ElaConfig(**ELA),  # type: ignore[arg-type]
        "adalora": ard.AdaConfig(**ADA),  # type: ignore[arg-type]
    }
    model, ids = tiny_experts("mixtral").bfloat16().train(), tokens(2, 8)
    model.set_experts_implementation("grouped_mm")
    with far_device():
        model = ard.wrap(model.to(FAR), options[config])
        optimizer = AdamW(trainable(model), lr=1e-2)
        controller = ard.attach(model, optimizer, total_steps=20)
        for _ in range(8):
            model(input_ids=ids.to(FAR), labels=ids.to(FAR)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        stacks = [layer for layer in ard.adapters(model).values() if isinstance(layer, ExpertStack)]
        assert len(stacks) == 4
        assert {stack.tokens.device for stack in stacks} == {FAR}
        controller.finalize()


def test_training_with_a_holdout() -> None:
    with far_device():
        model = wrapped(ARD)
        fit(model, 6, holdout=lambda: loss(model))


def _finalize(model: nn.Module) -> None:
    controller, _ = fit(model, 6)
    controller.finalize()


def _merge(model: nn.Module) -> None:
    fit(model, 6)
    merge_adapter(model)
    unmerge_adapter(model)
    ard.merge(model)


def _named(model: nn.Module) -> None:
    ard.add_adapter(model, "other", ard.LoraConfig(r=4))
    ard.set_adapter(model, "other")
    loss(model)
    with ard.disable_adapter(model):
        loss(model)


def _compress(model: nn.Module) -> None:
    controller, optimizer = fit(model, 6)
    controller.finalize()
    ard.compress(model, 0.5, optimizer=optimizer)


def _prune(model: nn.Module) -> None:
    controller, optimizer = fit(model, 6)
    controller.finalize()
    ranks = {name: [max(r - 1, 0) for r in layer.ranks] for name, layer in ard.adapters(model).items()}
    ard.svd_prune(model, ranks, optimizer)


def _reload(model: nn.Module) -> None:
    model.load_state_dict(model.state_dict())
    larger = wrapped(ard.ArdConfig(mode="paper", granularity="head", r0=6, r_max=6, head_dim=8))
    if any(layer.lora_gate is not None for layer in ard.adapters(model).values()):
        model.load_state_dict(larger.state_dict())
    assert {t.device for t in (*model.parameters(), *model.buffers())} == {FAR}


def _singular_values(model: nn.Module) -> None:
    for layer in ard.adapters(model).values():
        assert layer.singular_values().device.type == "cpu"
        assert {t.device for t in layer.fold()} == {FAR}


ACTIONS = (_finalize, _merge, _named, _compress, _prune, _reload, _singular_values)


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__[1:])
@pytest.mark.parametrize("name", ["lora heads", "ard", "elalora", "adalora", "dora"])
def test_what_else_is_done_with_a_model(name: str, action: Callable[[nn.Module], None]) -> None:
    with far_device():
        action(wrapped(CONFIGS[name]))


@pytest.mark.parametrize("config", [ARD, ard.DoraConfig(r=4), ard.ElaConfig(**ELA)], ids=["ard", "dora", "elalora"])  # type: ignore[arg-type]
@pytest.mark.filterwarnings("ignore:save_pretrained:UserWarning")  # nothing was attached
def test_loading(config: AdapterConfig, tmp_path: Path) -> None:
    ard.save_pretrained(ard.wrap(Attention(), config), tmp_path)
    with far_device():
        model = ard.load_pretrained(Attention().to(FAR), tmp_path)
        assert {t.device for t in (*model.parameters(), *model.buffers())} == {FAR}


def test_start_from_gradients() -> None:
    with far_device():
        for layer in ard.adapters(wrapped(CONFIGS["lora heads"])).values():
            k, n = layer.layout.in_features, layer.layout.out_features
            sketches = [_Sketch(layer, block, torch.Generator()) for block in blocks(layer.layout, layer.ranks)]
            for _ in range(2):
                for sketch in sketches:
                    sketch.add(torch.randn(5, k, device=FAR), torch.randn(5, n, device=FAR))
                    sketch.turn()
                    sketch.add(torch.randn(5, k, device=FAR), torch.randn(5, n, device=FAR))
            _point(layer, sketches)


def test_mixing_and_host_memory_are_noticed() -> None:
    with far_device():
        model = wrapped(CONFIGS["adalora"])
        layer = next(iter(ard.adapters(model).values()))
        with pytest.raises(RuntimeError, match="on the same device"):
            layer.lora_A @ torch.randn(32, 2)
        with pytest.raises(TypeError, match="must be copied"):
            layer.lora_A.detach().numpy()
        controller, _ = fit(model, 3)
        assert isinstance(controller, ard.AdaController)
        controller.importance.sensitivity[0][0] = controller.importance.sensitivity[0][0].cpu()
        controller.importance._blocks[0, 2] = controller.importance.sensitivity[0][0].data_ptr()
        loss(model).backward()
        with pytest.raises(AssertionError, match="was given memory of the host"):
            controller.importance.update()


STEADY: dict[str, tuple[AdapterConfig, int]] = {  # a config that decides nothing for long, and waits of its steps
    "lora": (ard.LoraConfig(r=4, lora_dropout=0.1), 0),
    "dora": (ard.DoraConfig(r=4), 0),
    "anneal": (ard.ArdConfig(r0=4, head_dim=8, update_interval=8), 0),
    "anneal heads": (ard.ArdConfig(r0=4, granularity="head", head_dim=8, update_interval=8), 0),
    "ard": (ard.ArdConfig(mode="paper", granularity="head", r0=3, head_dim=8, update_interval=100), 1),
    "ard tangent": (ard.ArdConfig(mode="paper", r0=3, slope="tangent", update_interval=100), 1),
    "elalora": (ard.ElaConfig(r=4, b=2, deltaT=500, tinit=2, tfinal=4), 0),  # type: ignore[arg-type]
    "adalora": (ard.AdaConfig(init_r=6, target_r=4, tinit=2, tfinal=4, deltaT=500), 0),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", STEADY)
def test_a_step_without_a_decision_waits_for_nothing(name: str) -> None:
    config, most = STEADY[name]
    with far_device() as waits:
        model = wrapped(config)
        optimizer = AdamW(trainable(model), lr=1e-2)
        controller = ard.attach(model, optimizer, total_steps=1000)
        waits.seen.clear()
        for waits.step in range(1, 8):
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        late = [what for step, what in waits.seen if step > 1]
        assert late == ["an answer in the step that asks"] * (6 * most)
        assert controller.step == 7


@pytest.mark.parametrize("width", [100, 512], ids=["blocks of several rows", "whole blocks"])
def test_eight_bit_moments_wait_once_however_many_there_are(width: int) -> None:
    with far_device() as waits:
        maps = [torch.linspace(-1, 1, 256, device=FAR) for _ in range(6)]
        codes = torch.zeros(4, width, dtype=torch.uint8, device=FAR)
        moments = [EightBit(codes, torch.ones(-(-4 * width // 256), device=FAR), qmap, 256) for qmap in maps]
        moved = gathered(moments, [[1, 0, -1]] * 6)
        assert {t.device for moment in moved for t in (moment.codes, moment.scale)} == {FAR}
        assert [what for _, what in waits.seen] == ["an answer in the step that asks"] * (width == 100)  # maps are new
        waits.seen.clear()
        gathered(moved, [[2, 1, 0, -1]] * 6)
        assert waits.seen == []


def test_experts_do_not_add_waits() -> None:
    """Beside those of the model's own routing."""
    options: dict[str, AdapterConfig] = {
        "lora": ard.LoraConfig(r=2),
        "paper": ard.ArdConfig(mode="paper", r0=2, r_max=4, update_interval=100),
        "elalora": ard.ElaConfig(r=4, b=2, deltaT=500, tinit=2, tfinal=4),  # type: ignore[arg-type]
        "adalora": ard.AdaConfig(init_r=6, target_r=4, tinit=2, tfinal=4, deltaT=500),  # type: ignore[arg-type]
    }
    found = {}
    for name, config in options.items():
        model, ids = tiny_experts("mixtral").bfloat16().train(), tokens(2, 8)
        model.set_experts_implementation("grouped_mm")
        with far_device() as waits:
            model = ard.wrap(model.to(FAR), config)
            optimizer = AdamW(trainable(model), lr=1e-2)
            ard.attach(model, optimizer, total_steps=1000)
            ids = ids.to(FAR)
            for waits.step in range(3):
                waits.seen.clear()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            found[name] = [what for _, what in waits.seen]
    of_paper = "an answer in the step that asks"
    assert found["elalora"] == found["adalora"] == found["lora"]
    assert sorted(found["paper"]) == sorted([*found["lora"], of_paper, of_paper])  # row dots, and the experts' tokens
