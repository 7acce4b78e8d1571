"""A frozen copy computes what the model computed, for little memory, and follows nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext.model.frozen import lend_adapter

from helpers.adapters import fingerprint, scramble
from helpers.models import ARCHITECTURES, Batch, llama, trainable


def trained(name: str = "llama") -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model, batch = ARCHITECTURES[name]()
    scramble(ard.wrap(model.eval(), ard.ArdConfig(mode="paper", granularity="head", r0=2)))
    ard.attach(model, torch.optim.AdamW(trainable(model)), total_steps=10)
    return model, batch


def lent(model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    other = make()
    lend_adapter(model, other)
    return other


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_computes_the_same_and_does_not_follow(name: str) -> None:
    model, batch = trained(name)
    expected = model(**batch).logits.detach()
    before = fingerprint(model)
    copied = ard.frozen_copy(model)
    torch.manual_seed(0)
    others = [copied, lent(model, lambda: ARCHITECTURES[name]()[0].eval())]
    assert fingerprint(model) == before
    for p in trainable(model):
        with torch.no_grad():
            p.add_(1.0)
    for other in others:
        assert not any(p.requires_grad for layer in ard.adapters(other).values() for p in layer.trained.values())
        assert torch.equal(other(**batch).logits, expected)
    assert not torch.equal(model(**batch).logits, expected)
    theirs = {id(p) for p in copied.parameters()}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(id(p) in theirs for p in frozen), "the base is shared"
    assert not any(p.requires_grad for p in copied.parameters())


def test_what_cannot_be_copied_is_refused() -> None:
    model, _ = trained()
    with pytest.raises(ValueError, match="must not be wrapped"):
        lend_adapter(model, model)
    with pytest.raises(ValueError, match=r"must have the layers of the first, got no 'model"):
        lend_adapter(model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must be wrapped"):
        ard.frozen_copy(llama()[0])
    ard.merge_adapter(model)
    with pytest.raises(ValueError, match=r"frozen_copy: 'model.*' must not be merged"):
        ard.frozen_copy(model)
