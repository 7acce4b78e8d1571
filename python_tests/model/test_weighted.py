"""One adapter from several: PEFT's arithmetic on PEFT's adapters, and sums of learned ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import ardlora_ext as ard

from helpers.adapters import fingerprint, scramble
from helpers.models import Batch
from helpers.peft_adapters import assert_same, base, logits, trained_by_peft

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["default", "b", "c"]


def both(folder: Path, ranks: tuple[int, int, int] = (4, 4, 4)) -> tuple[nn.Module, Any, Batch]:
    """Three adapters of PEFT, two of which share layers: in a model of ours, and in one of PEFT's."""
    targets = (["q_proj", "down_proj"], ["q_proj", "v_proj"], ["down_proj", "q_proj"])
    batch: Batch = {}
    for number, (name, r, target) in enumerate(zip(NAMES, ranks, targets, strict=True)):
        options = {"r": r, "lora_alpha": 3 + number, "target_modules": target, "use_rslora": number == 2}
        _, batch = trained_by_peft(folder / name, "llama", **options)
    configs = [
        ard.LoraConfig(r=r, lora_alpha=3 + n, use_rslora=n == 2, target_modules=targets[n]) for n, r in enumerate(ranks)
    ]
    ours = ard.load_peft(base("llama")[0], folder / "default", configs[0])
    theirs = peft.PeftModel.from_pretrained(base("llama")[0], folder / "default").eval()
    for name, config in zip(NAMES[1:], configs[1:], strict=True):
        ard.load_adapter(ours, folder / name, name, config)
        theirs.load_adapter(folder / name, name)
    return ours, theirs, batch


@pytest.mark.parametrize(
    ("kind", "ranks", "more"),
    [
        ("linear", (4, 4, 4), {}),
        ("cat", (2, 4, 3), {}),
        ("svd", (2, 4, 3), {}),
        ("svd", (4, 4, 4), {"svd_rank": 2}),
        ("svd", (4, 4, 4), {"svd_rank": 16}),
    ],
)
def test_combinations_are_those_of_peft(kind: Any, ranks: tuple[int, int, int], more: Any, tmp_path: Path) -> None:
    ours, theirs, batch = both(tmp_path, ranks)
    ard.add_weighted_adapter(ours, NAMES, [0.7, -0.4, 1.5], "sum", kind, **more)
    theirs.add_weighted_adapter(NAMES, [0.7, -0.4, 1.5], "sum", kind, **more)
    before = logits(ours, batch)
    ard.set_adapter(ours, "sum")
    theirs.set_adapter("sum")
    assert not torch.equal(logits(ours, batch), before)
    assert_same(logits(ours, batch), logits(theirs, batch))
    ard.save_pretrained(ours, tmp_path / "saved")
    assert torch.equal(logits(ard.load_pretrained(base("llama")[0], tmp_path / "saved"), batch), logits(ours, batch))
    assert_same(
        logits(peft.PeftModel.from_pretrained(base("llama")[0], tmp_path / "saved").eval(), batch), logits(ours, batch)
    )
    ard.set_adapter(ours, "default")
    assert torch.equal(logits(ours, batch), before)


def test_one_adapter_is_scaled_and_two_learned_ones_are_added(tmp_path: Path) -> None:
    ours, theirs, batch = both(tmp_path)
    for model in (ours, theirs):
        add = theirs.add_weighted_adapter if model is theirs else lambda *a: ard.add_weighted_adapter(ours, *a)
        add(["b"], [0.3], "part")
    ard.set_adapter(ours, "part")
    theirs.set_adapter("part")
    assert_same(logits(ours, batch), logits(theirs, batch))

    model = ard.wrap(base("llama")[0], ard.ArdConfig(mode="paper", granularity="head", r0=2))
    scramble(model, 1)
    ard.add_adapter(model, "ela", ard.ElaConfig(r=3, factoring="independent"))
    ard.set_adapter(model, "ela")
    scramble(model, 2)
    second = {name: layer.get_delta_weight() for name, layer in ard.adapters(model).items()}
    ard.set_adapter(model, "default")
    first = {name: layer.get_delta_weight() for name, layer in ard.adapters(model).items()}
    ard.add_weighted_adapter(model, ["default", "ela"], [1.0, 2.0], "both", "cat")
    ard.set_adapter(model, "both")
    for name, layer in ard.adapters(model).items():
        torch.testing.assert_close(layer.get_delta_weight(), first[name] + 2 * second[name], rtol=1e-4, atol=1e-5)


def test_what_one_adapter_keeps_whole_goes_along() -> None:
    model, batch = base("llama")
    ard.wrap(model, ard.LoraConfig(r=2, modules_to_save=["norm"], trainable_token_indices=[3, 7]))
    scramble(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)  # type: ignore[operator, union-attr]
        model.model.embed_tokens.token_rows.add_(1.0)  # type: ignore[operator, union-attr]
    expected = logits(model, batch)
    ard.add_weighted_adapter(model, ["default"], [1.0], "copy")
    ard.set_adapter(model, "copy")
    assert_same(logits(model, batch), expected)
    ard.add_adapter(model, "third", ard.LoraConfig(r=2))
    ard.add_weighted_adapter(model, ["third", "default"], [1.0, 1.0], "with", "cat")
    ard.set_adapter(model, "with")
    assert_same(logits(model, batch), expected)


def test_what_cannot_be_is_refused_untouched() -> None:
    model = ard.wrap(base("llama")[0], ard.LoraConfig(r=2))
    ard.add_adapter(model, "b", ard.LoraConfig(r=3, modules_to_save=["norm"]))
    ard.add_adapter(model, "dora", ard.DoraConfig(r=2))
    ard.add_adapter(model, "d", ard.LoraConfig(r=3, modules_to_save=["norm"]))
    before = fingerprint(model)
    for arguments, said in (
        ((["default", "x"], [1, 1], "n"), r"adapters must be of \['default', 'b', 'dora', 'd'\], got 'x'"),
        ((["default"], [1, 1], "n"), "weights must be one for each adapter, got 2"),
        ((["default"], [float("nan")], "n"), "weights must be finite"),
        ((["default"], [1.0], "b"), "adapter_name must be new, got 'b'"),
        ((["default", "b"], [1, 1], "n", "linear"), r"ranks must be the same for 'linear', got \[2, 3\] in '.*'; take"),
        ((["default", "b"], [1, 1], "n", "ties"), "combination_type must be 'svd', 'linear' or 'cat', got 'ties'"),
        ((["default", "dora"], [1, 1], "n"), "must be sums of low rank, got 'dora': DoRA rescales"),
        ((["d", "b"], [1, 1], "n"), "at most one adapter must have modules_to_save"),
        ((["default", "b"], [1, 1], "n", "svd", 0), "svd_rank must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            ard.add_weighted_adapter(model, *arguments)  # type: ignore[arg-type]
        assert fingerprint(model) == before
    with pytest.raises(ValueError, match=r"must be one name, got \['default', 'b'\]; add_weighted_adapter"):
        ard.set_adapter(model, ["default", "b"])  # type: ignore[arg-type]
