"""What a device says when nobody waits for it: the same ranks, records and state as if everybody had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.optim import AdamW

import ardlora_ext as ard
from ardlora_ext.native.transfers import Fetched

from helpers.models import Attention, trainable

STEPS, BROKEN = 24, (3, 4, 9, 11)  # steps whose gradients are not finite when they are looked at
CONFIGS: dict[str, Any] = {
    "paper": ard.ArdConfig(mode="paper", r0=3, r_max=6, update_interval=3, lr_alpha=0.1, l1=2e-2),
    "anneal": ard.ArdConfig(r0=3, update_interval=4),
    "elalora": ard.ElaConfig(r=4, b=2, deltaT=2, tinit=2, tfinal=4, grace=0),
    "adalora": ard.AdaConfig(init_r=6, target_r=4, tinit=2, tfinal=4, deltaT=2),
    "adalora to the end": ard.AdaConfig(init_r=6, target_r=4, tinit=2, tfinal=0, deltaT=2, task_scores=True),
}


class Late(Fetched):
    """Answers that are said not to be there yet."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__([t.clone() for t in tensors])
        self.there = False


def trained(config: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    model = ard.wrap(Attention(), config)
    optimizer = AdamW(trainable(model), lr=1e-2)
    broken = next(iter(ard.adapters(model).values())).lora_A
    held: list[torch.Tensor] = []

    def spoil(*_: Any) -> None:
        assert broken.grad is not None
        held.append(broken.grad.clone())
        if controller.step in BROKEN:
            broken.grad.view(-1)[0] = float("nan")

    def mend(*_: Any) -> None:
        broken.grad = held.pop()

    # AdamW itself steps on good ones; methods look before and after it.
    optimizer.register_step_pre_hook(spoil)
    optimizer.register_step_post_hook(spoil)
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    optimizer.register_step_pre_hook(mend)
    optimizer.register_step_post_hook(lambda *_: held.clear())
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(2))
    for _ in range(STEPS):
        (model(x) - x.flip(0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    records = list(controller.records)
    return {**controller.state_dict(), "seen": records}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_late_answer_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(CONFIGS[name])
    if name != "anneal":
        assert [r["step"] for r in expected["seen"] if r["event"] == "skip"]
    for module in ("ard.slopes", "svd.importance"):
        monkeypatch.setattr(f"ardlora_ext.ranks.controllers.{module}.Fetched", Late)
    monkeypatch.setattr("ardlora_ext.ranks.loss_metric.Fetched", Late)
    assert trained(CONFIGS[name]) == expected
