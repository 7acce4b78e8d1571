"""What of a model trains and is kept whole beside the adapters: heads, tied weights, what a user unfroze."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import ardlora_ext as ard
from ardlora_ext.model.record import home, injection

from helpers.adapters import scramble
from helpers.models import Attention, bert, trainable

pytestmark = pytest.mark.filterwarnings("ignore:.*(is_gradient_checkpointing|tie_word_embeddings).*")  # PEFT

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
CASES: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "Bert": ("BertModel", "BertForSequenceClassification", SMALL, {"classifier"}),
    "Bert QA": ("BertModel", "BertForQuestionAnswering", SMALL, {"qa_outputs"}),
    "Bert choice": ("BertModel", "BertForMultipleChoice", SMALL, {"classifier"}),
    "DistilBert": (
        "DistilBertModel",
        "DistilBertForSequenceClassification",
        {"vocab_size": 64, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48},
        {"pre_classifier", "classifier"},
    ),
    "Deberta": (
        "DebertaV2Model",
        "DebertaV2ForSequenceClassification",
        {**SMALL, "pooler_hidden_size": 32},
        {"pooler", "classifier"},
    ),
    "Bart": (
        "BartModel",
        "BartForSequenceClassification",
        {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, **BART},
        {"classification_head"},
    ),
    "XLNet": (
        "XLNetModel",
        "XLNetForSequenceClassification",
        {"vocab_size": 64, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48},
        {"sequence_summary", "logits_proj"},
    ),
    "Llama": ("LlamaModel", "LlamaForSequenceClassification", {**SMALL, "pad_token_id": 0}, {"score"}),
}


@pytest.mark.filterwarnings("ignore:wrap. no adapter covers")  # XLNet's attention
@pytest.mark.parametrize("name", CASES)
def test_a_head_is_kept_whole(name: str, tmp_path: Path) -> None:
    body, full, options, expected = CASES[name]
    config: PreTrainedConfig = getattr(transformers, body).config_class(**options)
    getattr(transformers, body)(config).save_pretrained(tmp_path / "base")
    kind: type[PreTrainedModel] = getattr(transformers, full)
    for model in (kind(config), kind.from_pretrained(tmp_path / "base")):
        ard.wrap(model, ard.LoraConfig(r=2))
        assert set(injection(model).modules_to_save) == expected
        heads = [p for head in expected for p in model.get_submodule(head).parameters()]
        assert all(p.requires_grad for p in heads)


def test_what_no_checkpoint_had_is_kept_whatever_its_name(tmp_path: Path) -> None:
    BertModel(BertConfig(**SMALL), add_pooling_layer=False).save_pretrained(tmp_path)
    model = ard.wrap(BertForSequenceClassification.from_pretrained(tmp_path), ard.LoraConfig(r=2))
    assert set(injection(model).modules_to_save) == {"classifier", "bert.pooler.dense"}


def qwen(tied: bool = True) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied)
    return Qwen2ForCausalLM(config).eval(), {"input_ids": torch.arange(12).view(2, 6)}


def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval(), {"input_ids": torch.arange(12).view(2, 6)}


@pytest.mark.parametrize("saved", [["lm_head"], ["embeddings"], ["embeddings", "lm_head"]])
@pytest.mark.parametrize("base", [qwen, gpt2])
def test_tied_embeddings_train_save_and_load(base: Callable[..., Any], saved: list[str], tmp_path: Path) -> None:
    model, batch = base()
    names = {"embeddings": "wte" if base is gpt2 else "embed_tokens"}
    ard.wrap(model, ard.LoraConfig(r=2, modules_to_save=[names.get(name, name) for name in saved]))
    assert len(injection(model).modules_to_save) == 2
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
    assert sum(p is model.lm_head.weight for p in trainable(model)) == 1
    plain = model.lm_head.weight.detach().clone()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, plain)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    expected = model(**batch).logits.detach()

    model.save_pretrained(tmp_path / "a")
    torch.testing.assert_close(ard.load_pretrained(base()[0], tmp_path / "a")(**batch).logits, expected)
    theirs = peft.PeftModel.from_pretrained(base()[0], tmp_path / "a").eval()
    torch.testing.assert_close(theirs(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    ard.save_state(model, optimizer, tmp_path / "state")
    other = ard.wrap(base()[0], injection(model).config)
    ard.load_state(other, torch.optim.AdamW(trainable(other), lr=0.1), tmp_path / "state")
    assert torch.equal(other(**batch).logits, expected)
    with ard.disable_adapter(model):
        torch.testing.assert_close(model(**batch).logits, base()[0](**batch).logits)
    assert torch.equal(model(**batch).logits, expected)


def test_the_size_of_embeddings_is_that_of_the_adapters() -> None:
    model, batch = qwen()
    model.resize_token_embeddings(70)
    ard.wrap(model, ard.LoraConfig(r=2, modules_to_save=["embed_tokens"]))
    assert model.resize_token_embeddings().num_embeddings == 70
    with pytest.raises(ValueError, match=r"resize_token_embeddings: model must not be wrapped"):
        model.resize_token_embeddings(80)
    with ard.disable_adapter(model):
        assert model(**batch).logits.shape[-1] == 70
    ard.unwrap(model).resize_token_embeddings(80)
    assert model(**batch).logits.shape[-1] == 80


def test_new_embeddings_that_stay_frozen_are_named(tmp_path: Path) -> None:
    qwen()[0].save_pretrained(tmp_path)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    model.set_input_embeddings(nn.Embedding(70, 32))
    with pytest.warns(UserWarning, match=r"'model.embed_tokens' is not as in the checkpoint .*modules_to_save"):
        ard.wrap(model, ard.LoraConfig(r=2))


def test_what_the_user_unfroze_stays_so() -> None:
    model = bert()[0]
    ard.wrap(model, ard.LoraConfig(r=2))
    norm = model.bert.embeddings.LayerNorm.requires_grad_(True)
    model.classifier.bias.requires_grad_(False)
    with ard.disable_adapter(model):
        assert not any(p.requires_grad for p in model.parameters())
    assert norm.weight.requires_grad
    assert not model.classifier.bias.requires_grad
    ard.add_adapter(model, "other", ard.LoraConfig(r=2))
    ard.set_adapter(model, "other")
    assert not norm.weight.requires_grad
    ard.set_adapter(model, "default")
    assert norm.weight.requires_grad
    ard.unwrap(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself_as_the_original(copier: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = bert()[0]
    scramble(ard.wrap(model, ard.LoraConfig(r=2)))
    other = copier(model)
    other.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    found = ard.load_pretrained(bert()[0], tmp_path)
    assert {n: layer.ranks for n, layer in ard.adapters(found).items()} == {
        n: layer.ranks for n, layer in ard.adapters(model).items()
    }
    unwrapped = ard.unwrap(other)
    assert "save_pretrained" not in vars(unwrapped)
    assert "save_pretrained" in vars(model)


def test_a_compiled_model_has_the_names_of_the_eager_one(tmp_path: Path) -> None:
    model = ard.wrap(bert()[0], ard.LoraConfig(r=2))
    compiled: Any = torch.compile(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
    assert list(ard.adapters(compiled)) == list(ard.adapters(model))
    ard.save_pretrained(compiled, tmp_path / "a")
    ard.save_state(compiled, optimizer, tmp_path / "s")
    ard.load_pretrained(bert()[0], tmp_path / "a")
    ard.load_state(model, optimizer, tmp_path / "s")
    other = ard.wrap(torch.compile(bert()[0]), ard.LoraConfig(r=2))
    assert list(ard.adapters(other)) == list(ard.adapters(model))


def test_a_wrapped_part_stands_for_the_whole(tmp_path: Path) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.head = Attention(), nn.Linear(32, 2)

    whole = Whole()
    ard.wrap(whole.part, ard.LoraConfig(r=2))
    assert home(whole) is whole.part
    assert list(ard.adapters(whole)) == list(ard.adapters(whole.part))
    ard.attach(whole, torch.optim.AdamW(trainable(whole)), total_steps=5)
    ard.save_pretrained(whole, tmp_path)
    assert list(ard.adapters(ard.load_pretrained(Attention(), tmp_path))) == list(ard.adapters(whole))
    assert ard.parameters_report(whole).trainable == ard.parameters_report(whole.part).live + 66
    ard.unwrap(whole)
    assert ard.adapters(whole) == {}


def test_what_trains_and_is_not_saved_is_named(tmp_path: Path) -> None:
    model = ard.wrap(bert()[0], ard.LoraConfig(r=2))
    ard.save_pretrained(model, tmp_path)
    model.bert.embeddings.LayerNorm.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"'bert.embeddings.LayerNorm.weight' trains and is not saved \(2 such"):
        ard.save_pretrained(model, tmp_path)


@pytest.mark.filterwarnings("ignore:wrap. no adapter covers")  # Whisper's convolutions
def test_the_task_type_is_one_whose_inputs_are_text(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, **BART}
    audio = transformers.WhisperConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_source_positions=8)
    text = transformers.BartConfig(**sizes)
    for config, task in ((audio, None), (text, "SEQ_2_SEQ_LM")):
        kind = getattr(transformers, type(config).__name__.replace("Config", "ForConditionalGeneration"))
        ard.save_pretrained(ard.wrap(kind(config), ard.LoraConfig(r=2)), tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task


def test_an_adapted_layer_tells_its_sizes() -> None:
    layer = ard.adapters(ard.wrap(Attention(), ard.LoraConfig(r=2)))["up"]
    assert (layer.in_features, layer.out_features) == (32, 64)
