"""Trainers that ask for more than Trainer: quantised bases, a reference model, sentence-transformers."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, prepare_model_for_kbit_training
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import ardlora_ext as ard
from ardlora_ext.checkpoint.training_state import moving_state

from helpers.models import trainable
from helpers.training import bits
from helpers.word_models import MOVING, WORDS, arguments, examples, save_bert, save_llama

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_process")]  # of the libraries


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LLaMA and its tokenizer."""
    return save_llama(tmp_path_factory.mktemp("llama"))


def quantised(folder: Path, bits: int = 4) -> nn.Module:
    dtype = torch.float32
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(**options) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


# --- quantised bases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("how", ["callback", "wrapped", "prepared"])
def test_qlora_trains_resumes_and_saves(how: str, bits: int, llama: Path, tmp_path: Path) -> None:
    def trainer(folder: Path) -> Trainer:
        model = quantised(llama, bits)
        if how == "prepared":
            model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        config = ard.ArdConfig(**MOVING)
        if how == "wrapped":
            ard.wrap(model, config)
        callback = ard.RankCallback(None if how == "wrapped" else config)
        return Trainer(model, arguments(folder), train_dataset=examples(), callbacks=[callback])

    unbroken = trainer(tmp_path / "run")
    unbroken.train()
    assert {r for ranks in unbroken.model._ardlora.controller.ranks().values() for r in ranks} != {2}
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    resumed = trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    ours, theirs = moving_state(unbroken.model), moving_state(resumed.model)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    resumed.save_model(tmp_path / "adapter")
    batch = {"input_ids": torch.arange(4, 12)[None]}
    with torch.no_grad():
        expected = resumed.model.eval()(**batch).logits
    plain = quantised(llama, bits)
    if how == "prepared":  # its norms and embeddings are in float32, as they are in `plain`
        plain = prepare_model_for_kbit_training(plain, use_gradient_checkpointing=False)
    for module in plain.modules():  # bitsandbytes' product with packed weights is 3e-3 off; ours stay as they are
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        found = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(**batch).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_without_adapters_transformers_own_answer_stands(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(quantised(llama), arguments(tmp_path), train_dataset=examples(), callbacks=[ard.RankCallback()])
    model = ard.unwrap(ard.wrap(quantised(llama), ard.LoraConfig(r=2)))
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model, arguments(tmp_path), train_dataset=examples())


def test_sft_with_and_without_a_quantised_base(llama: Path, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": f"w{i} w{i + 1} w{i + 2} w3 w4"} for i in range(30)])
    options = {"max_steps": 12, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    config = SFTConfig(str(tmp_path), **options, disable_tqdm=True, max_length=16, save_strategy="no")
    callback = ard.RankCallback(ard.ArdConfig(**MOVING))
    SFTTrainer(str(llama), config, train_dataset=rows, callbacks=[callback]).train()
    assert callback.controller is not None
    assert callback.controller.step == 12
    model = ard.wrap(quantised(llama), ard.ArdConfig(**MOVING))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, callbacks=[ard.RankCallback()]).train()
    assert all(layer.lora_B.isfinite().all() for layer in ard.adapters(model).values())


# --- preference training ----------------------------------------------------------------------------------------------


def fine_tuned(folder: Path) -> nn.Module:
    model = ard.wrap(LlamaForCausalLM.from_pretrained(folder), ard.ArdConfig(**MOVING))
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-2)
    ard.attach(model, optimizer, total_steps=12)
    for _ in range(12):
        tokens = torch.randint(4, len(WORDS), (4, 8))
        tokens[:, 4:] = 7
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def preference(folder: Path, model: nn.Module, tokenizer: Any, **options: Any) -> DPOTrainer:
    rows = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w3", "rejected": f" w{i + 3} w7"} for i in range(30)]
    fixed = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    more = {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "max_length": 32}
    precomputed = options.pop("precompute_ref_log_probs", False)
    config = DPOConfig(str(folder), **fixed, **more, precompute_ref_log_probs=precomputed)
    data, callbacks = Dataset.from_list(rows), [ard.RankCallback()]
    return DPOTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=callbacks, **options
    )


