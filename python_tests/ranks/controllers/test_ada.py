"""AdaLoRA: step by step against a slow transcription and against PEFT, masking and removal, bad input."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext.ranks.controllers.svd.ada import best
from ardlora_ext.ranks.controllers.svd.schedule import Phases, rank_budget

from helpers.slow_svd import EPS, Chain, SlowModel, assert_same, batch, chain_and_teacher, warmup_decay
from helpers.svd_runs import LR, STEPS, ada_config, ada_run

# Against the paper and PEFT.


def slow_budget(t: int, config: ard.AdaConfig, total: int) -> int | None:
    """Return the budget that a mask is due for after step t, None for no mask."""
    tinit, tfinal = config.phases(total)
    first, target = 5 * config.init_r, 5 * config.target_r
    if t == total - tfinal:
        return target
    if t <= tinit or t > total - tfinal or t % config.deltaT:
        return None
    return int(target + (first - target) * (1 - (t - tinit) / (total - tfinal - tinit)) ** 3)


@pytest.mark.parametrize(
    "options",
    [
        {"deltaT": 4, "orth_reg_weight": 0.1},
        {"removal": True, "orth": "squared", "target_r": 1, "beta1": 0.8, "orth_reg_weight": 0.1},
        {"deltaT": 4, "clip": 0.1, "orth_reg_weight": 0.1},  # stronger, ||P^T P - I|| swings about 0 and last bits grow
    ],
)
def test_equals_the_transcription_step_by_step(options: dict[str, Any]) -> None:
    run = ada_run(**options)
    config = run.controller.config
    clip = options.get("clip")
    slow = SlowModel(run.model, config.orth_form, config.orth_reg_weight)
    for t in range(STEPS):
        expected, gradients = slow.step(batch(t), run.teacher(batch(t)), LR * warmup_decay(t, STEPS), clip)
        if t < STEPS - 60:
            slow.score(gradients, config.beta1, config.beta2)
        budget = slow_budget(t, config, STEPS)
        if budget is not None:
            ranked = sorted(slow.components(), key=lambda c: c.score(), reverse=True)
            for place, c in enumerate(ranked):
                c.masked = place >= budget
        if budget is not None or t > STEPS - 60:
            for c in slow.components():
                if c.masked:
                    c.value.data[-1] = 0.0
        kept = [sum(not c.masked for c in matrix) for matrix in slow.matrices]
        if config.removal or t == STEPS - 1:
            slow.matrices = [[c for c in matrix if not c.masked] for matrix in slow.matrices]
        assert run.step() == pytest.approx(expected, rel=1e-5)
        assert run.ranks == kept
        assert_same(run.model, slow)
    assert sum(run.ranks) == 5 * config.target_r
    assert [layer.ranks[0] for layer in run.layers] == run.ranks
    assert len(set(run.ranks)) > 1
    if config.target_r == 1:
        assert min(run.ranks) == 0


class WithLoss(nn.Module):
    """The chain as a model that returns its loss, which PEFT's AdaLoRA adds its regulariser to."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.layers = chain.layers

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> SimpleNamespace:
        out = Chain.forward(self, x)  # type: ignore[arg-type]
        return SimpleNamespace(loss=(out - y).square().mean())


@pytest.mark.parametrize("interval", [1, 7])
def test_takes_the_mask_decisions_of_peft(interval: int) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    total = 200
    chain, teacher = chain_and_teacher()
    schedule = {"init_r": 6, "target_r": 3, "tinit": 20, "tfinal": 30, "deltaT": interval}
    config = peft.AdaLoraConfig(
        target_modules=[f"layers.{i}" for i in range(5)], lora_alpha=12, total_step=total, **schedule
    )
    theirs = peft.get_peft_model(WithLoss(chain), config)
    ours, _ = chain_and_teacher()
    # PEFT divides by r + 1e-5.
    ard.wrap(ours, ard.AdaConfig(lora_alpha=12.0 * 6 / (6 + 1e-5), total_steps=total, **schedule))
    names = list(ard.adapters(ours))
    for name, layer in ard.adapters(ours).items():
        source = theirs.base_model.model.get_submodule(name)
        layer.lora_A.data[:6] = source.lora_A["default"].data
        layer.lora_B.data[:6] = source.lora_B["default"].data.T
    optimizers = [
        torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=LR, eps=EPS) for m in (theirs, ours)
    ]
    controller = ard.attach(ours, optimizers[1])
    decisions = 0
    for t in range(total):
        x = batch(t)
        y = teacher(x).detach()
        theirs.base_model(x, y).loss.backward()  # a PeftModel without a task would pass the regulariser by
        (ours(x) - y).square().mean().backward()
        optimizers[0].step()
        theirs.base_model.update_and_allocate(t)
        if t == total - 1:
            masked = [bool(e == 0) for n, p in theirs.named_parameters() if "lora_E" in n for e in p]
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        pattern = theirs.peft_config["default"].rank_pattern
        if pattern is not None and t < total - 1:
            wanted = [pattern[f"{name}.lora_E.default"] for name in names]
            assert controller.kept.tolist() == [kept for module in wanted for kept in module], t
            decisions += 1
    assert decisions > 150
    assert sum(masked) == 15
    assert sum(r for ranks in controller.ranks().values() for r in ranks) == 15
    weights = [theirs.base_model.model.get_submodule(n).get_delta_weight("default") for n in names]
    for layer, expected in zip(ard.adapters(ours).values(), weights, strict=True):
        torch.testing.assert_close(layer.get_delta_weight(), expected, rtol=0, atol=1e-3)


