"""One fine-tuning run: data in, adapter and records out. The loop is Trainer's; the ranks move by `RankCallback`.

    corpus -> tokens -> Trainer(model, callbacks=[RankCallback(config)]) -> adapter, records, metrics, report

Nothing in the run depends on an evaluation, but with `early_stopping`: the test set is only looked at.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, set_seed

from ardlora_ext import processes
from ardlora_ext.checkpoint.load_pretrained import load_pretrained
from ardlora_ext.config import AdapterConfig
from ardlora_ext.errors import InputError
from ardlora_ext.train.base_model import answer, head_modules, held_length, load_model, load_tokenizer
from ardlora_ext.train.callback import RankCallback, trainer_facts
from ardlora_ext.train.data import Corpus, load_corpus
from ardlora_ext.train.encoding import by_length, check_chats, encode
from ardlora_ext.train.packages import default_model, fetch, trec_chats, trec_corpus
from ardlora_ext.train.progress import DivergenceError, RunRecord
from ardlora_ext.train.settings import DTYPES, METRICS, Settings, metric_of
from ardlora_ext.train.trainers import go_on, make_trainer

Json = dict[str, Any]

_LENGTH, _CHAT_LENGTH = 128, 1024  # tokens; TRL's for chats
_SAMPLES = 3  # chats that are answered before and after
_PROBE = 500  # examples that are looked at during the run: a standard error of 1.3 points near 90 %


@dataclass(frozen=True)
class Job:
    """Everything that a run holds."""

    settings: Settings
    corpus: Corpus
    config: AdapterConfig
    tokenizer: Any
    trainer: Trainer
    record: RunRecord
    ranks: RankCallback
    test: Any  # rows in tokens

    def evaluate(self) -> tuple[float, float]:
        """Return loss and metric on the whole test part."""
        return metric_of(self.corpus.task, self.trainer.evaluate(self.test))

    def before(self) -> tuple[float, float, list[str]]:
        """Return loss, metric and answers of the model that training begins with."""
        return (*self.evaluate(), self.answers())

    def answers(self) -> list[str]:
        """Return what the model answers to some test chats; nothing where several processes would have to."""
        alone = self.trainer.args.world_size == 1
        return [answer(self.trainer.model, self.tokenizer, prompt) for prompt, _ in self.asked()] if alone else []

    def asked(self) -> list[tuple[Any, str]]:
        """Return the first test chats with different answers, as prompt and answer; none but of chats."""
        found: dict[str, Any] = {}
        for row in (self.corpus.test or ()) if self.corpus.task == "sft" else ():
            prompt, said = row.get("prompt"), row.get("completion")
            if (messages := row.get("messages")) and messages[-1]["role"] == "assistant":
                prompt, said = messages[:-1], messages[-1:]
            text = said if isinstance(said, str) or not said else str(said[-1]["content"])
            if prompt and text and len(found) < _SAMPLES:
                found.setdefault(text.strip(), prompt)
        return [(prompt, text) for text, prompt in found.items()]


def run(settings: Settings) -> Json | None:
    """Fine-tune as `settings` say, fill `settings.out`, and return the content of its metrics.json.

    Of several processes the first one writes; the others return None.

    Raises:
        InputError: Something the user gave cannot be used; found before training starts.
        DivergenceError: The loss became NaN or infinite.
        SavedElsewhere: `settings.out` could not be written at the end.
    """

    # Draws with matplotlib, an extra: better to fail before the training than after it.
    from ardlora_ext.train.run_folder import ended, prepare_folder, remove_checkpoints, save_run, to_resume

    started = time.perf_counter()
    prepare_folder(settings.out)
    checkpoint = to_resume(settings.out, settings.resume, settings.overwrite)
    if settings.resume == "auto" and checkpoint is None and (metrics := ended(settings.out, settings.command())):
        return (
            dict(metrics) if processes.launched_rank() == 0 else None
        )  # killed after it was saved, or asked for again
    job = prepare(settings)
    if checkpoint is None:
        job.record.measure = job.before
    else:
        go_on(job.trainer, checkpoint)
    try:
        job.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except ValueError as error:
        if not all(bool(p.isfinite().all()) for p in job.trainer.model.parameters() if p.requires_grad):
            step = job.trainer.state.global_step
            raise DivergenceError(f"finetune: weights became nan by step {step}; try a smaller --lr") from error
        if job.record.steps:
            raise
        raise InputError(str(error)) from error  # found where the run begins: a budget, a checkpoint of another model
    finally:
        job.record.close()
    loss, metric = job.evaluate()
    if not math.isfinite(loss):
        raise DivergenceError(f"finetune: the loss after training is {loss}; try a smaller --lr")
    if not job.trainer.is_world_process_zero():
        return None
    metrics = _metrics(job, loss, metric, time.perf_counter() - started)
    assert job.ranks.controller is not None
    save_run(job.trainer.model, job.ranks.controller.records, metrics, settings.out)
    if settings.save_steps is None:
        remove_checkpoints(settings.out)
    return metrics


def prepare(settings: Settings, saved: Path | None = None) -> Job:
    """Load data and model, and make the trainer; with `saved`, the adapter of that folder is loaded, too."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    set_seed(settings.seed)
    corpus = _corpus(settings)
    for option in ("packing", "answers_only"):
        if getattr(settings, option) and corpus.task != "sft":
            raise InputError(f"finetune: --{option.replace('_', '-')} must come with chats, got {corpus.task} data")
    name = settings.model or fetch(default_model(corpus.task))
    tokenizer = load_tokenizer(name)
    if tokenizer.chat_template is None and (settings.answers_only or corpus.speaks()):
        raise InputError(
            f"finetune: the tokenizer of {name} must have a chat template for messages, got none; take a model that "
            "was tuned for chats, or prompt and completion as plain text"
        )
    bits = 4 if settings.load_in_4bit else 8 if settings.load_in_8bit else None
    model = load_model(
        name, corpus.task, corpus.labels, tokenizer, dtype=DTYPES[settings.dtype], bits=bits, attn=settings.attn
    )
    wanted = settings.max_length or (_CHAT_LENGTH if corpus.task == "sft" else _LENGTH)
    length = held_length(model, wanted)
    if settings.max_length is not None and length < wanted:
        raise InputError(f"finetune: --max-length must be <= {length}, the positions of the model, got {wanted}")
    if corpus.task == "sft":
        assert corpus.test is not None
        parts = corpus.train, corpus.test
    else:
        parts = encode(corpus, tokenizer, length, settings.eval_share)
    heads = () if corpus.task in ("lm", "sft") else head_modules(model)
    config = settings.adapter_config(heads)
    if saved is not None:
        load_pretrained(model, saved)
    ranks = RankCallback(config, report=False)  # written with the adapter, as one set
    record = RunRecord(settings.method, corpus.task, settings.command())
    trainer = make_trainer(settings, corpus.task, model, tokenizer, parts, heads, length, [ranks, record])
    if corpus.task == "sft":
        check_chats(corpus, (trainer.train_dataset, trainer.eval_dataset), length, settings.packing)
    test = trainer.eval_dataset
    trainer.eval_dataset = by_length(test.select(range(min(_PROBE, len(test)))))
    return Job(settings, corpus, config, tokenizer, trainer, record, ranks, by_length(test))


