"""`compare`: runs of `finetune` for every method, rank, learning rate and seed, and one table and page of all."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from ardlora_ext import processes
from ardlora_ext.commands.finetune import quiet, settings_of
from ardlora_ext.config.registry import METHODS, has_option
from ardlora_ext.errors import InputError, SavedElsewhere
from ardlora_ext.subcommands import add_config, add_options, fail
from ardlora_ext.train.settings import GROUPS, Settings

_DESCRIPTION = """\
Fine-tune with every method, rank, learning rate and seed, each as `finetune` does it, and compare: a table of score
against parameters, mean and spread over the seeds, and comparison.html. Started again, the same command goes on
where it was; runs that have ended are not run again."""
_EPILOG = """\
examples:
  python -m ardlora_ext compare --out sweep       lora and ard at rank 8, three seeds, all-MiniLM-L6-v2 on TREC
  python -m ardlora_ext compare --out sweep --methods lora ard elalora dora --ranks 4 8 16 --lrs 3e-4 1e-3 --seeds 0 1 2
  python -m ardlora_ext compare --out sweep --data reviews.csv --model bert/ --max-steps 500

Each run is in a folder of --out. --mode, --budget, --granularity and their like go to the methods that have them.
The best learning rate is chosen by the test part, for all methods alike: with as many rates for each, it is fair.

exit code: 0, 1 when every run diverged or one is saved elsewhere for want of room, 2 for bad input
"""
_SWEPT = ("method", "r", "lr", "seed")
_OF_SOME = ("mode", "budget", "tolerance", "serve_rank", "granularity", "factoring")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: what is swept, and all others of `finetune`."""
    parser.usage, parser.description, parser.epilog = "%(prog)s --out DIR [options]", _DESCRIPTION, _EPILOG
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the folders of the runs and comparison.html"
    )
    add_config(parser)
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "--methods", nargs="+", choices=METHODS, default=("lora", "ard"), help="of the ranks (default: lora ard)"
    )
    group.add_argument("--ranks", nargs="+", type=int, default=(8,), metavar="RANK", help="as --r (default: 8)")
    group.add_argument(
        "--lrs", nargs="+", type=float, default=(1e-3,), metavar="X", help="learning rates (default: 0.001)"
    )
    group.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), metavar="N", help="(default: 0 1 2)")
    add_options(parser, GROUPS, leave_out=(*_SWEPT, "resume"))


def run(arguments: argparse.Namespace, command: str) -> int:
    """Train what has not been trained, and compare."""
    runs = plan(arguments)  # everything is checked before the first begins

    from tqdm.auto import tqdm

    from ardlora_ext.report.numbers import format_duration, format_metric
    from ardlora_ext.report.several.comparison import COMPARISON_FILE, grouped, load_runs, write_comparison
    from ardlora_ext.report.summary import print_comparison
    from ardlora_ext.train import finetune
    from ardlora_ext.train.progress import DivergenceError
    from ardlora_ext.train.run_folder import begun_as, prepare_folder

    quiet()
    prepare_folder(arguments.out)
    first = processes.launched_rank() == 0
    folders = []
    for name, settings in tqdm(runs.items(), desc="compare", unit="run", disable=not first, dynamic_ncols=True):
        if begun_as(settings.out) not in (None, settings.command()):  # of another sweep
            settings = replace(settings, resume=None, overwrite=True)
        try:
            metrics = finetune.run(settings)
        except DivergenceError as error:
            fail(f"{name}: {error}; it is left out", 1)
            continue
        except SavedElsewhere as error:
            return fail(error, 1)
        folders.append(settings.out)
        gc.collect()  # models that callbacks and hooks hold in circles
        if metrics is not None:
            score = format_metric(metrics["metric_name"], metrics["metric_after"])
            tqdm.write(f"{name}: {score}, {metrics['params_live']:,} parameters, {format_duration(metrics['seconds'])}")
    if not folders:
        return fail("compare: every run diverged; try smaller --lrs", 1)
    if first:
        print_comparison(grouped(load_runs(folders)))
        print(write_comparison(folders, arguments.out / COMPARISON_FILE))
    return 0


def plan(arguments: argparse.Namespace) -> Mapping[str, Settings]:
    """Return every run by the name of its folder, the first seed of all before the second.

    Raises:
        InputError: one of them cannot be.
    """
    for name in ("methods", "ranks", "lrs", "seeds"):
        values = getattr(arguments, name)
        if len(set(values)) < len(values):
            raise InputError(f"compare: --{name} must be different, got {' '.join(map(str, values))}")
    some = {
        option: {method for method in arguments.methods if has_option(method, option)}
        for option in _OF_SOME
        if getattr(arguments, option) is not None
    }
    runs = {}
    for seed, method, r, lr in product(arguments.seeds, arguments.methods, arguments.ranks, arguments.lrs):
        name = f"{method}-r{r}-lr{lr:g}-seed{seed}"
        changes: dict[str, Any] = {option: None for option, takers in some.items() if takers and method not in takers}
        changes |= {"out": arguments.out / name, "resume": None if arguments.overwrite else "auto"}
        runs[name] = settings_of(arguments, method=method, r=r, lr=lr, seed=seed, **changes)
    return runs
