"""The table and the figure of a comparison; see `compare`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ardlora_ext.bench.quality.compare import Comparison, mean_interval
from ardlora_ext.bench.quality.pictures import sweep
from ardlora_ext.bench.quality.trial import SCORE_QUANTILES
from ardlora_ext.bench.stats import paired
from ardlora_ext.report.console import make_console
from ardlora_ext.report.plots import FAINT, KIND_COLOURS, STYLE

_WIDTH = 200  # columns a table may have where the output is not a terminal
_VERDICT_STYLE = {"better": "green", "worse": "red", "no difference": "dim", "": ""}


def print_table(found: Comparison, console: Console | None = None) -> None:
    """Print one line per method, then why others did not run."""
    console = console or make_console()
    measure = found.bed.measure
    table = Table(title=f"{found.bed.name}: {measure.label} ({measure.better} is better)", title_justify="left")
    table.add_column("method", no_wrap=True)
    headings = ("lr", measure.key, f"minus {found.reference} [95 %]", "verdict")
    numbers = ("Spearman", "params", "peak", "moves", "flips", "cpu s")
    for heading in (*headings, *numbers):
        table.add_column(heading, justify="left" if heading == "verdict" else "right", no_wrap=True)
    for label in found.chosen:
        table.add_row(*_cells(found, label))
    console.print(table)
    for label, reason in found.missing.items():
        console.print(f"{label}: not available ({reason})", style="yellow", highlight=False)
    for label in found.chosen:
        _print_scores(found, label, console)
    edges = [m for m, lr in found.chosen.items() if _at_edge(found, m, lr)]
    if edges:
        console.print(f"best learning rate at the edge of the grid: {', '.join(edges)}", style="yellow")


def _print_scores(found: Comparison, label: str, console: Console) -> None:
    """Print how many times as high the quantiles of a method's importance scores are as the reference's."""
    ours, theirs = ([row["scores"] for row in found.reported(m)] for m in (label, found.reference))
    if label == found.reference or not ours or None in ours or None in theirs or len(ours) != len(theirs):
        return
    cells = []
    for q, *pair in zip(SCORE_QUANTILES, np.log(ours).T, np.log(theirs).T, strict=True):
        ratio = paired(*pair)
        cells.append(f"{q:.0%} {math.exp(ratio.mean):.3g} [{math.exp(ratio.low):.3g}, {math.exp(ratio.high):.3g}]")
    console.print(f"scores of {label} / {found.reference}, by quantile: " + ", ".join(cells), highlight=False)


def _cells(found: Comparison, label: str) -> list[str]:
    rows, values = found.reported(label), found.values(label)
    interval, difference, verdict = mean_interval(values), found.difference(label), found.verdict(label)
    correlations = [row["spearman"] for row in rows if row["spearman"] is not None]
    correlations = [value for value in correlations if math.isfinite(value)]
    return [
        label,
        f"{found.chosen[label]:g}",
        "diverged" if interval is None else f"{interval.mean:.4g}",
        "" if difference is None else str(difference),
        f"[{_VERDICT_STYLE[verdict]}]{verdict}[/]" if verdict else "",
        f"{statistics.fmean(correlations):.2f}" if correlations else "-",
        *(f"{statistics.fmean(row[key] for row in rows):,.0f}" for key in ("params", "peak_params", "moves", "flips")),
        f"{statistics.fmean(row['seconds'] for row in rows):.1f}",
    ]


def _at_edge(found: Comparison, label: str, lr: float) -> bool:
    tried = {row["lr"] for row in found.rows if row["method"] == label and row["split"] == "tune"}
    return len(tried) > 2 and lr in (min(tried), max(tried))


def draw(found: Comparison, path: Path) -> None:
    """Draw the measure by method, the learning-rate sweep, and where the planted bed allows it learned ranks."""
    labels = list(found.chosen)
    colours = {label: KIND_COLOURS[i % len(KIND_COLOURS)] for i, label in enumerate(labels)}
    panels: list[Any] = [_draw_measure, _draw_sweep]
    adaptive = [
        m for m in labels if any(len({r for u in row["ranks"].values() for r in u}) > 1 for row in found.reported(m))
    ]
    if adaptive and "planted" in found.reported(adaptive[0])[0]:
        panels.append(_draw_ranks)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(panels), 0.9 + 0.32 * max(8, len(labels))), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
            panel(axes, found, adaptive if panel is _draw_ranks else labels, colours)
        figure.savefig(path, dpi=110, format="png")


def _draw_measure(axes: Axes, found: Comparison, labels: Sequence[str], colours: dict[str, str]) -> None:
    for line, label in enumerate(reversed(labels)):
        values = [value for value in found.values(label) if math.isfinite(value)]
        axes.plot(values, [line] * len(values), "o", color=colours[label], alpha=0.35, markersize=4, mew=0)
        interval = mean_interval(values)
        if interval is not None:
            low = interval.mean if math.isnan(interval.low) else interval.low
            high = interval.mean if math.isnan(interval.high) else interval.high
            axes.plot([low, high], [line, line], "-", color=colours[label], linewidth=2.5)
            axes.plot([interval.mean], [line], "|", color=colours[label], markersize=13, mew=2.5)
    axes.set_yticks(range(len(labels)), list(reversed(labels)))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{found.bed.measure.better} is better; a dot per seed, mean and 95 % interval")
    axes.set_title(found.bed.measure.label)


def _draw_sweep(axes: Axes, found: Comparison, labels: Sequence[str], colours: dict[str, str]) -> None:
    sweep(axes, found.rows, {label: colours[label] for label in labels})


def _draw_ranks(axes: Axes, found: Comparison, labels: Sequence[str], colours: dict[str, str]) -> None:
    top = 0
    for label in labels:
        learned: dict[int, list[int]] = {}
        for row in found.reported(label):
            for truth, rank in zip(row["planted"], row["learned"], strict=True):
                learned.setdefault(truth, []).append(rank)
        ranks = sorted(learned)
        top = max(top, *ranks)
        axes.plot(ranks, [statistics.fmean(learned[r]) for r in ranks], "o-", color=colours[label], ms=4, label=label)
    axes.plot([0, top], [0, top], "--", color=FAINT, linewidth=1)
    axes.set_xlabel("planted rank")
    axes.set_title("mean learned rank")
    axes.legend(fontsize=7)
