"""ElaLoRA: step by step against a slow transcription, exact budget, kept optimizer state, both modes, bad input."""

from __future__ import annotations

import itertools
import json
import warnings
from typing import Any

import pytest
import torch

import ardlora_ext as ard

from helpers.slow_svd import EPS, Component, SlowModel, assert_same, batch, chain_and_teacher, gaussians, warmup_decay
from helpers.svd_runs import LR, STEPS, ela_config, ela_run

# Against the papers.


def slow_round(slow: SlowModel, t: int, phases: tuple[int, int], config: ard.ElaConfig) -> bool:
    """Prune and expand as `papers` say, one matrix and one component at a time."""
    warm, end = phases
    if not warm < t < end or (t - warm) % config.deltaT:
        return False
    p = (t - warm) / (end - warm)
    b = round(config.b * (1 - p**3)) if config.scheduler else config.b
    if b == 0:
        return False
    code = config.mode == "code"
    grace = 0 if code else round(3 / (1 - config.beta1))
    pool = []
    for m, matrix in enumerate(slow.matrices):
        judged = sorted((c.score(), i) for i, c in enumerate(matrix) if t - c.born >= grace)
        pool += [(score, m, i) for score, i in judged[: min(config.k, len(matrix) - 1)]]
    pool.sort()
    b = min(b, len(pool) // 2)
    low, high = pool[:b], pool[len(pool) - b :]
    doomed = {(m, i) for _, m, i in low}
    for m in {m for _, m, _ in low} | {m for _, m, _ in high}:
        matrix = slow.matrices[m]
        matrix[:] = [c for i, c in enumerate(matrix) if (m, i) not in doomed]
        new = sum(named == m for _, named, _ in high)
        widths = (len(matrix[0].q), len(matrix[0].p))
        draws = gaussians(config.seed + t + 1, slow.names[m], new, widths)
        old = list(matrix)
        for g_q, g_p in zip(*draws, strict=True):
            q = slow_direction(g_q, [c.q.detach() for c in matrix], [c.q.detach() for c in old], config)
            p_ = slow_direction(g_p, [c.p.detach() for c in matrix], [c.p.detach() for c in old], config)
            lam = min(min(abs(float(c.lam.detach())) for c in old), 1e-13) if code else 0.0
            matrix.append(Component(p_, q, lam, born=t + 1))
    if code:
        slow.restart()
    return True


def slow_direction(
    v: torch.Tensor, others: list[torch.Tensor], old: list[torch.Tensor], config: ard.ElaConfig
) -> torch.Tensor:
    if config.mode == "code":
        rows = torch.stack(others)
        v = v - rows.T @ (rows @ v)
        return v / (v.norm() + 1e-6)
    basis: list[torch.Tensor] = []
    for row in [*others, v]:  # classical Gram-Schmidt of normalised rows, in float64
        row = row.double()
        for _ in range(2):
            for e in basis:
                row = row - (e @ row) * e
        basis.append(row / row.norm())
    norm = sum(float(o.norm()) for o in old) / len(old) if config.new_norm == "mean" else 1.0
    return norm * basis[-1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"new_norm": "unit", "r": 3, "beta1": 0.9, "beta2": 0.8, "scheduler": False},
        {"mode": "code"},
        {"mode": "code", "clip": 0.1},
        {"clip": 1.0},
    ],
)
def test_equals_the_transcription_step_by_step(options: dict[str, Any]) -> None:
    run = ela_run(**options)
    config = run.controller.config
    clip = options.get("clip")
    slow = SlowModel(run.model, config.orth_form, config.orth_reg_weight)
    warm, final = config.phases(STEPS)
    rounds = 0
    for t in range(STEPS):
        pinned = config.mode == "code" and rounds > 0
        rate = LR * (1.0 if pinned else warmup_decay(t, STEPS))
        expected, gradients = slow.step(batch(t), run.teacher(batch(t)), rate, clip)
        if t < STEPS - final:
            slow.score(gradients, config.beta1, config.beta2)
        assert run.step() == pytest.approx(expected, rel=1e-5)
        if t < STEPS - final and not (t + 1 - warm) % 10:
            scores = [s for module in run.controller.scores().values() for s in module]
            assert scores == pytest.approx([c.score() for m in slow.matrices for c in m], rel=1e-3, abs=1e-12)
        rounds += slow_round(slow, t, (warm, STEPS - final), config)
        assert_same(run.model, slow)
    assert rounds >= 10
    assert run.controller.rounds == rounds
    assert len(set(run.ranks)) > 1


# New components.


