"""Adapters go into the base weights and come out again; how exactly is written in `unmerge_adapter`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import ardlora_ext as ard

from helpers.adapters import fingerprint, scramble, set_ranks
from helpers.models import ARCHITECTURES, Attention, Batch, trainable
from helpers.training import bed, fast_config

CONFIGS: dict[str, Callable[[], ard.AdapterConfig]] = {
    "heads": lambda: ard.ArdConfig(mode="paper", granularity="head", r0=3),
    "P Lambda Q": lambda: ard.ElaConfig(r=3),
    "dora": lambda: ard.DoraConfig(r=3),
    "pissa": lambda: ard.LoraConfig(r=3, init="pissa"),
}


def wrapped(name: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model, batch = ARCHITECTURES[name]()
    model = ard.wrap(model.to(dtype).eval(), CONFIGS[kind]())
    scramble(model)
    return model, {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch).logits
    return found


def bases(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.base_layer.weight.detach().clone() for name, layer in ard.adapters(model).items()}  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_float32_comes_back_to_rounding(name: str, kind: str) -> None:
    model, batch = wrapped(name, kind)
    before, plain = bases(model), logits(model, batch)
    ard.merge_adapter(model)
    merged = logits(model, batch)
    assert all(not torch.equal(w, before[n]) for n, w in bases(model).items() if ard.adapters(model)[n].ranks != [0])
    torch.testing.assert_close(merged, plain, rtol=1e-4, atol=1e-4)
    ard.unmerge_adapter(model)
    for n, weight in bases(model).items():
        torch.testing.assert_close(weight, before[n], rtol=1e-5, atol=1e-6)
        assert kind == "heads" or kind == "P Lambda Q" or torch.equal(weight, before[n])
    torch.testing.assert_close(logits(model, batch), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["heads", "dora"])
def test_bfloat16_comes_back_bit_for_bit(kind: str) -> None:
    model, batch = wrapped("llama", kind, torch.bfloat16)
    before, plain = fingerprint(model), logits(model, batch)
    for _ in range(3):
        ard.merge_adapter(model)
        assert fingerprint(model) != before
        ard.unmerge_adapter(model)
        assert fingerprint(model) == before
    assert torch.equal(logits(model, batch), plain)


def test_the_sum_is_rounded_once() -> None:
    model, _ = wrapped("llama", "heads", torch.bfloat16)
    before = bases(model)
    ard.merge_adapter(model)
    for name, layer in ard.adapters(model).items():
        expected = (before[name].float() + layer.get_delta_weight()).to(torch.bfloat16)
        assert torch.equal(bases(model)[name], expected)


def test_modes_and_repetition_change_nothing() -> None:
    model, batch = wrapped("llama", "heads")
    ard.unmerge_adapter(model)  # nothing to do
    ard.merge_adapter(model)
    state, merged = fingerprint(model), logits(model, batch)
    ard.merge_adapter(model)
    for mode in (True, False, True, False):
        model.train(mode)
        assert torch.equal(logits(model, batch), merged)
    assert fingerprint(model) == state
    loss = model(**batch).loss
    assert not loss.requires_grad, "a merged adapter rests"


def test_training_goes_on_after_a_visit_to_the_base() -> None:
    def run(visit: bool) -> nn.Module:
        model, _ = bed()
        model = ard.wrap(model.bfloat16(), fast_config())
        optimizer = AdamW(trainable(model), lr=0.01)
        ard.attach(model, optimizer, total_steps=20)
        for t in range(20):
            x = torch.randn(4, 32, generator=torch.Generator().manual_seed(t)).bfloat16()
            model.train()(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if visit:
                ard.merge_adapter(model)
                model.eval()(x)
                ard.unmerge_adapter(model)
        return model

    ours, theirs = run(True), run(False)
    assert {n: g.ranks for n, g in ard.adapters(ours).items()} == {n: g.ranks for n, g in ard.adapters(theirs).items()}
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "adapters must be finite"), (1e30, "must be finite, got")]
)
def test_a_merge_that_is_no_number_is_refused(value: float, message: str) -> None:
    model = ard.wrap(Attention(), ard.LoraConfig())
    scramble(model)
    for factor in ard.adapters(model)["down"].factors.values():
        factor.data.fill_(value)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        ard.merge_adapter(model)
    assert fingerprint(model) == before
    ard.merge_adapter(model, safe_merge=False)
    assert not torch.isfinite(bases(model)["down"]).all()


def test_what_a_merged_model_does_not_do(tmp_path: Path) -> None:
    model = ard.wrap(Attention(), ard.LoraConfig())
    scramble(model)
    ard.merge_adapter(model)
    for call, message in (
        (
            lambda: ard.attach(model, AdamW(trainable(model))),
            "attach: 'q_proj' must not be merged; call ardlora_ext.unm",
        ),
        (lambda: ard.merge(model), "merge: 'q_proj' must not be merged"),
        (lambda: ard.unwrap(model), "unwrap: 'q_proj' must not be merged"),
        (lambda: set_ranks(model, lambda layer, u: 1), "rank change: 'q_proj' must not be merged"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    ard.unmerge_adapter(model)
    ard.merge(model)
    with pytest.raises(ValueError, match="Attention must be wrapped"):
        ard.merge_adapter(model)


def test_a_tied_head_is_refused() -> None:
    model = ard.wrap(ARCHITECTURES["gpt2"]()[0], ard.LoraConfig(target_modules=["lm_head"]))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"'lm_head' must not share its weight with 'transformer\.wte'"):
        ard.merge_adapter(model)
    assert fingerprint(model) == before


def test_two_adapted_layers_with_one_weight_are_named() -> None:
    model = Attention()
    model.o_proj.weight = model.q_proj.weight
    ard.wrap(model, ard.LoraConfig(r=2))
    with pytest.raises(ValueError, match="'q_proj' must not share its weight with 'o_proj', which has an adapter of"):
        ard.merge(model)


def test_a_merged_adapter_cannot_be_disabled_and_says_so() -> None:
    model = ard.wrap(Attention(), ard.LoraConfig(r=2))
    ard.merge_adapter(model)
    message = r"^disable_adapter: 'q_proj' must not be merged; call ardlora_ext\.unmerge_adapter"
    with pytest.raises(ValueError, match=message), ard.disable_adapter(model):
        pass