# Masks.


def test_budget_is_pefts_cubic() -> None:
    phases = Phases(20, 30, 200)
    budgets = [rank_budget(t, phases, 30, 15) for t in range(200)]
    assert budgets[:21] == [30] * 21
    assert budgets[95] == int(15 * 0.5**3 + 15)
    assert budgets[170:] == [15] * 30
    assert all(a >= b for a, b in itertools.pairwise(budgets))


def test_best_keeps_exactly_the_budget() -> None:
    scores = np.array([2.0, 2.0, 1.0, 2.0])
    assert best(scores, 2).tolist() == [False, True, False, True]
    assert best(scores, 9).all()
    assert not best(scores, 0).any()


def test_masked_components_may_come_back_removed_ones_never_do() -> None:
    masked, removed = ada_run(tinit=2), ada_run(tinit=2, removal=True)
    seen: list[list[list[bool]]] = []
    for _ in range(120):
        masked.step()
        removed.step()
        seen.append(masked.unmasked())
    flat = np.array([[kept for module in row for kept in module] for row in seen])
    assert (~flat[:-1] & flat[1:]).any()
    assert [layer.ranks for layer in masked.layers] == [[6]] * 5
    assert sum(layer.ranks[0] for layer in removed.layers) < 30
    totals = [sum(r["to"] - r["from"] for r in c.controller.records) for c in (masked, removed)]
    assert totals[0] == sum(masked.ranks) - 30
    assert totals[1] == sum(removed.ranks) - 30
    assert {r["event"] for r in removed.controller.records} == {"remove"}
    memory = [ard.parameters_report(run.model).live for run in (masked, removed)]
    assert memory[1] < memory[0]


def test_masked_components_are_taken_out_at_the_end_without_a_change() -> None:
    run = ada_run(60, tinit=5, tfinal=10)
    for _ in range(59):
        run.step()
    assert [layer.ranks for layer in run.layers] == [[6]] * 5
    assert sum(map(sum, run.unmasked())) == 15
    inner, outputs = run.controller.apply, []
    assert inner is not None
    run.controller.propose, propose = lambda: outputs.append(propose()), run.controller.propose  # type: ignore
    run.step()
    before = run.model(batch(7))
    inner(outputs[0])
    torch.testing.assert_close(run.model(batch(7)), before, rtol=0, atol=1e-6)
    assert sum(layer.ranks[0] for layer in run.layers) == 15
    assert run.controller.summary()["phase"] == "frozen"


def test_finalize_meets_the_target_now() -> None:
    run = ada_run()
    for _ in range(40):
        run.step()
    run.controller.finalize()
    assert sum(layer.ranks[0] for layer in run.layers) == 15
    run.step()
    assert sum(run.ranks) == 15
    assert len(run.controller.scores()["layers.0"]) == run.ranks[0]


@pytest.mark.parametrize("removal", [False, True])
def test_resumed_run_takes_the_same_decisions(removal: bool, tmp_path: Any) -> None:
    options = {"removal": removal, "tinit": 5, "tfinal": 10, "capacity": "fixed"}
    whole, half, resumed = (ada_run(80, **options) for _ in range(3))
    for _ in range(33):
        half.step()
    ard.save_pretrained(half.model, tmp_path)
    base, _ = chain_and_teacher()
    resumed.model = ard.load_pretrained(base, tmp_path)
    resumed.layers = list(ard.adapters(resumed.model).values())
    resumed.optimizer = torch.optim.Adam([p for p in base.parameters() if p.requires_grad], lr=LR, eps=EPS)
    resumed.controller = ard.attach(resumed.model, resumed.optimizer)  # the state knows the length of the run
    resumed.optimizer.load_state_dict(half.optimizer.state_dict())
    resumed.t = 33
    for _ in range(80):
        whole.step()
    for _ in range(47):
        resumed.step()
    assert json.loads(json.dumps(whole.controller.state_dict())) == resumed.controller.state_dict()
    for a, b in zip(whole.layers, resumed.layers, strict=True):
        assert torch.equal(a.get_delta_weight(), b.get_delta_weight())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_r": 4, "target_r": 8}, "init_r must be >= target_r = 8, got 4"),
        ({"target_r": 0}, "target_r must be >= 1"),
        ({"total_steps": 50, "tinit": 30, "tfinal": 20}, r"total_steps must be >= tinit \+ tfinal \+ 1 = 51, got 50"),
        ({"granularity": "head"}, "head' with factoring='independent'"),
    ],
)
def test_bad_configs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ard.AdaConfig(**options)


def test_attach_needs_the_length_of_the_run() -> None:
    model, _ = chain_and_teacher()
    ard.wrap(model, ada_config())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="total_steps must be given for AdaConfig"):
        ard.attach(model, optimizer)
    with pytest.raises(ValueError, match="got 70"):
        ard.attach(model, optimizer, total_steps=70)


def test_a_checkpoint_knows_other_shapes() -> None:
    a, b = ada_run(), ada_run(removal=True)
    for _ in range(60):
        b.step()
    with pytest.raises(ValueError, match="kept must have 30 entries"):
        a.controller.load_state_dict(b.controller.state_dict())
