"""`RankCallback`: Trainer takes the steps and the decisions of a plain loop, and its checkpoints resume bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler

import ardlora_ext as ard
from ardlora_ext.callback import RECORDS
from ardlora_ext.resume import moving_state

from conftest import VOCABULARY, bert, trainable

STEPS = 24
MICRO = 2  # examples in a micro-batch


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def config(**options: Any) -> ard.ArdConfig:
    """Every phase in 24 steps: warmup to 2, adapt to 16, harden to 19, then frozen.

    Not packed: under checkpointing layers do not share a sum, whose order is in the last bits.
    """
    fast = {"r0": 2, "update_interval": 2, "lr_alpha": 0.1, "warmup_ratio": 0.1, "freeze_ratio": 0.2}
    return ard.ArdConfig(**{"harden_ratio": 0.13, "packed": False, **fast, **options})


def examples(n: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, VOCABULARY, (n, 8), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def classifier(dropout: float = 0.1, **options: Any) -> nn.Module:
    """A small BERT with adapters. With dropout, an equal trajectory also means equal random numbers."""
    torch.manual_seed(0)
    model = bert()[0]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return ard.wrap(model, config(**options))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    common = {
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": MICRO,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 4,
    }
    return TrainingArguments(output_dir=str(folder), **{**common, **options})


def trainer(folder: Path, model: nn.Module, *callbacks: TrainerCallback, n: int = 40, **options: Any) -> Trainer:
    """A Trainer that says nothing on the terminal."""
    made = Trainer(
        model,
        arguments(folder, **options),
        train_dataset=examples(n),
        callbacks=[ard.RankCallback(), *callbacks],
    )
    made.pop_callback(PrinterCallback)
    return made


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    """Same weights, ranks and decisions, bit for bit."""
    a, b = bits(ours), bits(theirs)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert ours._ardlora.controller.state_dict() == theirs._ardlora.controller.state_dict()


def _forever(loader: DataLoader[Any]) -> Iterator[Any]:
    """Epoch after epoch; a new epoch draws from torch's generator, as it does in Trainer."""
    while True:
        yield from loader


