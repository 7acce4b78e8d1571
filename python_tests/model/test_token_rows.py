"""Rows of embeddings that train alone: PEFT's outputs and files, tied heads, resume, merge, several adapters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import ardlora_ext as ard
from ardlora_ext.checkpoint.reexport import reexport
from ardlora_ext.layers.tokens import TokenRows

from helpers.adapters import fingerprint
from helpers.models import trainable
from helpers.peft_adapters import assert_same

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))
IDS[:, :4] = torch.tensor([3, 60, 63, 3])


def llama(tied: bool = True, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **sizes, **more)).eval()


def t5() -> Any:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    ).eval()


def bart() -> Any:
    torch.manual_seed(0)
    layers = {
        f"{side}_{what}": number
        for side in ("encoder", "decoder")
        for what, number in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))
    }
    return BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=32, scale_embedding=True, **layers)).eval()


def out(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS, **more).logits
    return found


def train(model: Any, steps: int = 3) -> None:
    torch.manual_seed(2)
    model.train()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS, **more).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


CASES: dict[str, tuple[Any, Any]] = {
    "tied": (llama, [60, 3, 63]),
    "untied": (lambda: llama(False), {"embed_tokens": [60, 3]}),
    "head alone": (lambda: llama(False), {"lm_head": [1, 60]}),
    "both, untied": (lambda: llama(False), {"embed_tokens": [60, 3], "lm_head": [5]}),
    "both, tied": (llama, {"embed_tokens": [60, 3], "lm_head": [60, 3]}),
    "padding": (lambda: llama(pad_token_id=3), [60, 3]),
    "t5": (t5, [60, 3]),
    "bart, scaled": (bart, [60, 3]),
}


@pytest.mark.parametrize("name", CASES)
def test_trained_rows_are_those_of_peft(name: str, tmp_path: Path) -> None:
    make, indices = CASES[name]
    targets = ["q"] if name == "t5" else ["q_proj"]
    plain = out(make())
    model = ard.wrap(make(), ard.LoraConfig(r=2, target_modules=targets, trainable_token_indices=indices))
    assert torch.equal(out(model), plain)
    theirs = peft.get_peft_model(
        make(), peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, trainable_token_indices=indices)
    )
    same_start(model, theirs)
    train(model)
    train(theirs)
    assert (out(model) - plain).abs().max() > 1e-3
    assert_same(out(model), out(theirs))
    ard.save_pretrained(model, tmp_path / "ours")
    assert_same(out(peft.PeftModel.from_pretrained(make(), tmp_path / "ours")), out(model))
    reexport(tmp_path / "ours", tmp_path / "again", form="compact")
    assert_same(out(peft.PeftModel.from_pretrained(make(), tmp_path / "again")), out(model))
    assert torch.equal(out(ard.load_pretrained(make(), tmp_path / "ours")), out(model))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(
        out(ard.load_peft(make(), tmp_path / "theirs", ard.ArdConfig(mode="paper", granularity="head", r0=2))),
        out(theirs),
    )
    before = out(model)
    ard.merge_adapter(model)
    assert_same(out(model), before)
    ard.unmerge_adapter(model)
    assert_same(out(model), before)
    merged = ard.merge(model)
    assert_same(out(merged), before)
    assert not any(isinstance(module, TokenRows) for module in merged.modules())


def same_start(ours: nn.Module, theirs: nn.Module) -> None:
    with torch.no_grad():
        for name, layer in ard.adapters(ours).items():
            other: Any = theirs.get_submodule(f"base_model.model.{name}")
            layer.lora_A[: layer.ranks[0]] = other.lora_A["default"].weight


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run(stop: bool) -> torch.Tensor:
        model = ard.wrap(
            llama(), ard.ArdConfig(mode="paper", granularity="head", r0=2, trainable_token_indices=[60, 3])
        )
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        ard.attach(model, optimizer, total_steps=8)
        for step in range(8):
            if stop and step == 4:
                ard.save_state(model, optimizer, tmp_path)
                model = ard.wrap(
                    llama(), ard.ArdConfig(mode="paper", granularity="head", r0=2, trainable_token_indices=[60, 3])
                )
                optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
                ard.attach(model, optimizer, total_steps=8)
                ard.load_state(model, optimizer, tmp_path)
            model.train()(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return out(model)

    assert torch.equal(run(True), run(False))


def test_several_adapters_each_have_their_rows(tmp_path: Path) -> None:
    base = llama()
    plain, before = out(base), fingerprint(base)
    model = ard.wrap(base, ard.LoraConfig(r=2, trainable_token_indices=[60]))
    train(model)
    first = out(model)
    ard.add_adapter(model, "other", ard.LoraConfig(r=2, trainable_token_indices=[3, 63]))
    ard.set_adapter(model, "other")
    assert torch.equal(out(model), plain)
    train(model)
    other = out(model)
    with ard.disable_adapter(model):
        assert torch.equal(out(model), plain)
    ard.set_adapter(model, "default")
    assert torch.equal(out(model), first)
    reference = ard.frozen_copy(model)
    train(model)
    assert torch.equal(out(reference), first)
    assert not torch.equal(other, first)
    assert fingerprint(ard.unwrap(model)) == before


def test_models_that_read_the_matrix_themselves() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.up = nn.Embedding(9, 8), nn.Linear(8, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.up(self.words(ids)) @ self.words.weight.T

    torch.manual_seed(0)
    ids, model = torch.arange(9), Read()
    ard.wrap(model, ard.LoraConfig(r=2, trainable_token_indices={"words": [2, 7]}))
    with torch.no_grad():
        model.words.token_rows.add_(1.0)  # type: ignore[operator, union-attr]
        found = model(ids)
        torch.testing.assert_close(ard.merge(model)(ids), found)


def test_what_cannot_be_is_refused_untouched() -> None:
    model = llama()
    before = fingerprint(model)
    for options, said in (
        ({"trainable_token_indices": [64]}, r"of 'model.embed_tokens' must be below 64, got 64"),
        (
            {"trainable_token_indices": {"tokens": [1]}},
            r"must name an embedding of the model, got 'tokens'; there",
        ),
        ({"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, "must be the same for"),
        (
            {"trainable_token_indices": {"norm": [1]}},
            "must name embeddings of plain numbers, got 'model.norm', a ",
        ),
        ({"trainable_token_indices": [1], "modules_to_save": ["lm_head"]}, "which modules_to_save keeps whole"),
        ({"trainable_token_indices": [1], "target_modules": ["lm_head"]}, "'lm_head', which target_modules adapts"),
        ({"trainable_token_indices": [1, 1]}, "must be whole numbers >= 0, none twice"),
        ({"trainable_token_indices": []}, "must be whole numbers >= 0, none twice"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "of 'embed_tokens' must be whole numbers >= 0"),
    ):
        with pytest.raises(ValueError, match=said):
            ard.wrap(model, ard.LoraConfig(**options))
        assert fingerprint(model) == before
    with pytest.raises(ValueError, match="must name the embeddings of a model that does not tell them"):
        ard.wrap(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), ard.LoraConfig(trainable_token_indices=[1]))


def test_rows_that_the_checkpoint_lacks_are_said_unless_they_train(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)

    def resized(number: int) -> Any:
        model = LlamaForCausalLM.from_pretrained(tmp_path)
        model.resize_token_embeddings(number)
        return model

    said = "rows 64 to 66 of 'model.embed_tokens' are not in the checkpoint and stay frozen as .*=range"
    with pytest.warns(UserWarning, match=said):
        ard.wrap(resized(67), ard.LoraConfig(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ard.wrap(resized(64), ard.LoraConfig(r=2))
        ard.wrap(resized(60), ard.LoraConfig(r=2))
        ard.wrap(resized(67), ard.LoraConfig(r=2, trainable_token_indices=range(64, 67)))
        ard.wrap(resized(67), ard.LoraConfig(r=2, modules_to_save=["embed_tokens"]))
        ard.wrap(llama(), ard.LoraConfig(r=2))


def test_tying_that_peft_does_not_know_is_said(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.up, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
            self.head.weight = self.words.weight

    model = ard.wrap(Tied(), ard.LoraConfig(r=2, trainable_token_indices={"words": [2]}))
    with pytest.warns(UserWarning, match="it does not know that 'head' is tied to an embedding with trained rows"):
        ard.save_pretrained(model, tmp_path)