@pytest.mark.parametrize("reference", ["trl's", "ours", "a copy"])
def test_the_first_loss_of_dpo_is_that_of_equals(reference: str, llama: Path, tmp_path: Path) -> None:
    model, tokenizer = fine_tuned(llama), PreTrainedTokenizerFast.from_pretrained(llama)
    given = {"trl's": None, "ours": ard.frozen_copy(model), "a copy": copy.deepcopy(model)}[reference]
    trainer = preference(tmp_path, model, tokenizer, ref_model=given)
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(math.log(2), abs=1e-4)


def test_a_reference_that_was_given_is_left_alone(llama: Path, tmp_path: Path) -> None:
    model, tokenizer = fine_tuned(llama), PreTrainedTokenizerFast.from_pretrained(llama)
    base = LlamaForCausalLM.from_pretrained(llama)
    trainer = preference(tmp_path, model, tokenizer, ref_model=base)
    trainer.train()
    assert ard.adapters(base) == {}
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert abs(first - math.log(2)) > 1e-3


def test_log_probabilities_of_the_wrong_reference_are_refused(llama: Path, tmp_path: Path) -> None:
    model, tokenizer = fine_tuned(llama), PreTrainedTokenizerFast.from_pretrained(llama)
    with pytest.raises(ValueError, match=r"precompute_ref_log_probs must come with ref_model=ardlora_ext\.frozen_copy"):
        preference(tmp_path, model, tokenizer, precompute_ref_log_probs=True)


# --- sentence-transformers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny BERT."""
    return save_bert(tmp_path_factory.mktemp("bert"))


def sentences(folder: Path, model: SentenceTransformer, *callbacks: Any) -> SentenceTransformerTrainer:
    rows = {name: [f"w{i} w{(i * k) % 40}" for i in range(40)] for name, k in (("anchor", 3), ("positive", 5))}
    fixed = {"max_steps": 12, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "save_steps": 6}
    config = SentenceTransformerTrainingArguments(str(folder), disable_tqdm=True, learning_rate=1e-2, **fixed)
    loss = losses.MultipleNegativesRankingLoss(model)
    return SentenceTransformerTrainer(
        model, config, train_dataset=Dataset.from_dict(rows), loss=loss, callbacks=[*callbacks]
    )


def test_sentence_transformers_train_resume_and_load(encoder: Path, tmp_path: Path) -> None:
    def fresh() -> SentenceTransformer:
        return SentenceTransformer(str(encoder), device="cpu")

    config = ard.ArdConfig(**MOVING)
    model = fresh()
    sentences(tmp_path / "run", model, ard.RankCallback(config)).train()
    assert len(next(layer for name, layer in ard.adapters(model).items() if name.endswith("query")).ranks) == 4
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    other = fresh()
    sentences(tmp_path / "run", other, ard.RankCallback(config)).train(resume_from_checkpoint=True)
    ours, theirs = bits(model), bits(other)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []

    texts = ["w1 w2", "w3"]
    expected = torch.tensor(model.eval().encode(texts))
    model.save_pretrained(str(tmp_path / "saved"))
    ard.save_pretrained(model, tmp_path / "adapter")
    peft = fresh()
    peft.load_adapter(str(tmp_path / "adapter"))
    loaded = (
        SentenceTransformer(str(tmp_path / "saved"), device="cpu"),
        ard.load_pretrained(fresh(), tmp_path / "adapter"),
        peft,
        ard.merge(model),
    )
    for found in loaded:
        torch.testing.assert_close(torch.tensor(found.eval().encode(texts)), expected, atol=1e-5, rtol=1e-4)


def test_a_wrapped_inner_model_is_found(encoder: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(encoder), device="cpu")
    ard.wrap(model[0].auto_model, ard.ArdConfig(**MOVING))
    callback = ard.RankCallback()
    sentences(tmp_path, model, callback).train()
    assert callback.controller is not None
    assert callback.controller.step == 12


def test_an_adapter_on_a_head_that_trl_reads_itself_is_refused(llama: Path, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(10)])
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    config = SFTConfig(str(tmp_path), **options, disable_tqdm=True, max_length=16, save_strategy="no")
    callback = ard.RankCallback(ard.ArdConfig(r0=2, target_modules=["q_proj", "lm_head"]))
    trainer = SFTTrainer(str(llama), config, train_dataset=rows, callbacks=[callback])
    with pytest.raises(ValueError, match="must not take 'lm_head', because SFTTrainer multiplies by its weight itself"):
        trainer.train()
