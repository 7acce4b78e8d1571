"""Compare rank-allocation methods at equal final parameters: `python -m ardlora_ext.bench quality`.

For every method the learning rate is chosen on seeds of its own by the validation loss, with the same tries for all;
then all run on the same report seeds and are compared to one of them seed by seed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ardlora_ext.bench.machine import check_writable, headline, machine, write_json
from ardlora_ext.bench.methods import RECIPES, Method, MethodUnavailable, parse
from ardlora_ext.bench.planted import VARIANTS, PlantedBed
from ardlora_ext.bench.stats import Interval, bootstrap, paired
from ardlora_ext.bench.trial import Bed, Row, run_trial
from ardlora_ext.data import InputError

TUNE_SEED = 1000  # tuning seeds start here, far from the report seeds 0, 1, ...
BEDS = ("planted", "tiny", "real")


@dataclass(frozen=True)
class Effort:
    """How much is run: report seeds, tuning seeds, and the learning rates each method may try."""

    seeds: int
    tune_seeds: int
    lrs: tuple[float, ...]

    def trials(self, methods: int) -> int:
        """Return the number of runs."""
        tuning = len(self.lrs) * self.tune_seeds if len(self.lrs) > 1 else 0
        return methods * (tuning + self.seeds)


@dataclass
class Comparison:
    """What a comparison found.

    Attributes:
        bed: where it was made.
        reference: label of the method that differences are taken to.
        rows: of every run; `split` tells tuning from report runs.
        chosen: learning rate of each method.
        missing: why a method did not run.
    """

    bed: Bed
    reference: str
    rows: list[Row] = field(default_factory=list)
    chosen: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def reported(self, label: str) -> list[Row]:
        """Return the report rows of a method, by seed."""
        found = [row for row in self.rows if row["method"] == label and row["split"] == "report"]
        return sorted(found, key=lambda row: row["seed"])

    def values(self, label: str, key: str | None = None) -> list[float]:
        """Return what a method measured, by seed."""
        return [row[key or self.bed.measure.key] for row in self.reported(label)]

    def difference(self, label: str) -> Interval | None:
        """Return a method's measure minus the reference's, or None where there is nothing to compare."""
        if label == self.reference or self.reference not in self.chosen:
            return None
        ours, theirs = self.values(label), self.values(self.reference)
        if not all(map(math.isfinite, ours + theirs)):
            return None
        return paired(ours, theirs)

    def verdict(self, label: str) -> str:
        """Return `better`, `worse` or `no difference`; nothing for one seed and for the reference itself."""
        interval = self.difference(label)
        if interval is None or math.isnan(interval.low):
            return ""
        if not interval.excludes_zero:
            return "no difference"
        return "better" if (interval.mean < 0) == (self.bed.measure.better == "lower") else "worse"


Tick = Callable[[Comparison], None]


def compare(
    bed: Bed, methods: Sequence[Method], effort: Effort, reference: str, tick: Tick = lambda _: None
) -> Comparison:
    """Tune and run every method; one that this build lacks is noted in `missing`. `tick` is called after each run.

    Raises:
        InputError: a method does not fit the bed, or none can run.
    """
    found = Comparison(bed, reference)
    for method in methods:
        try:
            _run_method(found, method, effort, tick)
        except MethodUnavailable as reason:
            found.missing[method.label] = str(reason)
    if not found.chosen:
        reasons = "; ".join(f"{label}: {why}" for label, why in found.missing.items())
        raise InputError(f"bench: at least one method must be able to run, got none ({reasons})")
    return found


def _run_method(found: Comparison, method: Method, effort: Effort, tick: Tick) -> None:
    def trial(lr: float, seed: int, split: str) -> Row:
        row = {**run_trial(found.bed, method, lr, seed, tuning=split == "tune"), "split": split}
        found.rows.append(row)
        tick(found)
        return row

    lr = effort.lrs[0]
    if len(effort.lrs) > 1:
        losses = {
            lr: sum(trial(lr, TUNE_SEED + s, "tune")["valid"] for s in range(effort.tune_seeds)) for lr in effort.lrs
        }
        lr = min(losses, key=lambda value: losses[value])
        if not math.isfinite(losses[lr]):
            raise MethodUnavailable("diverged at every learning rate")
    for seed in range(effort.seeds):
        trial(lr, seed, "report")
    found.chosen[method.label] = lr


# --- command line -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quality`."""
    parser.epilog = "methods:\n" + "\n".join(f"  {name:10}{recipe.about}" for name, recipe in RECIPES.items())
    parser.add_argument("--bed", choices=BEDS, default="planted", help="where to compare")
    parser.add_argument("--variant", choices=VARIANTS, default="ranks", help="planted bed: what differs between units")
    parser.add_argument("--task", default="trec6", help="real bed: data set")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(RECIPES),
        metavar="NAME",
        help="methods (default: all), each with config fields to change after a colon: ard:tv=0,lr_alpha=0.05",
    )
    parser.add_argument("--reference", help="method that differences are taken to (default: the first)")
    parser.add_argument("--seeds", type=int, help="report seeds (default: 10 planted, 5 tiny, 3 real)")
    parser.add_argument("--tune-seeds", type=int, help="seeds on which the learning rate is chosen (default: 2, 1, 1)")
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
    from ardlora_ext.bench import quality_report  # needs rich and matplotlib: better to fail before the runs

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
    quality_report.print_table(found)
    if arguments.plot is not None:
        quality_report.draw(found, arguments.plot)


