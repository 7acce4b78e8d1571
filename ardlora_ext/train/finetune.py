"""One fine-tuning run: data in, adapter and records out. A raw PyTorch loop; the ranks move by themselves.

    corpus -> tokens -> wrap(model) -> attach(optimizer) -> train, evaluate -> adapter, records, metrics, report

Nothing in the run depends on an evaluation: the test set is only looked at.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ardlora_ext.checkpoint.wrap import wrap
from ardlora_ext.config import AdapterConfig
from ardlora_ext.errors import InputError
from ardlora_ext.model.parameters import parameters_report
from ardlora_ext.native.dispatch import best_device
from ardlora_ext.ranks.attach import attach
from ardlora_ext.train.base_model import head_modules, held_length, load_model, load_tokenizer
from ardlora_ext.train.batches import Batch, Collator, Features, Outcome, batches, encode, evaluate
from ardlora_ext.train.data import Corpus, default_model, load_corpus, trec_corpus
from ardlora_ext.train.settings import Settings

Json = dict[str, Any]

_EVAL_POINTS = 5
_PROBE_EXAMPLES = 500  # a standard error of 1.3 points near 90 %: enough to see a curve, a quarter of the cost
_HISTORY_POINTS = 450  # at most twice as many, however long the run is
_WARMUP_SHARE = 0.06
_CLIP_NORM = 1.0


class DivergenceError(RuntimeError):
    """The loss is no longer a number."""


@dataclass
class Trace:
    """What a run leaves behind for its report."""

    history: list[Json] = field(default_factory=list)
    evals: list[Json] = field(default_factory=list)
    rank_history: list[Json] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    ranks: dict[str, list[int]] = field(default_factory=dict)
    params_live: int = 0
    params_peak: int = 0

    @property
    def mean_rank(self) -> float:
        """Mean rank over all units now."""
        return statistics.fmean(chain.from_iterable(self.ranks.values()))

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on per second, without padding and evaluations."""
        return self.tokens / self.seconds

    def note_step(self, tokens: int, seconds: float) -> None:
        """Count a training step."""
        self.tokens += tokens
        self.seconds += seconds
        self.step_ms.append(seconds * 1e3)

    def note_ranks(self, step: int, model: torch.nn.Module, controller: Any, keep: bool) -> None:
        """Look at the ranks and the parameters they use; put them into the history if asked to, and if they changed."""
        self.ranks = {name: list(units) for name, units in controller.ranks().items()}
        self.params_live = parameters_report(model).live
        self.params_peak = max(self.params_peak, self.params_live)
        now = {"params": self.params_live, "ranks": self.ranks}
        if keep and (not self.rank_history or now != {key: self.rank_history[-1][key] for key in now}):
            self.rank_history.append({"step": step, **now})

    def note_eval(self, step: int, outcome: Outcome) -> None:
        """Keep an evaluation."""
        self.evals.append(
            {"step": step, "loss": outcome.loss, "metric": outcome.metric, "examples": len(outcome.losses)}
        )


@dataclass(frozen=True)
class Job:
    """Everything that a training loop holds."""

    settings: Settings
    model: torch.nn.Module
    collate: Collator
    train: list[Features]
    test: list[Features]
    steps: int
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    controller: Any
    config: AdapterConfig

    @property
    def probe(self) -> list[Features]:
        """The fixed part of the test set that the curve during the run is drawn from."""
        return self.test[:_PROBE_EXAMPLES]

    def evaluate(self, features: Sequence[Features]) -> Outcome:
        """Score the model on `features`."""
        return evaluate(self.model, features, self.collate, self.settings.batch_size)


def run(settings: Settings) -> Json:
    """Fine-tune as `settings` say, fill `settings.out`, and return the content of its metrics.json.

    Raises:
        InputError: Something the user gave cannot be used; found before training starts.
        DivergenceError: The loss became NaN or infinite.
        SavedElsewhere: `settings.out` could not be written at the end.
    """

    # Draws with matplotlib, an extra: better to fail before the training than after it.
    from ardlora_ext.train.run_folder import prepare_folder, save_run

    started = time.perf_counter()
    prepare_folder(settings.out)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)

    corpus = trec_corpus() if settings.data is None else load_corpus(settings.data, settings.task)
    job = prepare(settings, corpus)
    trace = Trace()
    trace.note_ranks(0, job.model, job.controller, keep=True)
    before = job.evaluate(job.test)
    trace.note_eval(0, before.first(len(job.probe)))
    train(job, trace)
    after = job.evaluate(job.test)
    if not math.isfinite(after.loss):
        raise DivergenceError(f"finetune: the loss after training is {after.loss}; try a smaller --lr")
    trace.note_eval(job.steps, after.first(len(job.probe)))

    metrics = _metrics(job, corpus, trace, before, after, time.perf_counter() - started)
    save_run(job.model, job.controller.records, metrics, settings.out)
    return metrics


