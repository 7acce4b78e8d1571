"""Figures of several runs over one another; runs that differ by their seed alone share a name and a colour."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from ardlora_ext.report.places import group_ranks, layer_names
from ardlora_ext.report.plots import KIND_COLOURS, STYLE, WIDTH_IN, Json, png, smoothed

_FLAT_LABELS = 6  # more names on an axis are slanted
_TICKS_APART = 1.2
_LOG_RANGE = 3.0  # parameters that differ by more stand on a logarithmic axis


@dataclass(frozen=True)
class Point:
    """Runs of one method that differ by their seed alone: parameters at the end, and the metric of each run."""

    parameters: float
    values: Sequence[float]
    best: bool  # among the points of its method and rank


def score_against_parameters(methods: Mapping[str, Sequence[Point]], metric_name: str) -> bytes:
    """Draw the metric against the adapter parameters, a line for each method through the best of each rank."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 4.6), layout="constrained")
        axes = figure.subplots()
        for (name, points), colour in zip(methods.items(), cycle(KIND_COLOURS)):
            for point in points:
                count = len(point.values)
                axes.plot([point.parameters] * count, point.values, ".", color=colour, alpha=0.3, markersize=7)
            best = sorted((point for point in points if point.best), key=lambda point: point.parameters)
            means = [statistics.fmean(point.values) for point in best]
            spreads = [statistics.stdev(point.values) if len(point.values) > 1 else 0.0 for point in best]
            places = [point.parameters for point in best]
            axes.errorbar(places, means, spreads, color=colour, marker="o", markersize=5, capsize=3, label=name)
        every = [point.parameters for points in methods.values() for point in points]
        if max(every) > _LOG_RANGE * min(every):
            axes.set_xscale("log", base=2)
            axes.minorticks_off()
            axes.set_xticks(_apart(every))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set(title=f"{metric_name.capitalize()} against adapter parameters", xlabel="live parameters at the end")
        axes.margins(x=0.06, y=0.12)
        _percent(axes, [metric_name])
        axes.legend()
        return png(figure)


def _looks(groups: Mapping[str, Sequence[Json]]) -> Iterator[tuple[Json, Json]]:
    """Yield each run with the look of its lines: a colour for each name, paler the more runs share it."""
    for (name, runs), colour in zip(groups.items(), cycle(KIND_COLOURS)):
        for index, run in enumerate(runs):
            yield run, {"color": colour, "label": None if index else name, "alpha": 1 / len(runs) ** 0.5}


def compare_training(groups: Mapping[str, Sequence[Json]]) -> bytes:
    """Draw the smoothed training loss and the held-out metric of several runs, by name."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for run, look in _looks(groups):
            steps = [entry["step"] for entry in run["history"]]
            left.plot(steps, smoothed([entry["loss"] for entry in run["history"]]), **look)
            points = [entry["step"] for entry in run["evals"]]
            values = [entry["metric"] for entry in run["evals"]]
            right.plot(points, values, marker="o", markersize=4, clip_on=False, **look)
        metrics = list(dict.fromkeys(run["metric_name"] for runs in groups.values() for run in runs if run["evals"]))
        left.set(title="Training loss", xlabel="step")
        right.set(title=", ".join(metrics).capitalize(), xlabel="step")
        _percent(right, metrics)
        for axes in (left, right):
            axes.margins(x=0)
        left.legend()
        return png(figure)


def compare_ranks(groups: Mapping[str, Sequence[Json]]) -> bytes:
    """Draw the live parameters over training and the final mean rank of each layer of several runs, by name."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        layers: dict[str, None] = {}
        for run, look in _looks(groups):
            history = run["rank_history"]
            steps = [*(entry["step"] for entry in history), run["steps"]]
            params = [entry["params"] for entry in history]
            left.step(steps, [*params, params[-1]], where="post", **look)
            means = group_ranks(run["ranks"], layer_names(run["ranks"]))
            layers.update(dict.fromkeys(means))
            heights = [statistics.fmean(ranks) for ranks in means.values()]
            right.plot(list(means), heights, marker="o", markersize=4, **look)
        left.set(title="Live adapter parameters", xlabel="step")
        left.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        left.margins(x=0)
        left.legend()
        right.set(title="Mean rank by layer")
        right.set_xticks(range(len(layers)), list(layers), rotation=30 if len(layers) > _FLAT_LABELS else 0, ha="right")
        return png(figure)


def _percent(axes: Axes, metrics: Sequence[str]) -> None:
    if list(metrics) == ["accuracy"]:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _apart(values: Sequence[float]) -> list[float]:
    """Return those of the values that have room for their numbers on a logarithmic axis."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value > _TICKS_APART * kept[-1]:
            kept.append(value)
    return kept
