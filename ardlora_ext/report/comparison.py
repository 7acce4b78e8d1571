"""Several runs on one page, drawn from their saved files: `report DIR DIR ...`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ardlora_ext.errors import InputError
from ardlora_ext.report import plots
from ardlora_ext.report.numbers import format_metric
from ardlora_ext.report.page import Figure, environment, render_of
from ardlora_ext.report.run_files import Json, load_run, write_page

COMPARISON_FILE = "comparison.html"
_COMPARED = ("method", "model", "data", "seed", "steps", "batch_size", "params_budget")


@dataclass(frozen=True)
class Run:
    """One run: its name, its metrics and the number of its rank decisions."""

    name: str
    m: Json
    decisions: int

    def metric(self, value: float | None) -> str:
        """Format a value of the run's metric."""
        return format_metric(self.m["metric_name"], value)

    @property
    def units(self) -> list[int]:
        """Final ranks of all units."""
        return list(chain.from_iterable(self.m["ranks"].values()))

    @property
    def mean_rank(self) -> float:
        """Mean over the units."""
        return statistics.fmean(self.units)

    @property
    def least(self) -> int:
        """Smallest rank of a unit."""
        return min(self.units)

    @property
    def most(self) -> int:
        """Largest rank of a unit."""
        return max(self.units)


def write_comparison(folders: Sequence[Path], target: Path | None = None) -> Path:
    """Draw the page of the runs saved in `folders`; `target` is comparison.html in the current folder by default.

    Raises:
        InputError: a folder does not hold a run, or is named twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("report: folders must be different runs, got one of them twice")
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    runs = []
    for name, folder in zip(names, folders, strict=True):
        metrics, records = load_run(folder)
        runs.append(Run(name, metrics, len(records)))
    html = render_of(folders, lambda: render(runs))
    target = target or Path(COMPARISON_FILE)
    write_page(target, html)
    return target


def render(runs: Sequence[Run]) -> str:
    """Return the comparison as one HTML page."""
    series = {run.name: run.m for run in runs}
    figures = [
        Figure(
            "Training",
            "Smoothed training loss, and the metric on a fixed part of each run's test set.",
            plots.compare_training(series),
        ),
        Figure(
            "Parameters and ranks",
            "Live adapter parameters over training, and the mean rank of each layer at the end.",
            plots.compare_ranks(series),
        ),
    ]
    differing = [key for key in _COMPARED if len({str(run.m[key]) for run in runs}) > 1]
    page: str = environment().get_template("comparison.html.j2").render(runs=runs, figures=figures, differing=differing)
    return page
