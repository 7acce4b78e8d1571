"""The bench of the step bounds: its Hessian is that of the model it trains, and L_meta falls within the bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.optim import SGD

import ardlora_ext as ard
from ardlora_ext.bench.cli import main
from ardlora_ext.bench.quality import descent
from ardlora_ext.ranks.controllers.ard.controller import ArdController

from helpers.models import trainable


def prepared(gate: descent.Gate) -> tuple[descent.Bed, ArdController]:
    bed = descent.Bed(1)
    options = {"gate_floor": descent.FLOOR, "gate_width": descent.GATE_WIDTH}
    config = ard.ArdConfig(mode="paper", r0=2, r_max=4, lora_alpha=2, gate=gate, granularity="matrix", **options)  # type: ignore[arg-type]
    ard.wrap(bed, config)
    controller = ard.attach(bed, SGD(trainable(bed), lr=0.1))
    assert isinstance(controller, ArdController)
    return bed, controller


@pytest.mark.parametrize("gate", descent.GATES)
def test_gates_are_those_of_the_controller(gate: descent.Gate) -> None:
    bed, controller = prepared(gate)
    controller.alpha = np.array([0.5, 0.77, 1.01, 1.4])
    controller.applied()
    for alpha, layer in zip(controller.alpha.tolist(), ard.adapters(bed).values(), strict=True):
        live = layer.ranks[0]
        assert layer.gate is not None
        expected = descent.gates(gate, torch.tensor(2 * alpha, dtype=torch.float64), live)
        torch.testing.assert_close(layer.gate[:live].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gate", descent.GATES)
def test_hessian_is_that_of_the_model(gate: descent.Gate) -> None:
    bed, controller = prepared(gate)
    with torch.no_grad():
        for p in trainable(bed):
            p.copy_(torch.randn(p.shape) / 2)
    controller.alpha = np.full(descent.UNITS, 0.8)
    layer, target = next(iter(ard.adapters(bed).values())), bed.targets[0]
    live = layer.ranks[0]
    direction = torch.randn(live, descent.WIDTH)

    def loss(along_b: float, along_alpha: float) -> float:
        with torch.no_grad():
            layer.lora_B[:live] += along_b * direction
            controller.alpha[0] += along_alpha
            controller.applied()
            found = bed.loss().item()
            layer.lora_B[:live] -= along_b * direction
            controller.alpha[0] -= along_alpha
            controller.applied()
        return found

    h = descent.hessian(layer, 0.8, target, gate)
    b = direction.double().flatten()
    size = live * descent.WIDTH
    middle, step = loss(0, 0), 0.05
    in_b = (loss(step, 0) - 2 * middle + loss(-step, 0)) / step**2  # the loss is quadratic in lora_B alone
    assert in_b == pytest.approx(float(b @ h[size : 2 * size, size : 2 * size] @ b), rel=1e-2)
    in_alpha = (loss(0, step) - 2 * middle + loss(0, -step)) / step**2
    assert in_alpha == pytest.approx(float(h[-1, -1]), rel=2e-2, abs=1e-3)
    signs = ((1, 1), (1, -1), (-1, 1), (-1, -1))
    mixed = sum(i * j * loss(i * step, j * step) for i, j in signs) / (4 * step**2)
    assert mixed == pytest.approx(float(b @ h[size : 2 * size, -1]), rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("gate", descent.GATES)
def test_the_objective_falls_within_the_bounds_and_rises_outside(gate: descent.Gate) -> None:
    known = descent.known_smoothness(0, 120, gate)
    for form in descent.FORMS:
        inside, outside = (descent.descend(0, 120, gate, form, known.smoothness, c) for c in (1.0, 20.0))
        assert not inside.rises
        assert inside.losses[-1] < 0.3 * inside.losses[0]
        assert outside.rises


def test_the_command_prints_a_line_per_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["descent", "--seeds", "1", "--steps", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(descent.GATES) * (1 + len(descent.FORMS) * len(descent.MULTIPLES))
    assert "1 of 1" in lines[3]
    assert main(["descent", "--steps", "0"]) == 2
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