@pytest.mark.parametrize("init", ["mean", "unit"])
def test_growth_keeps_outputs_bitwise_and_starts_orthogonal(init: Any) -> None:
    run = ela_run()
    for _ in range(20):
        run.step()
    x = batch(99)
    before = run.model(x).detach()
    layer = next(iter(ard.adapters(run.model).values()))
    old = layer.lora_A.detach()[:4].clone()
    assert run.controller.apply is not None
    run.controller.apply(ard.RankUpdate({"layers.0": (ard.UnitUpdate((0, 1, 2, 3), 3),)}, init=init))
    assert layer.ranks == [7]
    assert layer.lora_E is not None
    assert torch.equal(run.model(x), before)
    assert torch.equal(layer.lora_A[:4], old)
    for factor in (layer.lora_A, layer.lora_B):
        rows = factor.detach()[:7]
        assert rows[4:].abs().min() > 0
        unit = rows[4:] / rows[4:].norm(dim=1, keepdim=True)
        torch.testing.assert_close(unit @ unit.T, torch.eye(3), atol=1e-6, rtol=0)
        assert float((rows[:4] @ unit.T).abs().max()) < 1e-6
        norm = float(rows[:4].norm(dim=1).mean()) if init == "mean" else 1.0
        assert rows[4:].norm(dim=1).tolist() == pytest.approx([norm] * 3, rel=1e-5)


# Budget and optimizer.


@pytest.mark.parametrize("allocation", ["importance", "random_grow", "random"])
def test_budget_is_conserved_at_every_step(allocation: str) -> None:
    run = ela_run(120, allocation=allocation, deltaT=4, grace=0, rank1_candidate=True)
    for _ in range(120):
        run.step()
        assert sum(run.ranks) == 20
        assert min(run.ranks) >= 1
    assert run.controller.rounds > 10
    for record in run.controller.records:
        assert record["event"] == "exchange"
        assert record["to"] == record["from"] - record["pruned"] + record["grown"]
        assert "score" in record["reason"] or "highest" in record["reason"]


@pytest.mark.parametrize(("r", "target"), [(6, 4), (2, 4), (1, 2)])
def test_a_target_is_met_by_pruning_or_by_growing_alone(r: int, target: int) -> None:
    run = ela_run(120, r=r, target_r=target, deltaT=4, grace=0, rank1_candidate=r == 1)
    totals = [5 * r]
    for _ in range(120):
        run.step()
        totals.append(sum(run.ranks))
        assert min(run.ranks) >= 1
    steps = [b - a for a, b in itertools.pairwise(totals)]
    assert totals[-1] == 5 * target
    assert all(0 <= step * (1 if target > r else -1) <= 3 for step in steps)
    assert {record["pruned" if target > r else "grown"] for record in run.controller.records} == {0}
    model = ard.wrap(chain_and_teacher()[0], ela_config(r=2, target_r=30, deltaT=4))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"target_r must be within \d+ components of the first 10, .* got 150"):
        ard.attach(model, optimizer, total_steps=120)


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_without_an_allocation_only_the_optimizer_is_restarted(mode: str) -> None:
    run = ela_run(60, allocation="none", mode=mode, deltaT=10)
    counts = []
    for _ in range(60):
        run.step()
        counts.append(int(run.optimizer.state[next(iter(run.optimizer.state))]["step"]) if run.optimizer.state else 0)
        assert run.ranks == [4] * 5
    assert run.controller.rounds == 3
    assert counts.count(0) == (3 if mode == "code" else 0)
    assert all(module for module in run.controller.scores().values())


def test_kept_rows_keep_their_moments_bitwise_over_many_rounds() -> None:
    run = ela_run(130, deltaT=2, grace=0, scheduler=False, tinit=10, tfinal=10)
    layers = ard.adapters(run.model)
    changes = 0

    inner = run.controller.propose

    def propose() -> Any:
        nonlocal changes
        update = inner()
        if update is None:
            return None
        before = {
            (name, factor, key): run.optimizer.state[p][key].clone()
            for name in update.modules
            for factor, p in layers[name].factors.items()
            for key in ("exp_avg", "exp_avg_sq")
        }
        steps = {name: run.optimizer.state[layers[name].lora_A]["step"].clone() for name in update.modules}
        apply(update)
        for (name, factor, key), old in before.items():
            keep = list(update.modules[name][0].keep)
            new = run.optimizer.state[layers[name].factors[factor]][key]
            assert torch.equal(new[: len(keep)], old[keep])
            assert not new[len(keep) :].any()
            assert torch.equal(run.optimizer.state[layers[name].lora_A]["step"], steps[name])
        changes += 1
        return None

    assert run.controller.apply is not None
    apply = run.controller.apply
    run.controller.propose = propose  # type: ignore[method-assign]
    for _ in range(130):
        run.step()
    assert changes >= 50