def prepare(settings: Settings, corpus: Corpus) -> Job:
    """Load the model, wrap it, and build optimizer, schedule and controller."""
    if settings.model is None and corpus.task == "lm":
        raise InputError(
            "finetune: text without labels must come with --model, a causal language model, got no --model"
        )
    folder = settings.model or default_model()
    tokenizer = load_tokenizer(folder)
    device = best_device() if settings.device is None else torch.device(settings.device)
    model = load_model(folder, corpus, tokenizer).to(device)
    max_length = held_length(model, settings.max_length)
    train_features = encode(corpus.train, tokenizer, max_length)
    test_features = encode(corpus.test, tokenizer, max_length)
    steps = settings.max_steps or settings.epochs * math.ceil(len(train_features) / settings.batch_size)

    heads = head_modules(model) if corpus.task == "classification" else ()
    try:
        config = settings.adapter_config(heads, steps)
        model = wrap(model, config)
        optimizer = torch.optim.AdamW(_parameter_groups(model, heads, settings), weight_decay=0.0)
        controller = attach(model, optimizer)
    except ValueError as error:
        raise InputError(str(error)) from error
    schedule = LambdaLR(optimizer, lambda step: _warmup_decay(step, steps))
    collate = Collator(tokenizer, device)
    return Job(settings, model, collate, train_features, test_features, steps, optimizer, schedule, controller, config)


def dry_run(settings: Settings) -> None:
    """Print what a run would adapt, and the bytes it would hold; no weights and no data are loaded.

    Raises:
        InputError: the model or an option is refused, as a run would refuse it.
    """
    from ardlora_ext.plan import make_plan, skeleton
    from ardlora_ext.plan.show import show
    from ardlora_ext.report.console import make_console

    name, model = skeleton(str(settings.model or "all-minilm-l6-v2"), torch.float32)
    heads = () if "CausalLM" in type(model).__name__ else head_modules(model)
    try:
        config = settings.adapter_config(heads, settings.max_steps or 1000)  # phases scale with the steps
        plan = make_plan(name, model, config, settings.batch_size, held_length(model, settings.max_length))
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    show(plan, model, make_console(), None, paper=False)


