"""Several runs on one page, drawn from their saved files: `report DIR DIR ...`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ardlora_ext.errors import InputError
from ardlora_ext.report.numbers import better, format_metric
from ardlora_ext.report.page import Figure, environment, render_of
from ardlora_ext.report.run_files import Json, load_run, write_page
from ardlora_ext.report.several import plots

COMPARISON_FILE = "comparison.html"
_COMPARED = ("method", "model", "data", "r", "lr", "seed", "steps", "batch_size", "params_budget")
_OWN = ("out", "seed", "resume", "overwrite", "threads", "device", "report_to")  # of a run, not of what is compared
_MOST_CURVES = 8  # as many as there are colours


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
    def options(self) -> dict[str, Any]:
        """What the run was asked to do, but for its seed and its place."""
        settings = {name: value for name, value in self.m["settings"].items() if name not in _OWN}
        return {"model": self.m["model"], "data": self.m["data"], **settings, "method": self.m["method"]}


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ by their seed alone."""

    name: str
    runs: Sequence[Run]

    @property
    def method(self) -> str:
        """What decided the ranks."""
        return str(self.runs[0].m["method"])

    @property
    def values(self) -> list[float]:
        """The metric after training of each run that tells it."""
        return [run.m["metric_after"] for run in self.runs if run.m["metric_after"] is not None]

    @property
    def score(self) -> str:
        """Mean and spread (standard deviation) of the metric over the runs."""
        spread = f" ± {self.runs[0].metric(statistics.stdev(self.values))}" if len(self.values) > 1 else ""
        return self.runs[0].metric(self.mean("metric_after")) + spread

    def mean(self, key: str) -> float | None:
        """Return the mean of a number over the runs that tell it."""
        values = [run.m[key] for run in self.runs if run.m[key] is not None]
        return statistics.fmean(values) if values else None

    @property
    def mean_rank(self) -> float:
        """Mean over runs and units."""
        return statistics.fmean(run.mean_rank for run in self.runs)

    def betters(self, other: Group) -> bool:
        """Tell whether the mean metric is better than another's."""
        ours, theirs = self.mean("metric_after"), other.mean("metric_after")
        return ours is not None and (theirs is None or better(self.runs[0].m["metric_name"], ours, theirs))


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Put runs together that differ by their seed alone, named by what else differs; single runs keep their names."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(run.options, sort_keys=True, default=str), []).append(run)
    if len(found) == len(runs):
        return [Group(run.name, [run]) for run in runs]
    options = [members[0].options for members in found.values()]
    keys = [key for key in options[0] if key != "method" and len({str(values.get(key)) for values in options}) > 1]
    groups = []
    for values, members in zip(options, found.values(), strict=True):
        words = [f"{key} {values[key]}" for key in keys if values.get(key) is not None]
        groups.append(Group(" ".join([values["method"], *words]), members))
    return groups


def best_of(groups: Sequence[Group], *keys: str) -> list[Group]:
    """Return the best group of each method, or of each method with the same `keys` of its options."""
    best: dict[tuple[str, ...], Group] = {}
    for group in groups:
        kind = (group.method, *(str(group.runs[0].options.get(key)) for key in keys))
        if kind not in best or group.betters(best[kind]):
            best[kind] = group
    return [group for group in groups if group in best.values()]


def write_comparison(folders: Sequence[Path], target: Path | None = None) -> Path:
    """Draw the page of the runs saved in `folders`; `target` is comparison.html in the current folder by default.

    Raises:
        InputError: a folder does not hold a run, or is named twice.
    """
    runs = load_runs(folders)
    html = render_of(folders, lambda: render(runs))
    target = target or Path(COMPARISON_FILE)
    write_page(target, html)
    return target


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs saved in `folders`, named by them.

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
    return runs


def render(runs: Sequence[Run]) -> str:
    """Return the comparison as one HTML page."""
    groups = grouped(runs)
    drawn = groups if len(groups) <= _MOST_CURVES else best_of(groups)
    which = "" if drawn is groups else " The best of each method."
    series = {group.name: [run.m for run in group.runs] for group in drawn}
    figures = [
        Figure(
            "Training",
            f"Smoothed training loss, and the metric on a fixed part of each run's test set.{which}",
            plots.compare_training(series),
        ),
        Figure(
            "Parameters and ranks",
            f"Live adapter parameters over training, and the mean rank of each layer at the end.{which}",
            plots.compare_ranks(series),
        ),
    ]
    names = {run.m["metric_name"] for run in runs}
    if len(runs) > 2 and len(names) == 1 and None not in names:
        figures.insert(0, _scores(groups))
    told = {key: {str({**run.m["settings"], **run.m}.get(key)) for run in runs} for key in _COMPARED}
    differing = [key for key, values in told.items() if len(values) > 1]
    template = environment().get_template("comparison.html.j2")
    page: str = template.render(runs=runs, groups=groups, best=best_of(groups), figures=figures, differing=differing)
    return page


def _scores(groups: Sequence[Group]) -> Figure:
    best = best_of(groups, "r", "budget")
    methods: dict[str, list[plots.Point]] = {}
    for group in groups:
        point = plots.Point(group.mean("params_live") or 0.0, group.values, group in best)
        methods.setdefault(group.method, []).append(point)
    return Figure(
        "Score and parameters",
        "A point for each run; lines go through means, bars are standard deviations over seeds. Of several learning "
        "rates, lines take the one with the best mean, which flatters whoever tried more.",
        plots.score_against_parameters(methods, groups[0].runs[0].m["metric_name"]),
    )