def test_code_mode_resets_moments_and_pins_the_learning_rate() -> None:
    run = ela_run(100, mode="code", deltaT=5)
    head = run.model.layers[0].base_layer.bias.requires_grad_()  # type: ignore[union-attr,operator]
    run.optimizer.add_param_group({"params": [head], "lr": 1e-4, "initial_lr": 1e-4})
    used: list[list[float]] = []
    run.optimizer.register_step_post_hook(lambda o, *_: used.append([]))
    while not run.controller.rounds:
        assert run.controller.step < 20
        run.step()
    assert not run.optimizer.state
    shown = []
    for _ in range(3):
        before = head.detach().clone()
        layer = next(iter(ard.adapters(run.model).values()))
        row = layer.lora_A.detach()[0].clone()
        fresh = not run.optimizer.state
        run.step()
        shown.append(run.optimizer.param_groups[0]["lr"])
        if fresh:  # the first step of Adam is lr g / (|g| + eps)
            moved = float((layer.lora_A.detach()[0] - row).abs().max())
            assert 0.2 * LR < moved <= 1.0001 * LR
            assert float((head.detach() - before).abs().max()) <= 1.0001e-4
            assert run.optimizer.state[layer.lora_A]["step"] == 1
    assert shown == pytest.approx([LR * warmup_decay(t, 100) for t in range(run.t - 3, run.t)])
    assert len(used) == run.t


# Controls, state, errors.


@pytest.mark.parametrize("task_scores", [False, True])
def test_resumed_run_takes_the_same_decisions(task_scores: bool, tmp_path: Any) -> None:
    options = {"task_scores": task_scores, "deltaT": 5, "tfinal": 10, "capacity": "fixed", "r_max": 16}
    whole, half = ela_run(100, **options), ela_run(100, **options)
    for _ in range(43):
        half.step()
    ard.save_pretrained(half.model, tmp_path)
    resumed = ela_run(100, **options)
    base, _ = chain_and_teacher()
    resumed.model = ard.load_pretrained(base, tmp_path)
    trained = [p for p in resumed.model.parameters() if p.requires_grad]
    resumed.optimizer = torch.optim.Adam(trained, lr=LR, eps=EPS)
    resumed.controller = ard.attach(resumed.model, resumed.optimizer)  # the state knows the length of the run
    resumed.optimizer.load_state_dict(half.optimizer.state_dict())
    resumed.t = 43
    for _ in range(100):
        whole.step()
    for _ in range(57):
        resumed.step()
    assert json.loads(json.dumps(whole.controller.state_dict())) == resumed.controller.state_dict()
    for a, b in zip(ard.adapters(whole.model).values(), ard.adapters(resumed.model).values(), strict=True):
        assert torch.equal(a.get_delta_weight(), b.get_delta_weight())


def test_heads_may_have_their_own_ranks() -> None:
    model, _ = chain_and_teacher()
    ard.wrap(model, ard.ElaConfig(r=3, target_modules=["layers.0"], granularity="head", factoring="independent",
                                  head_dim={"0": 6}, b=2, deltaT=2, tinit=2, tfinal=2, grace=0))  # fmt: skip
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = ard.attach(model, optimizer, total_steps=30)
    for t in range(30):
        model(batch(t)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert sum(controller.ranks()["layers.0"]) == 12
    assert controller.rounds > 5
    assert controller.summary()["phase"] == "frozen"
    assert controller.summary()["total_rank"] == 12


def test_gradients_with_nan_are_left_out_and_said_once() -> None:
    run = ela_run(100)
    run.step()
    before = run.controller.scores()
    for layer in ard.adapters(run.model).values():
        for parameter in layer.factors.values():
            parameter.grad = torch.full_like(parameter, float("nan"))
    run.controller.propose()
    run.controller.propose()
    assert run.controller.scores() == before
    assert [record["event"] for record in run.controller.records] == ["skip"]


def test_finalize_ends_the_moves() -> None:
    run = ela_run(100, deltaT=2, grace=0)
    for _ in range(20):
        run.step()
    run.controller.finalize()
    ranks, rounds = run.ranks, run.controller.rounds
    for _ in range(40):
        run.step()
    assert (run.ranks, run.controller.rounds) == (ranks, rounds)
    assert run.controller.phase == "frozen"


def test_attach_refuses_what_cannot_work() -> None:
    model = ard.wrap(chain_and_teacher()[0], ela_config(b=6))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"pool of candidates must hold 2 b = 12 components.*got 10 from 5.*b <= 5"):
        ard.attach(model, optimizer, total_steps=100)
    model = ard.wrap(chain_and_teacher()[0], ela_config())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="total_steps must be given for ElaConfig"):
        ard.attach(model, optimizer)
    with pytest.raises(ValueError, match=r"total_steps must be >= tinit \+ tfinal \+ 11"):
        ard.attach(model, optimizer, total_steps=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ard.attach(model, optimizer, total_steps=40).step == 0
