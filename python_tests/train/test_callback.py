"""`RankCallback`: Trainer takes the steps and the decisions of a plain loop, and its checkpoints resume bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from transformers import PrinterCallback, Trainer, TrainerCallback

import ardlora_ext as ard
from ardlora_ext.commands import cli
from ardlora_ext.report.run_files import load_run

from helpers.models import bert, trainable
from helpers.trainer import STEPS, arguments, classifier, config, examples, plain_loop, trainer
from helpers.training import assert_equal

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT
    pytest.mark.usefixtures("one_process"),
]


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


def test_held_out_batches_stop_the_anneal(tmp_path: Path) -> None:
    """Cuts as `attach` makes them with the same batches."""
    options = ard.ArdConfig(r0=2, budget="auto", tolerance=0.2, update_interval=2)
    models = []
    for through_trainer in (True, False):
        torch.manual_seed(0)
        model = bert()[0]
        batch = {key: torch.stack([row[key] for row in examples(8)]) for key in ("input_ids", "labels")}

        def held_out(model: nn.Module = model, batch: dict[str, torch.Tensor] = batch) -> torch.Tensor:
            assert not model.training
            loss: torch.Tensor = model(**batch).loss
            return loss

        if through_trainer:
            made = Trainer(model, arguments(tmp_path), train_dataset=examples(40),
                           callbacks=[ard.RankCallback(options, held_out)])  # fmt: skip
            made.pop_callback(PrinterCallback)
            torch.manual_seed(7)
            made.train()
        else:
            ard.wrap(model, options)
            torch.manual_seed(7)
            plain_loop(model, holdout=held_out)
        models.append(model)
    assert_equal(*models)
    records = models[0]._ardlora.controller.records  # type: ignore[union-attr]
    assert records
    assert any(record["measured"] is not None for record in records)


class Tracker(TrainerCallback):
    """Stands where Trainer puts TensorBoard and W&B: before the callbacks of the user."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


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
    metrics, records = load_run(tmp_path)
    assert records == controller.records
    assert metrics["ranks"] == controller.ranks()
    assert [entry["loss"] for entry in metrics["history"]] == [
        entry["loss"] for entry in made.state.log_history if "loss" in entry
    ]
    assert [entry["step"] for entry in metrics["evals"]] == [8, 16, 24]
    assert (metrics["metric_name"], metrics["metric_after"]) == ("loss", made.state.best_metric)
    cli.main(["report", str(tmp_path)])
    assert "Training loss and held-out metric" in (tmp_path / "report.html").read_text(encoding="utf-8")
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
    with pytest.raises(ValueError, match=r"RankCallback: config must be one of ardlora_ext's .*, got dict"):
        ard.RankCallback({"r0": 4})  # type: ignore[arg-type]
    late = Trainer(bert()[0], arguments(tmp_path), train_dataset=examples(4))
    late.add_callback(ard.RankCallback(config()))
    late.pop_callback(PrinterCallback)
    with pytest.raises(ValueError, match=r"with a config it must be in Trainer\(callbacks=\[...\]\)"):
        late.train()


def test_a_new_training_has_a_schedule_of_its_own(tmp_path: Path) -> None:
    """The optimizer of an earlier training is history, also one that a user attached by hand."""
    model = classifier()
    first = ard.attach(model, AdamW(trainable(model)), total_steps=2)
    found = trainer(tmp_path / "a", model, max_steps=12)
    found.train()
    second = model._ardlora.controller
    assert (first.handles, second.step, second.total_steps) == ([], 12, 12)
    trainer(tmp_path / "b", model, max_steps=24).train()
    third = model._ardlora.controller
    assert (second.handles, third.step, third.total_steps) == ([], 24, 24)
    assert any(record["event"] != "freeze" for record in third.records)


def test_a_longer_run_moves_its_ranks_again(tmp_path: Path) -> None:
    trainer(tmp_path, classifier(), max_steps=24, save_strategy="steps", save_steps=24).train()
    longer = trainer(tmp_path, classifier(), max_steps=48)
    with pytest.warns(UserWarning, match="the schedule of 24 steps is extended to 48"):
        longer.train(resume_from_checkpoint=True)
    controller = longer.model._ardlora.controller
    assert (controller.step, controller.total_steps, controller.phase) == (48, 48, "frozen")
    assert any(record["step"] > 24 for record in controller.records)


def test_it_says_when_ranks_could_not_follow(tmp_path: Path) -> None:
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


class Stop(TrainerCallback):
    """Ends one training in the middle, as a pruned trial does."""

    def __init__(self) -> None:
        self.at = 6

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            self.at = -1
            raise KeyboardInterrupt


@pytest.mark.parametrize("given", [True, False])
def test_each_model_of_model_init_gets_its_own_ranks(given: bool, tmp_path: Path) -> None:
    """Trainer makes one for each training and each trial, an earlier one that was stopped included."""

    def base(trial: Any = None) -> nn.Module:
        torch.manual_seed(0)
        model = bert()[0]
        return model if given else ard.wrap(model, config())

    callback = ard.RankCallback(config() if given else None)
    made = Trainer(model_init=base, args=arguments(tmp_path), train_dataset=examples(40), callbacks=[callback, Stop()])
    made.pop_callback(PrinterCallback)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    ends = []
    for _ in range(2):
        made.train()
        assert callback.controller is not None
        assert callback.controller.step == STEPS
        assert callback.controller.summary()["phase"] == "frozen"
        ends.append((made.model, callback.controller.ranks()))
    assert ends[0][0] is not ends[1][0]
    assert ends[0][1] == ends[1][1]
    assert {name: layer.ranks for name, layer in ard.adapters(made.model).items()} == ends[1][1]
