"""`frontier`: one trained adapter cut to many sizes, each scored, and the one that is wanted written."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ardlora_ext.errors import InputError

if TYPE_CHECKING:
    from ardlora_ext.ranks.frontier import Point
    from ardlora_ext.train.finetune import Job
    from ardlora_ext.train.settings import Settings

_EPILOG = """\
examples:
  python -m ardlora_ext frontier run                                      a table, and a figure in run/report.html
  python -m ardlora_ext frontier run --eval-data other.csv                scored on other data
  python -m ardlora_ext frontier run --smallest-within 0.5 --to small     the smallest within half a point of the best
  python -m ardlora_ext frontier run --parameters 40000 --to small        the best of 40 000 parameters

Each size is cut from the whole adapter by what the loss would lose, and is not trained on.
"""
_OURS = ("data", "eval_data", "model", "batch_size", "device", "threads")  # options that replace those of the run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = "Cut the adapter of a run to several sizes, score each, and write the one that is wanted."
    parser.epilog = _EPILOG
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that `finetune` wrote")
    parser.add_argument("--eval-data", metavar="FILE|DIR|ID", help="data to score on (default: the run's test part)")
    parser.add_argument("--shares", type=float, nargs="+", metavar="X", help="sizes in parts of the whole, in (0, 1]")
    parser.add_argument(
        "--batches", type=int, default=16, metavar="N", help="training batches that tell what the loss would lose"
    )
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument(
        "--smallest-within",
        type=float,
        metavar="X",
        help="choose the smallest size at most X worse than the best (points of accuracy, else the score's unit)",
    )
    wanted.add_argument("--parameters", type=int, metavar="N", help="choose the size of at most N parameters")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder to write the chosen size to")
    parser.add_argument("--data", metavar="FILE|DIR|ID", help="the run's data, if it is elsewhere now")
    parser.add_argument("--model", metavar="DIR|ID", help="the run's model, if it is elsewhere now")
    parser.add_argument("--batch-size", type=int, metavar="N", help="examples at once (default: the run's)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: the run's)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def run(arguments: argparse.Namespace, command: str) -> None:
    """Score all sizes, draw them into the run's page, and write the chosen one."""
    _check(arguments)
    settings = _settings(arguments)  # before the slow imports

    from tqdm import tqdm

    from ardlora_ext.commands.finetune import quiet
    from ardlora_ext.file_set import write_set
    from ardlora_ext.ranks.frontier import SHARES, frontier
    from ardlora_ext.report.console import make_console
    from ardlora_ext.report.page import write_report
    from ardlora_ext.report.sizes import FRONTIER_FILE, frontier_file, print_sizes
    from ardlora_ext.train.finetune import prepare

    quiet()
    folder = arguments.folder
    job = prepare(settings, saved=folder)
    trainer = job.trainer
    trainer.model.eval()
    batches = [trainer._prepare_inputs(b) for b in islice(trainer.get_train_dataloader(), arguments.batches)]
    shares = arguments.shares or SHARES
    losses: list[float] = []
    with tqdm(total=len(shares), desc="sizes", unit="size", dynamic_ncols=True, disable=None) as bar:

        def score(_: object) -> float:
            loss, metric = job.evaluate()
            losses.append(loss)
            bar.update()
            return metric

        try:
            points = frontier(trainer.model, batches, loss_fn=_loss_of(job), score=score, shares=shares)
        except ValueError as error:
            raise InputError(str(error)) from error
        bar.update(bar.total - bar.n)
    found: dict[str, Any] = {
        "metric_name": _metric_name(job),
        "data": Path(arguments.eval_data).name if arguments.eval_data else job.corpus.name,
        "points": [{**asdict(p), "loss": loss} for p, loss in zip(points, losses, strict=True)],
    }
    chosen = _chosen(arguments, points, found["metric_name"])
    found["chosen"] = None if chosen is None else chosen.parameters
    print_sizes(make_console(), found)
    write_set(folder, {FRONTIER_FILE: frontier_file(folder, found)})
    if chosen is not None:
        print(_told(arguments, chosen, points, found["metric_name"]))
        if arguments.to is not None:
            _write(job, chosen, points, batches, arguments.to)
    print(write_report(folder))