def plain_loop(
    model: nn.Module,
    accumulate: int = 1,
    clip: float = 0.0,
    autocast: bool = False,
    schedule: str = "constant",
    n: int = 40,
) -> nn.Module:
    """What `Trainer` is held against: plain torch, `attach`, the same examples in the same order."""
    batches = _forever(DataLoader(examples(n), batch_size=MICRO))  # type: ignore[arg-type]
    model.train()
    decayed, plain = Trainer.get_decay_parameter_names(None, model), trainable(model)  # type: ignore[arg-type]
    groups: list[dict[str, Any]] = [
        {"params": [p for m, p in model.named_parameters() if p.requires_grad and m in decayed], "weight_decay": 0.01},
        {"params": [p for m, p in model.named_parameters() if p.requires_grad and m not in decayed], "weight_decay": 0},
    ]
    assert sum(len(g["params"]) for g in groups) == len(plain)
    optimizer = AdamW(groups, lr=1e-2, fused=True)
    scheduler = get_scheduler(schedule, optimizer, 5 if schedule != "constant" else 0, STEPS)
    ard.attach(model, optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        for _ in range(accumulate):
            inputs = next(batches)
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                loss = model(**inputs).loss
            loss.backward()  # BERT takes, and ignores, the number of items: Trainer adds up micro-batches
        if clip:
            nn.utils.clip_grad_norm_(plain, clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"accumulate": 2}),
    "clipping": ({"max_grad_norm": 0.05}, {"clip": 0.05}),
    "bf16 autocast": ({"bf16": True}, {"autocast": True}),
    "checkpointing": (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {},
    ),
    "reentrant checkpointing": (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {},
    ),
    "cosine schedule": (
        {"lr_scheduler_type": "cosine", "warmup_steps": 5},
        {"schedule": "cosine"},
    ),
    "all": (
        {
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.05,
            "bf16": True,
            "lr_scheduler_type": "linear",
            "warmup_steps": 5,
        },
        {"accumulate": 2, "clip": 0.05, "autocast": True, "schedule": "linear"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_trainer_takes_the_steps_of_a_plain_loop(case: str, tmp_path: Path) -> None:
    options, same = CASES[case]
    model = classifier()
    torch.manual_seed(7)
    made = trainer(tmp_path, model, **options)
    torch.manual_seed(7)
    made.train()
    controller = model._ardlora.controller  # type: ignore[union-attr]
    assert controller.step == STEPS
    assert controller.phase == "frozen"
    reference = classifier()
    torch.manual_seed(7)
    assert_equal(model, plain_loop(reference, **same))
    assert len({r for units in controller.ranks().values() for r in units}) > 1, "ranks moved"


class SaveAt(TrainerCallback):
    """Saves after the given steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps


class Tracker(TrainerCallback):
    """Stands where Trainer puts TensorBoard and W&B: before the callbacks of the user."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


PHASE_AT = {1: "warmup", 9: "adapt", 17: "harden", 20: "frozen"}


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


def test_logs_records_and_the_best_checkpoint(tmp_path: Path) -> None:
    model, tracker = classifier(), Tracker()
    made = Trainer(
        model,
        arguments(
            tmp_path,
            eval_strategy="steps",
            eval_steps=8,
            save_strategy="steps",
            save_steps=8,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            greater_is_better=True,  # so that the last checkpoint is not the "best"
        ),
        train_dataset=examples(40),
        eval_dataset=examples(4),
        callbacks=[tracker, ard.RankCallback()],
    )
    made.pop_callback(PrinterCallback)
    made.train()
    keys = {"mean_rank", "rank_min", "rank_max", "adapter_parameters", "rank_phase", "rank_alpha", "rank_price"}
    for logs in ([r for r in tracker.seen if "loss" in r], [r for r in made.state.log_history if "loss" in r]):
        assert len(logs) == STEPS // 4
        assert all(keys < entry.keys() for entry in logs)
        assert [entry["rank_phase"] for entry in logs] == [1, 1, 1, 2, 3, 3]
    assert not any("mean_rank" in logs for logs in tracker.seen if "loss" not in logs)
    controller = model._ardlora.controller  # type: ignore[union-attr]
    assert controller.step == made.state.best_global_step < STEPS
    lines = (tmp_path / RECORDS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == controller.records
    ard.save_pretrained(model, tmp_path / "best")
    ard.attach(again := ard.load_pretrained(bert()[0], tmp_path / "best"), AdamW(trainable(again)))


def test_training_again_after_the_best_checkpoint_was_loaded(tmp_path: Path) -> None:
    """Moments were of later weights and other ranks: it goes on as a fresh optimizer would from that checkpoint."""
    model = classifier(dropout=0.0)  # an evaluation draws from torch's generator
    made = Trainer(
        model,
        arguments(
            tmp_path,
            eval_strategy="steps",
            eval_steps=9,
            save_strategy="steps",
            save_steps=9,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            greater_is_better=True,  # the loss falls: the first checkpoint, while ranks move
        ),
        train_dataset=examples(40),
        eval_dataset=examples(4),
        callbacks=[ard.RankCallback()],
    )
    made.pop_callback(PrinterCallback)
    made.train()
    best = made.state.best_global_step
    assert best == 9
    torch.manual_seed(0)
    reference = ard.load_pretrained(bert()[0], tmp_path / f"checkpoint-{best}")
    for module in reference.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    controller = model._ardlora.controller  # type: ignore[union-attr]
    live = [{name: layer.ranks for name, layer in ard.adapters(m).items()} for m in (model, reference)]
    assert live[0] == live[1]
    made.args.load_best_model_at_end = False
    for again in (made, trainer(tmp_path / "reference", reference)):
        again.train()
    assert controller.step == best + STEPS
    assert controller.summary()["phase"] == "frozen"
    assert_equal(model, reference)


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


def test_one_argument_wraps_as_well(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert()[0]
    torch.manual_seed(7)
    made = Trainer(model, arguments(tmp_path), train_dataset=examples(40), callbacks=[ard.RankCallback(config())])
    made.pop_callback(PrinterCallback)
    torch.manual_seed(7)
    made.train()
    reference = classifier()
    torch.manual_seed(7)
    assert_equal(model, plain_loop(reference))
    late = Trainer(bert()[0], arguments(tmp_path), train_dataset=examples(4))
    late.add_callback(ard.RankCallback(config()))
    late.pop_callback(PrinterCallback)
    with pytest.raises(ValueError, match=r"with a config it must be in Trainer\(callbacks=\[...\]\)"):
        late.train()


def test_it_says_when_ranks_could_not_follow(tmp_path: Path) -> None:
    model = classifier()
    ard.attach(model, AdamW(trainable(model)), total_steps=2)
    with pytest.warns(UserWarning, match="ended after 2 steps and the attached optimizer took none of them"):
        trainer(tmp_path, model, max_steps=2).train()

    class NoOptimizer(Trainer):
        def _prepare_for_training(self, *args: Any) -> Any:
            found = super()._prepare_for_training(*args)
            self.callback_handler.optimizer = None
            return found

    made = NoOptimizer(classifier(), arguments(tmp_path, max_steps=1), train_dataset=examples(4))
    made.add_callback(ard.RankCallback)
    made.pop_callback(PrinterCallback)
    with pytest.warns(UserWarning, match="ended and nothing was attached, because Trainer showed no optimizer"):
        made.train()


def test_models_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"BertForSequenceClassification must be wrapped: call ardlora_ext\.wrap"):
        trainer(tmp_path, bert()[0]).train()


def test_importing_the_package_does_not_import_trainer() -> None:
    code = "import sys, ardlora_ext; assert not [name for name in sys.modules if 'transformers.trainer' in name]"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'ardlora_ext' has no attribute 'RankCallbacks'"):
        ard.RankCallbacks  # noqa: B018
