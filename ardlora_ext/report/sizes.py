"""One adapter at many sizes: the file that the command `frontier` writes beside a run, its table and its figure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.console import Console
from rich.table import Table

from ardlora_ext.file_set import read_set
from ardlora_ext.json_file import parse_json
from ardlora_ext.report import plots
from ardlora_ext.report.numbers import format_metric
from ardlora_ext.report.run_files import METRICS_FILE, RUN_COMMITS, Json

FRONTIER_FILE = "frontier.json"


def frontier_file(folder: Path, content: Json) -> bytes:
    """Return the content of frontier.json, which names the run in `folder` that it belongs to."""
    metrics = read_set(folder, (METRICS_FILE,), *RUN_COMMITS)[METRICS_FILE]
    return (json.dumps({"run": _digest(metrics), **content}, indent=1) + "\n").encode()


def load_frontier(folder: Path) -> dict[str, Any] | None:
    """Return what was found for the run in `folder`; None if nobody asked, or since then another run is there.

    Raises:
        InputError: the file is no JSON.
        OSError: it cannot be read.
    """
    files = read_set(folder, (METRICS_FILE, FRONTIER_FILE), *RUN_COMMITS)
    if FRONTIER_FILE not in files or METRICS_FILE not in files:
        return None
    found = parse_json(files[FRONTIER_FILE], f"report: {folder / FRONTIER_FILE}")
    mine = isinstance(found, dict) and found.get("run") == _digest(files[METRICS_FILE])
    return found if mine else None


def _digest(metrics: bytes) -> str:
    return hashlib.sha256(metrics).hexdigest()


def print_sizes(console: Console, found: Json) -> None:
    """Print a row for each size."""
    name, points = found["metric_name"], found["points"]
    console.print(f"one adapter cut to several sizes, scored on {found['data']}", soft_wrap=True, highlight=False)
    table = Table()
    for column in ("parameters", "of the whole", "in the PEFT file", name, "loss"):
        table.add_column(column, justify="right")
    whole = points[0]["parameters"]
    for point in points:
        table.add_row(
            f"{point['parameters']:,}",
            f"{point['parameters'] / whole:.1%}",
            f"{point['exported']:,}",
            format_metric(name, point["score"]),
            f"{point['loss']:.4f}",
        )
    console.print(table)


def draw_sizes(found: Json) -> bytes:
    """Draw the score and the loss against the adapter parameters."""
    points: Sequence[Json] = found["points"]
    sizes = [point["parameters"] for point in points]
    name = found["metric_name"]
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH_IN, 3.4), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, key, title in zip(axes, ("score", "loss"), (name, "loss"), strict=True):
            values = [point[key] for point in points]
            axis.axhline(values[0], color=plots.FAINT, linestyle=(0, (5, 3)), linewidth=1.0)
            axis.plot(sizes, values, color=plots.ACCENT, marker="o", markersize=5)
            axis.set(title=f"{title.capitalize()} at each size", xlabel="adapter parameters", xscale="log")
            axis.set_xticks(sizes, [_short(size) for size in sizes])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(axis="x", which="minor", length=0)
        axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_metric(name, value)))
        chosen = found.get("chosen")
        if chosen is not None:
            point = next(p for p in points if p["parameters"] == chosen)
            axes[0].plot([chosen], [point["score"]], marker="o", markersize=11, color=plots.PRUNED, fillstyle="none")
        return plots.png(figure)


def _short(size: int) -> str:
    return f"{size / 1e6:.3g}M" if size >= 1e6 else f"{size / 1e3:.3g}k" if size >= 1e3 else str(size)
