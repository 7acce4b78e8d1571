"""Trainers of other libraries: KTO and GRPO of TRL, cross encoders, torchao's bases, Lightning, optuna's search."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from peft import PeftModel
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from torch import nn
from torch.optim import AdamW
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast, TorchAoConfig, Trainer
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

import ardlora_ext as ard

from helpers.models import trainable
from helpers.training import bits
from helpers.word_models import MOVING, WORDS, arguments, examples, save_bert, save_llama

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_process")]  # of the libraries

FEW = {"max_steps": 6, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def fine_tuned(folder: Path) -> nn.Module:
    """A model whose adapter has learned already."""
    model = ard.wrap(LlamaForCausalLM.from_pretrained(folder), ard.ArdConfig(**MOVING))
    optimizer = AdamW(trainable(model), lr=3e-2)
    ard.attach(model, optimizer, total_steps=8)
    tokens = torch.randint(4, len(WORDS), (4, 8))
    for _ in range(8):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def ranks(model: nn.Module) -> set[int]:
    return {rank for layer in ard.adapters(model).values() for rank in layer.ranks}


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["trl's", "ours"])
def test_the_first_loss_of_kto_is_that_of_equals(reference: str, llama: Path, tmp_path: Path) -> None:
    """With the policy as its own reference every log-ratio is 0, and KTO's loss one half."""
    model, tokenizer = fine_tuned(llama), PreTrainedTokenizerFast.from_pretrained(llama)
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2}", "label": i % 2 == 0} for i in range(32)]
    config = KTOConfig(str(tmp_path), bf16=False, logging_steps=1, save_strategy="no", max_length=16, **FEW)
    callback = ard.RankCallback()
    trainer = KTOTrainer(
        model=model,
        ref_model=ard.frozen_copy(model) if reference == "ours" else None,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.5, abs=1e-4)
    assert callback.controller is not None
    assert callback.controller.step == 6


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_trains_and_starts_at_no_divergence(beta: float, llama: Path, tmp_path: Path) -> None:
    model, tokenizer = fine_tuned(llama), PreTrainedTokenizerFast.from_pretrained(llama, padding_side="left")
    config = GRPOConfig(
        str(tmp_path), bf16=False, logging_steps=1, save_strategy="no", num_generations=4, beta=beta,
        max_completion_length=6, learning_rate=1e-2, **FEW,
    )  # fmt: skip
    callback = ard.RankCallback()

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(text.count("w1")) for text in completions]

    before = bits(model)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(32)]),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    assert callback.controller is not None
    assert callback.controller.step == 6
    after = bits(model)
    assert any(not torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
    if beta:
        first = next(entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
        assert first == pytest.approx(0.0, abs=1e-5)


# --- sentence-transformers --------------------------------------------------------------------------------------------


def test_cross_encoders_train_resume_and_load(tmp_path: Path) -> None:
    base = save_bert(tmp_path, labels=1)
    rows = {"first": [f"w{i} w3" for i in range(40)], "second": [f"w{i % 7}" for i in range(40)]}
    data = Dataset.from_dict({**rows, "label": [float(i % 2) for i in range(40)]})

    def trained(resume: bool) -> CrossEncoder:
        model = CrossEncoder(str(base), num_labels=1, device="cpu")
        options = {**FEW, "max_steps": 12, "save_steps": 6, "learning_rate": 1e-2}
        trainer = CrossEncoderTrainer(
            model,
            CrossEncoderTrainingArguments(str(tmp_path / "run"), **options),
            train_dataset=data,
            loss=BinaryCrossEntropyLoss(model),
            callbacks=[ard.RankCallback(ard.ArdConfig(**MOVING))],
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return model

    model = trained(resume=False)
    assert ranks(model) != {2}
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    again = trained(resume=True)
    ours, theirs = bits(model), bits(again)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []

    pairs = [("w1 w2", "w3"), ("w5", "w6 w7")]
    expected = torch.tensor(model.eval().predict(pairs))
    model.save_pretrained(str(tmp_path / "saved"))
    ard.save_pretrained(model, tmp_path / "adapter")
    loaded = (
        CrossEncoder(str(tmp_path / "saved"), device="cpu"),
        ard.load_pretrained(CrossEncoder(str(base), num_labels=1, device="cpu"), tmp_path / "adapter"),
        ard.merge(model),
    )
    for found in loaded:
        torch.testing.assert_close(torch.tensor(found.eval().predict(pairs)), expected, atol=1e-5, rtol=1e-4)


# --- torchao ----------------------------------------------------------------------------------------------------------


INT8, INT4 = Int8WeightOnlyConfig(version=2), IntxWeightOnlyConfig(weight_dtype=torch.int4)


@pytest.mark.parametrize(
    ("kind", "how"),
    [(INT8, "callback"), (INT4, "callback"), (INT8, "wrapped")],
    ids=["int8", "int4", "int8, wrapped"],
)
def test_torchaos_bases_train_resume_and_save(kind: Any, how: str, llama: Path, tmp_path: Path) -> None:
    def base() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(llama, quantization_config=TorchAoConfig(kind), dtype=torch.float32)

    def trainer() -> Trainer:
        config = ard.ArdConfig(**MOVING)
        model = ard.wrap(base(), config) if how == "wrapped" else base()
        callback = ard.RankCallback(None if how == "wrapped" else config)
        return Trainer(model, arguments(tmp_path / "run"), train_dataset=examples(), callbacks=[callback])

    unbroken = trainer()
    unbroken.train()
    assert ranks(unbroken.model) != {2}
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    ours, theirs = ({n: p for n, p in t.model.named_parameters() if p.requires_grad} for t in (unbroken, resumed))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    resumed.save_model(tmp_path / "adapter")
    batch = {"input_ids": torch.arange(4, 12)[None]}
    with torch.no_grad():
        expected = resumed.model.eval()(**batch).logits
        found = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()(**batch).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# --- Lightning --------------------------------------------------------------------------------------------------------


class Tuned(LightningModule):
    """As docs/resume.md has it."""

    def __init__(self, folder: Path, config: Any, steps: int) -> None:
        super().__init__()
        self.model = ard.wrap(LlamaForCausalLM.from_pretrained(folder), config)
        self.saved: Any = None
        self.steps = steps

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(trainable(self.model), lr=1e-2)
        self.controller = ard.attach(self.model, optimizer, total_steps=self.steps)
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["controller"] = self.controller.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint["controller"]

    def on_train_start(self) -> None:
        if self.saved is not None:
            self.controller.load_state_dict(self.saved)


@pytest.mark.parametrize(
    ("config", "clip"),
    [
        (ard.ArdConfig(r0=2), None),
        (ard.ArdConfig(**MOVING), 0.1),
        (ard.ElaConfig(r=4, deltaT=2, grace=2), None),
    ],
    ids=["anneal", "paper, clipped", "ela"],
)
def test_lightning_goes_on_bit_for_bit(config: Any, clip: float | None, llama: Path, tmp_path: Path) -> None:
    tokens = torch.randint(4, len(WORDS), (1, 8)).expand(40, 8).contiguous()  # a resumed loader begins anew
    batches: Any = torch.utils.data.DataLoader(tokens, batch_size=2)

    def trained(steps: int, start: Path | None = None) -> tuple[Tuned, LightningTrainer]:
        module = Tuned(llama, config, 24)
        trainer = LightningTrainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, default_root_dir=tmp_path, gradient_clip_val=clip,
        )  # fmt: skip
        trainer.fit(module, batches, ckpt_path=start)
        return module, trainer

    unbroken, _ = trained(24)
    assert unbroken.controller.step == 24
    assert len(unbroken.controller.history.entries) > 1
    _, half = trained(12)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = trained(24, tmp_path / "half.ckpt")
    assert resumed.controller.records == unbroken.controller.records
    ours, theirs = unbroken.model.state_dict(), resumed.model.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# --- a search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["the callback wraps", "model_init wraps"])
def test_a_search_has_ranks_of_its_own_in_every_trial(how: str, llama: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Watching(ard.RankCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_end(*args, **kwargs)
            assert self.controller is not None
            seen.append((self.controller.step, len(self.controller.history.entries)))

    def init(trial: Any = None) -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(llama)
        r0 = 2 if trial is None else trial.suggest_categorical("r0", [2, 4])
        return model if how == "the callback wraps" else ard.wrap(model, ard.ArdConfig(r0=r0))

    callback = Watching(ard.ArdConfig(r0=2) if how == "the callback wraps" else None)
    options = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 8, "save_strategy": "no"}
    trainer = Trainer(
        model_init=init,
        args=arguments(tmp_path, **options),
        train_dataset=examples(),
        eval_dataset=examples(8),
        callbacks=[callback],
    )
    trainer.train()
    best = trainer.hyperparameter_search(
        direction="minimize",
        backend="optuna",
        n_trials=2,
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
    )
    assert math.isfinite(best.objective)
    assert [step for step, _ in seen] == [8, 8, 8]
    assert all(entries > 1 for _, entries in seen), "ranks moved in each of them"
