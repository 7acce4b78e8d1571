"""`bench quality`: compare rank-allocation methods at equal final parameters."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ardlora_ext.bench.machine import check_writable, headline, machine, write_json
from ardlora_ext.bench.quality.beds.planted import VARIANTS, PlantedBed
from ardlora_ext.bench.quality.compare import Comparison, Effort, compare
from ardlora_ext.bench.quality.methods import RECIPES, parse
from ardlora_ext.bench.quality.trial import Bed
from ardlora_ext.errors import InputError

BEDS = ("planted", "tiny", "phonebook", "encoder-book", "experts", "real", "play")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quality`."""
    parser.epilog = "methods:\n" + "\n".join(f"  {name:18}{recipe.about}" for name, recipe in RECIPES.items())
    parser.add_argument("--bed", choices=BEDS, default="planted", help="where to compare")
    parser.add_argument("--variant", choices=VARIANTS, default="ranks", help="planted bed: what differs between units")
    parser.add_argument("--pairs", type=int, help="books: how many pairs are stored (default: 200; encoder-book 1000)")
    parser.add_argument("--task", default="trec6", help="real bed: data set")
    parser.add_argument("--examples", type=int, help="real bed: how many examples are trained on (default: 1000)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(RECIPES),
        metavar="NAME",
        help="methods (default: all), each with config fields to change after a colon: ard:tv=0,lr_alpha=0.05",
    )
    parser.add_argument("--reference", help="method that differences are taken to (default: the first)")
    parser.add_argument("--seeds", type=int, help="report seeds (default: 10; 5 tiny and experts, 3 with real models)")
    parser.add_argument(
        "--tune-seeds", type=int, help="seeds to choose the learning rate on (default: 2 planted and phonebook, else 1)"
    )
    parser.add_argument("--lrs", type=float, nargs="+", help="learning rates to try (default: 7 values by bed)")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run (default: by bed)")
    parser.add_argument("--rank", type=int, help="rank of uniform LoRA, whose parameters everyone gets")
    parser.add_argument("--quick", action="store_true", help="a small planted bed, 3 seeds, below a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the comparison as a PNG")


def run(arguments: argparse.Namespace, command: str) -> None:
    """Run the comparison, print its table, and write what was asked for."""
    methods = list({label: parse(label) for label in arguments.methods}.values())
    bed, effort = _bed(arguments)
    reference = arguments.reference or methods[0].label
    if reference not in (method.label for method in methods):
        raise InputError(f"bench: --reference must be one of the methods, got {reference}")
    check_writable(arguments.json, "--json")
    check_writable(arguments.plot, "--plot")
    from ardlora_ext.bench.quality import report  # needs rich and matplotlib: better to fail before the runs

    interval = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(total=effort.trials(len(methods)), unit="run", mininterval=interval, dynamic_ncols=True) as bar:

        def tick(found: Comparison) -> None:
            bar.set_postfix_str(found.rows[-1]["method"], refresh=False)
            bar.update()
            if arguments.json is not None:  # after each run, so that an interrupted comparison is not lost
                write_json(arguments.json, command, found.rows)

        found = compare(bed, methods, effort, reference, tick)
    print(headline(machine()))
    print(command)
    report.print_table(found)
    if arguments.plot is not None:
        report.draw(found, arguments.plot)


def _bed(arguments: argparse.Namespace) -> tuple[Bed, Effort]:
    """Return the bed and the effort that the options ask for."""
    quick = arguments.quick
    if quick and arguments.bed != "planted":
        raise InputError(f"bench: --quick must come with --bed planted, got {arguments.bed}")
    for name in ("seeds", "tune_seeds", "steps", "rank", "pairs", "examples"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"bench: --{name.replace('_', '-')} must be at least 1, got {value}")
    if arguments.lrs is not None and not all(0 < lr < math.inf for lr in arguments.lrs):
        raise InputError(f"bench: --lrs must be positive, got {' '.join(map(str, arguments.lrs))}")
    for name, owners in {"pairs": ("phonebook", "encoder-book"), "examples": ("real",)}.items():
        if getattr(arguments, name) is not None and arguments.bed not in owners:
            raise InputError(f"bench: --{name} must come with --bed {' or '.join(owners)}, got {arguments.bed}")
    sizes = ("steps", "rank", "pairs", "examples")
    chosen = {name: getattr(arguments, name) for name in sizes if getattr(arguments, name) is not None}
    bed = _BEDS[arguments.bed](arguments, chosen)
    slow = {"tiny": (5, 1), "experts": (5, 1), "encoder-book": (3, 1), "real": (3, 1), "play": (3, 1)}
    default = slow.get(arguments.bed, (10, 2))
    seeds, tune_seeds = (3, 1) if quick else default
    lrs = arguments.lrs or (bed.lrs[3:6] if quick else bed.lrs)
    return bed, Effort(arguments.seeds or seeds, arguments.tune_seeds or tune_seeds, tuple(lrs))


def _planted(arguments: argparse.Namespace, chosen: Mapping[str, Any]) -> Bed:
    size = {"matrices": 10, "steps": 120} if arguments.quick else {}
    if arguments.variant == "heads":
        size |= {"matrices": 4, "rank": 4}
    return PlantedBed(variant=arguments.variant, **{**size, **chosen})


def _tiny(_arguments: argparse.Namespace, chosen: Mapping[str, Any]) -> Bed:
    from ardlora_ext.bench.quality.beds.tiny import TinyBed

    return TinyBed(**chosen)


def _phonebook(arguments: argparse.Namespace, chosen: Mapping[str, Any]) -> Bed:
    from ardlora_ext.bench.quality.beds.phonebook import PhonebookBed

    return PhonebookBed(**chosen)


def _encoder_book(_arguments: argparse.Namespace, chosen: Mapping[str, Any]) -> Bed:
    from ardlora_ext.bench.quality.beds.encoder_book import EncoderBookBed

    return EncoderBookBed(**chosen)


def _experts(_arguments: argparse.Namespace, chosen: Mapping[str, Any]) -> Bed:
    from ardlora_ext.bench.quality.beds.experts import ExpertsBed

    return ExpertsBed(**chosen)


def _real(arguments: argparse.Namespace, chosen: Mapping[str, Any]) -> Bed:
    from ardlora_ext.bench.quality.beds.real import RealBed

    return RealBed(task_name=arguments.task, **chosen)


def _play(_arguments: argparse.Namespace, chosen: Mapping[str, Any]) -> Bed:
    from ardlora_ext.bench.quality.beds.play import PlayBed

    return PlayBed(**chosen)


_BEDS: dict[str, Callable[[argparse.Namespace, Mapping[str, Any]], Bed]] = {
    "planted": _planted,
    "tiny": _tiny,
    "phonebook": _phonebook,
    "encoder-book": _encoder_book,
    "experts": _experts,
    "real": _real,
    "play": _play,
}