def _check(arguments: argparse.Namespace) -> None:
    """Check the options that no other module does."""
    if arguments.batches < 1:
        raise InputError(f"frontier: --batches must be at least 1, got {arguments.batches}")
    if arguments.smallest_within is not None and not arguments.smallest_within >= 0.0:
        raise InputError(f"frontier: --smallest-within must be at least 0, got {arguments.smallest_within}")
    if arguments.parameters is not None and arguments.parameters < 1:
        raise InputError(f"frontier: --parameters must be at least 1, got {arguments.parameters}")
    if arguments.to is not None and arguments.smallest_within is None and arguments.parameters is None:
        raise InputError("frontier: --to must come with --smallest-within or --parameters, got neither")
    if arguments.to is not None and arguments.to.resolve() == arguments.folder.resolve():
        raise InputError(f"frontier: --to must be another folder than DIR, got {arguments.to}")


def _settings(arguments: argparse.Namespace) -> Settings:
    """Return the settings of the run, with what the options replace.

    Raises:
        InputError: the folder does not hold a run, or an option is refused.
    """
    from ardlora_ext.report.run_files import METRICS_FILE, load_run
    from ardlora_ext.train.settings import Settings

    folder = arguments.folder
    if not (folder / METRICS_FILE).is_file():
        raise InputError(f"frontier: DIR must be a folder that finetune wrote, got no {METRICS_FILE} in {folder}")
    metrics, _ = load_run(folder)
    saved = metrics["settings"]
    if not isinstance(saved, dict) or "method" not in saved:  # another loop's
        raise InputError(
            f"frontier: DIR must be a folder that finetune wrote, which knows its data, got another run in {folder}; "
            "ardlora_ext.frontier(model, batches) is for those"
        )
    known = {entry.name for entry in fields(Settings)}
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in saved.items() if key in known}
    try:
        found = Settings(**{**values, "out": folder, "resume": None, "report_to": (), "early_stopping": None})
    except (TypeError, AttributeError) as cause:
        raise InputError(
            f"frontier: settings in {folder / METRICS_FILE} must be those of finetune, got {cause!r}"
        ) from cause
    given = {name: getattr(arguments, name) for name in _OURS if getattr(arguments, name) is not None}
    if "eval_data" in given:
        given["eval_split"] = None
    found = replace(found, **given)
    return replace(found, task=metrics["task"]) if found.task == "auto" else found


def _metric_name(job: Job) -> str:
    from ardlora_ext.train.settings import METRICS

    return METRICS[job.corpus.task]


def _loss_of(job: Job) -> Any:
    """Return the loss of a batch as Trainer computes it."""

    def loss(model: Any, batch: Any) -> Any:
        with job.trainer.compute_loss_context_manager():
            return job.trainer.compute_loss(model, dict(batch))

    return loss


def _chosen(arguments: argparse.Namespace, points: list[Point], metric: str) -> Point | None:
    """Return the size that is asked for, if one is."""
    from ardlora_ext.ranks.frontier import smallest_within

    if arguments.smallest_within is not None:
        tolerance = arguments.smallest_within / (100.0 if metric == "accuracy" else 1.0)
        return smallest_within(points, tolerance, "lower" if metric == "perplexity" else "higher")
    if arguments.parameters is None:
        return None
    fitting = [point for point in points if point.parameters <= arguments.parameters]
    if not fitting:
        least = min(point.parameters for point in points)
        raise InputError(
            f"frontier: --parameters must be at least {least:,}, the smallest that was scored (--shares goes lower), "
            f"got {arguments.parameters:,}"
        )
    return fitting[0]


def _told(arguments: argparse.Namespace, chosen: Point, points: list[Point], metric: str) -> str:
    from ardlora_ext.report.numbers import format_metric

    share = chosen.parameters / points[0].parameters
    rule = (
        f"within {arguments.smallest_within:g} of the best"
        if arguments.smallest_within is not None
        else f"at most {arguments.parameters:,}"
    )
    return f"{rule}: {chosen.parameters:,} parameters ({share:.1%}), {metric} {format_metric(metric, chosen.score)}"


def _write(job: Job, chosen: Point, points: list[Point], batches: list[Any], folder: Path) -> None:
    """Cut the adapter to the chosen size and write it."""
    from ardlora_ext.checkpoint.save_pretrained import save_pretrained
    from ardlora_ext.ranks.compress import compress

    model = job.trainer.model
    if chosen.parameters < points[0].parameters:
        compress(model, chosen.parameters, metric="loss", batches=batches, loss_fn=_loss_of(job))
    try:
        save_pretrained(model, folder)
    except OSError as error:
        raise InputError(f"frontier: --to must be a folder that can be written, got {folder}: {error}") from error
    print(f"{folder}: {chosen.parameters:,} parameters, a PEFT checkpoint")
