"""What Trainer saves with RankCallback, and how it goes on from there."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW
from transformers import Trainer, TrainerCallback

import ardlora_ext as ard
from ardlora_ext.checkpoint.training_state import moving_state
from ardlora_ext.report.run_files import load_run

from helpers.models import bert, trainable
from helpers.trainer import STEPS, arguments, classifier, examples, trainer
from helpers.training import assert_equal, bits

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT
    pytest.mark.usefixtures("one_process"),
]

PHASE_AT = {1: "warmup", 9: "adapt", 17: "harden", 20: "frozen"}


class SaveAt(TrainerCallback):
    """Saves after the given steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps


def test_resumed_training_equals_the_unbroken_one(tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    unbroken = classifier()
    trainer(tmp_path, unbroken, SaveAt(*PHASE_AT), **options).train()
    for step, phase in PHASE_AT.items():
        checkpoint = tmp_path / f"checkpoint-{step}"
        saved = json.loads((checkpoint / "ardlora_state.json").read_text())
        resumed = classifier()
        made = trainer(tmp_path / "resumed", resumed, **options)
        made.train(resume_from_checkpoint=str(checkpoint))
        assert_equal(resumed, unbroken)
        plain = ard.load_pretrained(bert()[0], checkpoint)
        ranks = {name: module["ranks"] for name, module in saved["modules"].items()}
        assert {name: layer.ranks for name, layer in ard.adapters(plain).items()} == ranks
        found = ard.attach(plain, AdamW(trainable(plain)), total_steps=STEPS)
        assert (found.step, found.summary()["phase"]) == (step, phase)
        told = [load_run(folder)[0] for folder in (tmp_path, tmp_path / "resumed")]
        for key in ("ranks", "rank_history", "params_peak", "steps"):
            assert told[0][key] == told[1][key], key
        assert [entry["step"] for entry in told[1]["history"]] == [entry["step"] for entry in told[0]["history"]]
    # The same Trainer and model, attached already, go back and come out where they did.
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert_equal(resumed, unbroken)


@pytest.mark.parametrize(
    "other",
    [
        ard.LoraConfig(r=2, lora_dropout=0.1),
        ard.ElaConfig(r=2, deltaT=2, b=2, total_steps=STEPS),
        ard.AdaConfig(init_r=3, target_r=2, removal=True, total_steps=STEPS),
    ],
)
def test_other_methods_resume_as_well(other: ard.AdapterConfig, tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return ard.wrap(bert()[0], other)

    unbroken, resumed = make(), make()
    trainer(tmp_path, unbroken, SaveAt(9)).train()
    trainer(tmp_path, resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert_equal(resumed, unbroken)


def test_checkpoints_are_as_large_as_the_adapter(tmp_path: Path) -> None:
    model = classifier()
    base = sum(p.nbytes for n, p in model.named_parameters() if not p.requires_grad)
    made = trainer(tmp_path, model, SaveAt(9))
    made.train()
    made.save_model(tmp_path / "final")
    report = ard.parameters_report(model)
    for folder in (tmp_path / "checkpoint-9", tmp_path / "final"):
        weights = folder / "model.safetensors"
        names = load_file(weights)
        assert not [name for name in names if "base_layer" in name or "embeddings" in name]
        assert weights.stat().st_size < 4 * report.allocated + 4 * (report.trainable - report.live) + 32768 < base
    # The folder is a PEFT adapter; its logits are those of the model.
    torch.manual_seed(0)
    plain = PeftModel.from_pretrained(bert()[0], tmp_path / "final").eval()
    inputs = {"input_ids": torch.stack([e["input_ids"] for e in examples(4)])}
    with torch.no_grad():
        assert torch.allclose(plain(**inputs).logits, model.eval()(**inputs).logits, rtol=1e-5, atol=1e-6)
    # A copy saves itself, not the original; once merged, the model saves itself whole again.
    with pytest.warns(UserWarning, match="was never called"):  # a copy is not attached
        copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    pickle.loads(pickle.dumps(model))
    merged = ard.merge(model)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, merged(**inputs).logits)


def test_fixed_ranks_resume_without_the_callback(tmp_path: Path) -> None:
    """Nothing of this package in Trainer: what it saves is the adapter all the same, and it goes on from there."""

    def made() -> tuple[nn.Module, Trainer]:
        torch.manual_seed(0)
        model = ard.wrap(bert()[0], ard.LoraConfig(r=2, lora_dropout=0.1))
        options = {"save_strategy": "steps", "save_steps": STEPS // 2}
        return model, Trainer(model, arguments(tmp_path, **options), train_dataset=examples(40))

    unbroken, run = made()
    run.train()
    half = tmp_path / f"checkpoint-{STEPS // 2}"
    assert not [name for name in load_file(half / "model.safetensors") if "base_layer" in name]
    resumed, run = made()
    run.train(resume_from_checkpoint=str(half))
    a, b = bits(unbroken), bits(resumed)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_load_that_misses_the_base_only_in_part_says_so(tmp_path: Path) -> None:
    model = classifier()
    trainer(tmp_path, model)
    moving = moving_state(model)
    assert model.load_state_dict(moving, strict=False).missing_keys == []
    whole = model.state_dict()
    lost = "bert.pooler.dense.base_layer.weight"
    assert model.load_state_dict({n: v for n, v in whole.items() if n != lost}, strict=False).missing_keys == [lost]
    assert model.load_state_dict(dict(list(moving.items())[1:]), strict=False).missing_keys == [next(iter(moving))]