def train(job: Job, trace: Trace) -> None:
    """Take `job.steps` optimizer steps, with a progress bar, and keep in `trace` what happened."""
    settings, total = job.settings, job.steps
    eval_steps = {round(total * point / _EVAL_POINTS) for point in range(1, _EVAL_POINTS)}
    window = _Window(max(1, total // _HISTORY_POINTS))
    interval = 0.1 if sys.stderr.isatty() else 15.0  # a log file gets a line now and then, a person a moving bar
    order = batches(len(job.train), settings.batch_size, settings.seed)
    job.model.train()
    with tqdm(total=total, desc=settings.method, unit="step", mininterval=interval, dynamic_ncols=True) as bar:
        for step in range(1, total + 1):
            begun = time.perf_counter()
            batch = job.collate([job.train[index] for index in next(order)])
            loss = _step(job, batch)
            seconds = time.perf_counter() - begun
            if not math.isfinite(loss):
                raise DivergenceError(f"finetune: the loss became {loss} at step {step}; try a smaller --lr")
            tokens = int(batch["attention_mask"].sum())
            trace.note_step(tokens, seconds)
            window.add(loss, tokens, seconds)
            closed = window.full or step == total
            trace.note_ranks(step, job.model, job.controller, keep=closed)
            if closed:
                trace.history.append(_history_entry(step, job, trace, window))
            if step in eval_steps and step < total:
                trace.note_eval(step, job.evaluate(job.probe))
            bar.set_postfix(_postfix(loss, trace), refresh=False)
            bar.update()


def _step(job: Job, batch: Batch) -> float:
    loss = job.model(**batch).loss
    loss.backward()
    trained = [p for group in job.optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, _CLIP_NORM)
    job.optimizer.step()
    job.schedule.step()
    job.optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


@dataclass
class _Window:
    """Steps that share one entry of the history, so that a long run does not write a long file."""

    size: int
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def full(self) -> bool:
        return len(self.losses) >= self.size

    def add(self, loss: float, tokens: int, seconds: float) -> None:
        self.losses.append(loss)
        self.tokens += tokens
        self.seconds += seconds


def _history_entry(step: int, job: Job, trace: Trace, window: _Window) -> Json:
    entry = {
        "step": step,
        "loss": statistics.fmean(window.losses),
        "lr": job.schedule.get_last_lr()[0],
        "mean_rank": trace.mean_rank,
        "params_live": trace.params_live,
        "tokens_per_s": window.tokens / window.seconds,
    }
    window.losses, window.tokens, window.seconds = [], 0, 0.0
    return entry


def _postfix(loss: float, trace: Trace) -> dict[str, str]:
    return {
        "loss": f"{loss:.3f}",
        "metric": f"{trace.evals[-1]['metric']:.3f}",
        "rank": f"{trace.mean_rank:.2f}",
        "params": f"{trace.params_live:,}",
        "tok/s": f"{trace.tokens_per_s:,.0f}",
    }


# --- pieces -----------------------------------------------------------------------------------------------------------


def _parameter_groups(model: torch.nn.Module, heads: tuple[str, ...], settings: Settings) -> list[Json]:
    """Split the trainable parameters into adapters and head, by the modules that own them."""
    owners = [module for name, module in model.named_modules() if name.rpartition(".")[2] in heads]
    head_ids = {id(parameter) for module in owners for parameter in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = [parameter for parameter in trained if id(parameter) not in head_ids]
    head = [parameter for parameter in trained if id(parameter) in head_ids]
    groups = [{"params": adapters, "lr": settings.lr}, {"params": head, "lr": settings.head_lr}]
    return [group for group in groups if group["params"]]


def _warmup_decay(step: int, total: int) -> float:
    """Rise linearly over the first steps, then fall linearly to zero."""
    warmup = max(1, round(_WARMUP_SHARE * total))
    return min((step + 1) / warmup, max(0.0, (total - step) / max(1, total - warmup)))


def _metrics(job: Job, corpus: Corpus, trace: Trace, before: Outcome, after: Outcome, seconds: float) -> Json:
    settings, summary = job.settings, job.controller.summary()
    budget = summary.get("budget")
    sizes = parameters_report(job.model)
    return {
        "method": settings.method,
        "model": settings.model.resolve().name if settings.model else "all-MiniLM-L6-v2",
        "data": corpus.name,
        "task": corpus.task,
        "labels": list(corpus.labels),
        "seed": settings.seed,
        "command": settings.command(),
        "config": asdict(job.config),
        "settings": {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
        },
        "controller": summary,
        "steps": job.steps,
        "epochs": job.steps * settings.batch_size / len(job.train),
        "batch_size": settings.batch_size,
        "train_examples": len(job.train),
        "test_examples": len(job.test),
        "metric_name": after.metric_name,
        "metric_before": before.metric,
        "metric_after": after.metric,
        "loss_before": before.loss,
        "loss_after": after.loss,
        "params_live": sizes.live,
        "params_peak": trace.params_peak,
        "params_budget": None if budget is None else round(budget),
        "params_trainable": sizes.trainable,
        "params_total": sizes.total,
        "seconds": seconds,
        "step_ms_median": statistics.median(trace.step_ms),
        "tokens_per_s": trace.tokens_per_s,
        "peak_rss_mb": _peak_rss_mb(),
        "versions": _versions(),
        "history": trace.history,
        "evals": trace.evals,
        "ranks": trace.ranks,
        "rank_history": trace.rank_history,
    }


def _peak_rss_mb() -> float | None:
    """Return the largest resident size of this process so far; None where the system does not tell."""
    if os.name != "posix":
        return None
    import resource  # absent on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("ardlora_ext", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            found[name] = "source tree"
    return found
