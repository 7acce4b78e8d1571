"""The metric of the loss: its moments against plain products, its truncation against the full-space optimum."""

from __future__ import annotations

import copy
import gc
import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ardlora_ext as ard
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.native import observers, reference
from ardlora_ext.native.units import UnitLayout
from ardlora_ext.ranks import loss_metric
from ardlora_ext.ranks.loss_metric import LossMetric
from ardlora_ext.ranks.recompress import Metric, cores, factor_names, groups, recompress
from ardlora_ext.ranks.svd_prune import prune

from helpers.models import Attention, trainable

LAYOUTS = [
    UnitLayout("matrix", "shared", 1, 24, 32),
    *(UnitLayout("out_heads", f, 4, 24, 32) for f in ("shared", "independent")),  # type: ignore[arg-type]
    *(UnitLayout("in_heads", f, 4, 24, 32) for f in ("shared", "independent")),  # type: ignore[arg-type]
]
GATES = ("none", "controlled", "trained")


def adapter(layout: UnitLayout, gate: str = "none", r: int = 5) -> LoraLinear:
    layer = LoraLinear(nn.Linear(24, 32).requires_grad_(False), layout, r, 0.7, gate=gate)  # type: ignore[arg-type]
    with torch.no_grad():
        a_rows, b_rows = layout.rows(layer.ranks)
        layer.lora_A[:a_rows].normal_()
        layer.lora_B[:b_rows].normal_()
        if layer.gate is not None:
            layer.gate[: sum(layer.ranks)].uniform_(0.2, 1.0)
    return layer