def _corpus(settings: Settings) -> Corpus:
    if settings.data is None:
        return trec_chats() if settings.task == "sft" else trec_corpus()
    return load_corpus(
        settings.data,
        settings.task,
        split=settings.split,
        columns=settings.column_names(),
        eval_data=settings.eval_data,
        eval_split=settings.eval_split,
        eval_share=settings.eval_share,
    )


def dry_run(settings: Settings) -> None:
    """Print what a run would adapt, and the bytes it would hold; no weights and no data are loaded.

    Raises:
        InputError: the model or an option is refused, as a run would refuse it.
    """
    from ardlora_ext.plan import make_plan, skeleton
    from ardlora_ext.plan.show import show
    from ardlora_ext.report.console import make_console

    task = settings.task
    if task == "auto":
        if settings.model is None and settings.data is not None:
            raise InputError(
                "finetune: --dry-run must come with --model, or with --task, which tells the default one, got neither"
            )
        task = "classification"
    name, model = skeleton(settings.model or default_model(task).title, DTYPES[settings.dtype])
    heads = () if "CausalLM" in type(model).__name__ else head_modules(model)
    try:
        config = settings.adapter_config(heads)
        length = held_length(model, settings.max_length or (_CHAT_LENGTH if task == "sft" else _LENGTH))
        plan = make_plan(name, model, config, settings.batch_size, length)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    show(plan, model, make_console(), None, paper=False)


# --- what is saved ----------------------------------------------------------------------------------------------------


def _metrics(job: Job, loss: float, metric: float, seconds: float) -> Json:
    settings, record, state = job.settings, job.record, job.trainer.state
    assert job.ranks.controller is not None
    assert record.before is not None
    known = trainer_facts(job.trainer.args, state)
    examples = len(job.trainer.train_dataset)
    return {
        **job.ranks.controller.metrics(**known),
        "model": Path(settings.model).resolve().name if settings.model else default_model(job.corpus.task).title,
        "data": job.corpus.name,
        "task": job.corpus.task,
        "labels": list(job.corpus.labels),
        "command": settings.command(),
        "settings": {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
        },
        "steps": state.global_step,
        "epochs": state.global_step * known["batch_size"] / examples,
        "train_examples": examples,
        "test_examples": len(job.test),
        "answers": [
            {
                "prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"],
                "wanted": wanted,
                "before": before,
                "after": after,
            }
            for (prompt, wanted), before, after in zip(job.asked(), record.before[2], job.answers(), strict=False)
        ],
        "metric_name": METRICS[job.corpus.task],
        "metric_before": record.before[1],
        "metric_after": metric,
        "loss_before": record.before[0],
        "loss_after": loss,
        "seconds": seconds,
        "step_ms_median": statistics.median(record.step_ms),
        "tokens_per_s": state.num_input_tokens_seen / record.seconds,
        "evals": [{**entry, "examples": len(job.trainer.eval_dataset)} for entry in record.evals],
    }
