"""The regularised step of alpha against brute force, and every ARD mode in a real run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

import ardlora_ext as ard
from ardlora_ext.ranks.controllers.ard.regularizer import Variation, alpha_step, solve_chain
from ardlora_ext.ranks.controllers.costs import Floats

from helpers.models import Attention, trainable

VARIATIONS: tuple[Variation, ...] = ("temporal_sq", "temporal_abs", "layer_sq", "layer_abs", "none")
CHAINS = [np.array([0, 2, 4]), np.array([1, 3])]


def variation(mode: Variation, a: Floats, alpha: Floats) -> float:
    """V(a) as the module's table writes it."""
    if mode == "none":
        return 0.0
    d = a - alpha if mode.startswith("temporal") else np.concatenate([np.diff(a[c]) for c in CHAINS])
    return float((d**2).sum() / 2 if mode.endswith("sq") else np.abs(d).sum())


def problem(seed: int) -> tuple[Floats, Floats, Floats]:
    rng = np.random.default_rng(seed)
    return rng.uniform(1.5, 3.0, 5), rng.normal(size=5), rng.uniform(0.5, 1.5, 5)


@pytest.mark.parametrize("mode", VARIATIONS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bounded", [False, True])
def test_prox_is_the_minimiser(mode: Variation, seed: int, bounded: bool) -> None:
    alpha, grad, weight = problem(seed)
    step, price, tv = 0.3, 0.7, 0.9
    wide = np.full(5, 1e-3), np.full(5, 50.0)
    if bounded:  # some bounds are active, and differ
        wide = np.array([1e-3, 2.2, 1e-3, 1e-3, 2.5]), np.array([1.5, 3.0, 2.0, 0.5, 50.0])
    ours = alpha_step(alpha, alpha, grad, weight, wide, step, price, tv, mode, False, CHAINS)
    assert ((wide[0] <= ours) & (ours <= wide[1])).all()

    def objective(a: Floats) -> float:
        smooth = grad @ a + price * weight @ np.abs(a) + ((a - alpha) ** 2).sum() / (2 * step)
        return float(smooth + price * tv * variation(mode, a, alpha))

    best = objective(ours)
    rng = np.random.default_rng(seed + 50)
    for scale in (1e-1, 1e-2, 1e-3, 1e-4):
        for _ in range(200):
            other = np.clip(ours + scale * rng.normal(size=5) * (rng.random(5) < 0.6), *wide)
            assert objective(other) >= best - 1e-12


@pytest.mark.parametrize("mode", VARIATIONS)
def test_explicit_form_follows_the_gradient(mode: Variation) -> None:
    alpha, grad, weight = problem(7)
    previous, step, price, tv = alpha + 0.1, 0.05, 0.7, 0.9
    bounds = np.zeros(5), np.full(5, 9.0)
    ours = alpha_step(alpha, previous, grad, weight, bounds, step, price, tv, mode, True, CHAINS)
    numeric = np.zeros(5)
    for i in range(5):
        e = np.eye(5)[i] * 1e-6
        numeric[i] = (variation(mode, alpha + e, previous) - variation(mode, alpha - e, previous)) / 2e-6
    np.testing.assert_allclose(ours, alpha - step * (grad + price * weight + price * tv * numeric), atol=1e-7)


def test_temporal_prox_is_a_smaller_step() -> None:
    """What papers on the method leave implicit: the proximal quadratic TV only divides the step."""
    alpha, grad, weight = problem(1)
    bounds = np.zeros(5), np.full(5, 9.0)
    damped = alpha_step(alpha, alpha, grad, weight, bounds, 0.1, 0.5, 3.0, "temporal_sq", False, [])
    smaller = alpha_step(alpha, alpha, grad, weight, bounds, 0.1 / (1 + 0.1 * 0.5 * 3.0), 0.5, 0.0, "none", False, [])
    np.testing.assert_allclose(damped, smaller, rtol=1e-14)


ROUNDING = 1e-12  # nearer to a bound or to each other than this, values are there


@st.composite
def chains(draw: st.DrawFn) -> tuple[Floats, Floats, Floats, float]:
    """Targets, bounds (some equal, many active) and a strength."""
    n = draw(st.integers(1, 9))
    fine = st.floats(-4, 4).map(lambda v: round(v, 6))  # boxes thinner than rounding have no exact solution
    grid = st.one_of(fine, st.integers(-4, 4).map(float))  # ties on purpose
    z, a, b = (np.array(draw(st.lists(grid, min_size=n, max_size=n))) for _ in range(3))
    strength = draw(st.one_of(st.floats(1e-3, 20), st.sampled_from([0.0, 0.5, 1.0, 1e4])))
    return z, np.minimum(a, b), np.maximum(a, b), strength


@settings(max_examples=200, deadline=None)
@given(chains())
def test_bounded_quadratic_chain_is_the_least_squares_solution(case: tuple[Floats, Floats, Floats, float]) -> None:
    z, low, high, strength = case
    ours = solve_chain(z, low, high, strength, square=True)
    assert ((low <= ours) & (ours <= high)).all()
    d = np.diff(ours, append=ours[-1], prepend=ours[0])
    slope = ours - z + strength * (d[:-1] - d[1:])
    slack = 1e-10 * (1 + strength)
    assert (slope[high - ours > ROUNDING] >= -slack).all(), "nothing is gained upwards"
    assert (slope[ours - low > ROUNDING] <= slack).all(), "nor downwards"
    if (high - low).min() > 1e-3:  # what scipy accepts; an exact active-set method
        rows = np.concatenate([np.eye(len(z)), np.sqrt(strength) * np.diff(np.eye(len(z)), axis=0)])
        target = np.concatenate([z, np.zeros(len(z) - 1)])
        slow = lsq_linear(rows, target, (low, high), method="bvls", tol=1e-14).x
        np.testing.assert_allclose(ours, slow, atol=1e-8)


@settings(max_examples=300, deadline=None)
@given(chains())
@example((np.zeros(5), np.array([0.0, -1, 0, 0, 0]), np.array([0.0, -1, 8.6e-295, 1, 1]), 1.0))
def test_bounded_absolute_chain_meets_the_optimality_conditions(case: tuple[Floats, Floats, Floats, float]) -> None:
    """a - z + D^T u + v = 0 with u_l in strength * sign(a_l - a_{l+1}), v pushing at active bounds only."""
    z, low, high, strength = case
    ours = solve_chain(z, low, high, strength, square=False)
    assert ((low <= ours) & (ours <= high)).all()
    least = most = 0.0  # what u_l may be, by the entries up to l
    for entry, a in enumerate(ours):
        least = least + z[entry] - a if high[entry] - a > ROUNDING else -np.inf
        most = most + z[entry] - a if a - low[entry] > ROUNDING else np.inf
        if entry == len(z) - 1:
            allowed = 0.0, 0.0
        elif abs(a - ours[entry + 1]) > ROUNDING:
            allowed = (strength * np.sign(a - ours[entry + 1]),) * 2
        else:
            allowed = -strength, strength
        least, most = max(least, allowed[0]), min(most, allowed[1])
        assert least <= most + 1e-10 * (1 + strength)


MODES: list[dict[str, object]] = [
    *(
        {"gate": gate, "slope": slope}
        for gate in ("ramp", "ste", "sigmoid", "scale")
        for slope in ("secant", "tangent")
    ),
    *({"variation": v, "variation_form": f} for v in VARIATIONS for f in ("prox", "explicit")),
    {"granularity": "layer"},
    {"granularity": "matrix"},
    {"factoring": "independent"},
    {"normalize": False, "lr_alpha": 1.0},
    {"cost_weighted": False},
    {"reorder": False},
    {"l1": 0.5},
]


@pytest.mark.parametrize("mode", MODES, ids=lambda m: ",".join(f"{k}={v}" for k, v in m.items()))
def test_every_mode_trains_and_ends_with_whole_ranks(mode: dict[str, object]) -> None:
    model = Attention()
    settings: dict[str, object] = {
        "mode": "paper",
        "granularity": "head",
        "r0": 3,
        "head_dim": 8,
        "total_steps": 60,
        "lr_alpha": 0.05,
        "update_interval": 5,
    }
    ard.wrap(model, ard.ArdConfig(**(settings | mode)))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    controller = ard.attach(model, optimizer)
    x, y = torch.randn(32, 32), torch.randn(32, 32)
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    layers = ard.adapters(model)
    assert controller.ranks() == {name: layer.ranks for name, layer in layers.items()}
    assert all(
        layer.gate is not None and bool((layer.gate[: sum(layer.ranks)] == 1).all()) for layer in layers.values()
    )
    if "l1" not in mode:
        assert ard.parameters_report(model).live <= controller.summary()["budget"]


def test_bilevel_reads_held_out_gradients_and_leaves_those_of_training() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 32, 32), torch.randn(2, 32, 32)

    def run(held_out: int | None) -> tuple[list[float], list[torch.Tensor]]:
        torch.manual_seed(1)
        model = ard.wrap(
            Attention(),
            ard.ArdConfig(mode="paper", granularity="head", r0=3, head_dim=8, total_steps=30, lr_alpha=0.05),
        )
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)

        def holdout() -> torch.Tensor:
            assert held_out is not None
            out: torch.Tensor = (model(x[held_out]) - y[held_out]).square().mean()
            return out

        controller = ard.attach(model, optimizer, holdout=None if held_out is None else holdout)
        grads = []
        for _ in range(15):
            (model(x[0]) - y[0]).square().mean().backward()
            grads.append(torch.cat([p.grad.flatten().clone() for p in trainable(model) if p.grad is not None]))
            optimizer.step()
            optimizer.zero_grad()
        return controller.state_dict()["fisher"], grads

    same, other, plain = run(0), run(1), run(None)
    assert same[0] == pytest.approx(plain[0], rel=1e-5), "the training batch as held-out batch is single-level"
    assert other[0] != pytest.approx(plain[0], rel=1e-2)
    assert torch.equal(other[1][0], plain[1][0])
    model = ard.wrap(Attention(), ard.LoraConfig())
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with pytest.raises(ValueError, match="holdout must come with ArdConfig, got LoraConfig"):
        ard.attach(model, optimizer, holdout=lambda: torch.zeros(()))


def test_step_bound_of_the_theorem() -> None:
    model = ard.wrap(Attention(), ard.ArdConfig(mode="paper", granularity="head", r0=3, head_dim=8, total_steps=60))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    controller = ard.attach(model, optimizer)
    assert isinstance(controller, ard.ArdController)
    x, y = torch.randn(32, 32), torch.randn(32, 32)
    for _ in range(30):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = controller.step_bound()
    assert found["lipschitz"] > 0
    expected = 1.0 / (found["lipschitz"] + controller.price * controller.config.tv)
    assert found["bound"] == pytest.approx(expected)
    assert found["obeys"] == (controller.config.lr_alpha <= expected)
