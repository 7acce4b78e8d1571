"""The soft orthogonality of P and Q in gradients: once a step, before the clip, when it is due."""

from __future__ import annotations

import pytest
import torch

import ardlora_ext as ard

from helpers.slow_svd import SlowModel, batch
from helpers.svd_runs import ela_run


def test_regulariser_acts_in_train_mode_only_and_every_n_steps() -> None:
    run, without = ela_run(orth_interval=3, orth_reg_weight=100.0), ela_run(orth_reg_weight=0.0)
    layers = list(ard.adapters(run.model).values())
    without.model(batch(0)).square().mean().backward()
    plain = [layer.lora_A.grad for layer in ard.adapters(without.model).values()]

    def added() -> list[bool]:
        run.optimizer.zero_grad()
        run.model(batch(0)).square().mean().backward()
        run.controller.observe()
        pairs = zip((layer.lora_A.grad for layer in layers), plain, strict=True)
        return [a is not None and b is not None and not torch.equal(a, b) for a, b in pairs]

    assert all(added())
    run.controller.step = 1
    assert not any(added())
    run.controller.step = 3
    layers[2].eval()
    assert added() == [True, True, False, True, True]


@pytest.mark.parametrize("keep_zeros", [False, True])
def test_regulariser_enters_once_a_step_before_the_clip(keep_zeros: bool) -> None:
    """However many micro-batches there are, and whatever was thrown away before."""
    run = ela_run(orth_reg_weight=10.0)
    trained = [p for p in run.model.parameters() if p.requires_grad]

    def backward(times: int) -> list[torch.Tensor]:
        run.optimizer.zero_grad(set_to_none=not keep_zeros)
        for _ in range(times):
            ((run.model(batch(0)) - run.teacher(batch(0))).square().mean() / times).backward()
        return [p.grad.clone() for p in trained if p.grad is not None]

    slow = SlowModel(run.model, run.controller.config.orth_form, 10.0)
    values = [c.value for c in slow.components()]
    task = (slow.forward(batch(0).double()) - run.teacher(batch(0)).double()).square().mean()
    whole = torch.autograd.grad(task + slow.regulariser(), values)
    expected = torch.cat(list(whole)).norm()
    found = torch.cat([g.flatten() for g in backward(1)]).norm()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    run.controller.observe()  # as before a step: nothing is added again
    again = torch.cat([p.grad.flatten() for p in trained if p.grad is not None]).norm()
    assert float(again) == float(found)
    assert float(torch.cat([g.flatten() for g in backward(3)]).norm()) == pytest.approx(float(expected), rel=1e-5)
    if not keep_zeros:  # the step was skipped and its gradients thrown away
        assert float(torch.cat([g.flatten() for g in backward(2)]).norm()) == pytest.approx(float(expected), rel=1e-5)


def test_detached_controllers_add_nothing() -> None:
    run = ela_run(orth_reg_weight=10.0)
    run.controller.detach()
    (run.model(batch(0)) - run.teacher(batch(0))).square().mean().backward()
    with_hooks = [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
    other = ela_run(orth_reg_weight=0.0)
    (other.model(batch(0)) - other.teacher(batch(0))).square().mean().backward()
    assert all(map(torch.equal, with_hooks, (p.grad for p in other.model.parameters() if p.grad is not None)))