def looked_at(layer: LoraLinear, *passes: tuple[torch.Tensor, torch.Tensor]) -> LossMetric:
    """The metric after one step of these (x, dy)."""
    metric = LossMetric({"x": layer})
    metric.watch(True)
    for x, dy in passes:
        layer(x.requires_grad_()).backward(dy)
    metric.watch(False)
    metric.take()
    return metric


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_are_those_of_hidden_activations(layout: UnitLayout, gate: str) -> None:
    torch.manual_seed(0)
    layer = adapter(layout, gate)
    passes = [(torch.randn(rows, 24), torch.randn(rows, 32)) for rows in (17, 6)]  # two micro-batches of one step
    metric = looked_at(layer, *passes)
    x, dy = (torch.cat(part).detach().double() for part in zip(*passes, strict=True))
    backward = sum(float(m.diagonal().sum()) for m in (
        metric.means["x"].common if layout.gate_on_a else metric.means["x"].own))  # fmt: skip
    assert backward == pytest.approx(1.0)  # gradients are weighed against those of the model
    names, scale = factor_names(layer), []
    for group, known in zip(groups(layer), metric.of("x"), strict=True):
        assert known is not None
        for i, u in enumerate(group.units):
            _, _, ins, outs = reference.unit_slices(layout, layer.ranks)[u]
            inner, outer = x[:, ins], dy[:, outs]
            k = (outer if names[1] == "lora_B" else inner) @ group.own[i].T
            h = (x if names[0] == "lora_A" else dy) if layout.shared else inner if names[0] == "lora_A" else outer
            h = h @ group.common.T
            p, q = (h.T @ h, k.T @ k / len(x)) if names[0] == "lora_B" else (h.T @ h / len(x), k.T @ k)
            on_a = names[0] == "lora_B"
            scale.append(float((known.common if on_a else known.own[i]).sum() / (p if on_a else q).sum()))
            torch.testing.assert_close(known.common, p * (scale[-1] if on_a else 1.0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(known.own[i], q * (1.0 if on_a else scale[-1]), rtol=1e-4, atol=1e-5)
    assert max(scale) == pytest.approx(min(scale), rel=1e-3)  # one for the model


def root(c: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(c)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@pytest.mark.parametrize("keep", [1, 3, 5])
def test_truncation_is_the_best_of_all_matrices_of_the_rank(keep: int) -> None:
    torch.manual_seed(1)
    layer = adapter(LAYOUTS[0], r=6)
    group = groups(layer)[0]
    inputs = torch.randn(400, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    inputs *= torch.linspace(3.0, 0.1, 24)
    grads = torch.randn(400, 32, dtype=torch.float64) * torch.linspace(2.0, 0.1, 32)
    cx, cg = inputs.T @ inputs / 400, grads.T @ grads / 400
    update = group.own[0].T @ group.common

    def cost(change: torch.Tensor) -> float:
        return float(torch.trace(change.T @ cg @ change @ cx))

    u, s, vh = torch.linalg.svd(root(cg) @ update @ root(cx))
    best = torch.linalg.solve(root(cg), (u[:, :keep] * s[:keep]) @ vh[:keep]) @ torch.linalg.inv(root(cx))
    known = Metric(group.common @ cx @ group.common.T, [group.own[0] @ cg @ group.own[0].T], 0.0)
    found = recompress(group, [keep], metric=known)
    new = found.own[0].T @ found.common
    assert cost(update - new) == pytest.approx(cost(update - best), rel=1e-6)
    assert cost(update - new) == pytest.approx(float(s[keep:].square().sum()), rel=1e-6)
    plain = recompress(group, [keep])
    assert cost(update - new) < 0.9 * cost(update - plain.own[0].T @ plain.common)
    torch.testing.assert_close(new, best, rtol=1e-6, atol=1e-8)
    size = found.common @ found.common.T  # rows of the common factor are orthogonal, of one norm
    torch.testing.assert_close(size, torch.eye(keep).double() * size[0, 0], rtol=1e-6, atol=1e-8)
    worth = torch.linalg.svdvals(cores(group, known)[0])
    torch.testing.assert_close(worth, s[:6], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pruning_in_the_metric_of_the_loss_carries_factors_and_moments(layout: UnitLayout, gate: str) -> None:
    torch.manual_seed(2)
    model = nn.Module()
    model.x = nn.Linear(24, 32)
    ard.wrap(model, ard.LoraConfig(r=5))
    model.x = adapter(layout, gate)
    layer = model.x
    optimizer = torch.optim.AdamW(layer.factors.values(), lr=1e-3)
    x, dy = torch.randn(40, 24), torch.randn(40, 32)
    layer(x).backward(dy)
    optimizer.step()
    ranks = [3] * layout.units if layout.units == 1 else [3, 0, 4, 2]
    expected = looked_at(copy.deepcopy(layer), (x, dy))
    before = groups(layer)
    results = [
        recompress(group, [ranks[u] for u in group.units], gate == "trained", known)
        for group, known in zip(before, expected.of("x"), strict=True)
    ]
    known = LossMetric({"x": layer})
    known.load_state_dict(json.loads(json.dumps(expected.state_dict())))
    prune(model, {"x": ranks}, optimizer, known)
    for group, result in zip(groups(layer), results, strict=True):
        torch.testing.assert_close(group.common, result.common, rtol=1e-5, atol=1e-6)
        for new, own in zip(group.own, result.own, strict=True):
            torch.testing.assert_close(new, own, rtol=1e-5, atol=1e-6)
    layer.zero_grad()
    after = looked_at(layer, (x, dy))  # the moments turned with their rows
    for was, now in zip(known.of("x"), after.of("x"), strict=True):
        if was is not None and now is not None:
            torch.testing.assert_close(now.common / now.common.trace(), was.common / was.common.trace(), rtol=1e-3,
                                       atol=1e-4)  # fmt: skip


def fitted(steps: int = 30) -> tuple[nn.Module, torch.optim.Optimizer, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(3)
    model = ard.wrap(Attention(), ard.LoraConfig(r=6))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    data = [(torch.randn(16, 32) * torch.linspace(3, 0.1, 32), torch.randn(16, 32)) for _ in range(steps)]
    for batch in data:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, data


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def test_compress_keeps_what_the_loss_asks_for() -> None:
    model, _, data = fitted(60)
    losses = {}
    for metric in ("update", "loss"):
        other = copy.deepcopy(model)
        batches = {"batches": data, "loss_fn": loss_of} if metric == "loss" else {}
        report = ard.compress(other, 0.3, metric=metric, **batches)  # type: ignore[arg-type]
        assert report.after <= 0.3 * report.before
        assert all(p.grad is None for p in other.parameters())
        losses[metric] = sum(loss_of(other, batch).item() for batch in data)
    assert losses["loss"] < losses["update"]


def test_bad_input_is_refused_before_anything_changes() -> None:
    model, _, data = fitted(3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for call, message in (
        (lambda: ard.compress(model, 0.5, metric="loss"), "metric='loss' must know the loss"),
        (lambda: ard.compress(model, 0.5, metric="fisher"), "metric must be one of 'update', 'loss', got 'fisher'"),
        (lambda: ard.compress(model, 0.5, batches=data), "batches must come with metric='loss'"),
        (lambda: ard.compress(model, 0.5, metric="loss", batches=[], loss_fn=loss_of), "some batch must reach"),
        (lambda: ard.svd_prune(model, {"q_proj": [1]}, metric="loss"), "svd_prune: metric='loss' must know the loss"),
    ):
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_batches_are_averaged_and_what_was_resized_begins_anew() -> None:
    torch.manual_seed(0)
    layer = adapter(LAYOUTS[0], r=3)
    batches = [(torch.randn(6, 24), torch.randn(6, 32)) for _ in range(4)]
    single = [looked_at(layer, batch).means["x"].common[0] for batch in batches]

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (model(batch[0]) * batch[1]).sum()

    metric = loss_metric.measured(layer, {"x": layer}, batches, loss)
    torch.testing.assert_close(metric.means["x"].common[0], torch.stack(single).mean(0))
    layer.set_ranks([2])
    assert metric.of("x") == [None]
    metric.watch(True)
    layer(batches[0][0]).backward(batches[0][1])
    metric.take()
    assert metric.of("x") != [None]


def test_a_step_takes_little_of_what_was_known() -> None:
    torch.manual_seed(0)
    layer = adapter(LAYOUTS[0], r=3)
    batches = [(torch.randn(6, 24), torch.randn(6, 32)) for _ in range(2)]
    first, second = (looked_at(layer, batch).means["x"] for batch in batches)
    metric = LossMetric({"x": layer})
    metric.watch(True)
    for x, dy in batches:
        layer(x).backward(dy)
        metric.take()
    metric.watch(False)
    for found, old, new in zip(metric.means["x"].common, first.common, second.common, strict=True):
        torch.testing.assert_close(found, 0.8 * old + 0.2 * new)


def test_gradients_that_are_not_finite_are_left_out() -> None:
    layer = adapter(LAYOUTS[0])
    metric = looked_at(layer, (torch.randn(8, 24), torch.randn(8, 32)))
    before = metric.means["x"].own[0].clone()
    metric.watch(True)
    layer(torch.randn(8, 24)).backward(torch.full((8, 32), float("nan")))
    metric.watch(False)
    metric.take()
    assert torch.equal(metric.means["x"].own[0], before)
    assert metric.samples == 1


def test_nothing_is_held_after_its_owner() -> None:
    gc.collect()
    before = len(observers.watched)
    layer = adapter(LAYOUTS[0])
    metric = LossMetric({"x": layer})
    metric.watch(True)
    assert len(observers.watched) == before + 1
    del metric
    gc.collect()
    assert len(observers.watched) == before


def test_a_state_of_another_model_is_refused() -> None:
    metric = looked_at(adapter(LAYOUTS[0]), (torch.randn(8, 24), torch.randn(8, 32)))
    with pytest.raises(ValueError, match=r"state: loss metric must hold 4 x 4 finite numbers, got 25"):
        LossMetric({"x": adapter(LAYOUTS[0], r=4)}).load_state_dict(metric.state_dict())
    with pytest.raises(ValueError, match="must be of the model's adapters, got 'x'"):
        LossMetric({"y": adapter(LAYOUTS[0])}).load_state_dict(metric.state_dict())


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_and_checkpointed_passes_are_seen_once(compiled: bool) -> None:
    layer = adapter(LAYOUTS[0])
    x, dy = torch.randn(8, 24, requires_grad=True), torch.randn(8, 32)
    expected = looked_at(layer, (x.detach().clone(), dy))
    metric = LossMetric({"x": layer})
    metric.watch(True)
    if compiled:
        torch.compile(layer, backend="aot_eager")(x).backward(dy)
    else:
        checkpoint(layer, x, use_reentrant=False).backward(dy)
    metric.watch(False)
    metric.take()
    torch.testing.assert_close(metric.means["x"].own[0], expected.means["x"].own[0])
    assert loss_metric.DAMPING > 0.0