def _bed(arguments: argparse.Namespace) -> tuple[Bed, Effort]:
    """Return the bed and the effort that the options ask for."""
    quick = arguments.quick
    if quick and arguments.bed != "planted":
        raise InputError(f"bench: --quick must come with --bed planted, got {arguments.bed}")
    for name in ("seeds", "tune_seeds", "steps", "rank"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"bench: --{name.replace('_', '-')} must be at least 1, got {value}")
    if arguments.lrs is not None and not all(0 < lr < math.inf for lr in arguments.lrs):
        raise InputError(f"bench: --lrs must be positive, got {' '.join(map(str, arguments.lrs))}")
    chosen = {name: getattr(arguments, name) for name in ("steps", "rank") if getattr(arguments, name) is not None}
    bed = _BEDS[arguments.bed](arguments, chosen)
    default = {"planted": (10, 2), "tiny": (5, 1), "real": (3, 1)}[arguments.bed]
    seeds, tune_seeds = (3, 1) if quick else default
    lrs = arguments.lrs or (bed.lrs[3:6] if quick else bed.lrs)
    return bed, Effort(arguments.seeds or seeds, arguments.tune_seeds or tune_seeds, tuple(lrs))


def _planted(arguments: argparse.Namespace, chosen: Mapping[str, Any]) -> Bed:
    size = {"matrices": 10, "steps": 120} if arguments.quick else {}
    if arguments.variant == "heads":
        size |= {"matrices": 4, "rank": 4}
    return PlantedBed(variant=arguments.variant, **{**size, **chosen})


def _tiny(_arguments: argparse.Namespace, chosen: Mapping[str, Any]) -> Bed:
    from ardlora_ext.bench.tiny import TinyBed

    return TinyBed(**chosen)


def _real(arguments: argparse.Namespace, chosen: Mapping[str, Any]) -> Bed:
    from ardlora_ext.bench.real import RealBed

    return RealBed(task_name=arguments.task, **chosen)


_BEDS: dict[str, Callable[[argparse.Namespace, Mapping[str, Any]], Bed]] = {
    "planted": _planted,
    "tiny": _tiny,
    "real": _real,
}


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return the mean of what a method measured with its interval, or None where a run diverged."""
    return bootstrap(values) if values and all(map(math.isfinite, values)) else None
