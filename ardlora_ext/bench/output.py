"""What every bench writes: a table on the terminal, rows as JSON, bars as PNG."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from ardlora_ext.bench.machine import Json, check_writable, headline, machine, write_json
from ardlora_ext.report.console import make_console
from ardlora_ext.report.plots import ACCENT, FAINT, GRID, INK

_OTHERS = "#cbd5e1"
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#cbd5e1",
    "axes.labelcolor": FAINT,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": INK,
    "ytick.left": False,
}


@dataclass(frozen=True)
class Column:
    """One column of a table: its heading, the key of the rows it shows, and how a value is written."""

    heading: str
    key: str
    text: Callable[[Any], str] = str

    def cell(self, row: Json) -> str:
        """Return what the table shows for a row."""
        value = row[self.key]
        return "-" if value is None else self.text(value)


@dataclass(frozen=True)
class Panel:
    """One set of horizontal bars.

    Attributes:
        title: above the bars.
        bars: label, value, and the ends of its whisker.
        line: a target to draw, or None.
    """

    title: str
    bars: Sequence[tuple[str, float, float, float]]
    line: float | None = None


@dataclass
class Result:
    """What a bench found: rows for JSON, how to show them, and sentences about targets."""

    title: str
    columns: Sequence[Column]
    rows: list[Json]
    axis: str
    panels: Sequence[Panel]
    notes: list[str] = field(default_factory=list)
    number: Callable[[float], str] = "{:.3g}".format
    draw: Callable[[Path, Result], None] | None = None  # a picture of another kind than the panels
    shown: list[Json] | None = None  # the rows of the table, where they are not all


def add_output_arguments(parser: argparse.ArgumentParser, check: str | None = None) -> None:
    """Declare what every bench takes; `check` says what `--check` compares, where there is something to compare."""
    if check is not None:
        parser.add_argument("--check", action="store_true", help=check)
    parser.add_argument("--quick", action="store_true", help="few and small cases: below two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, command and all rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the bars as a PNG")


def check_outputs(arguments: argparse.Namespace) -> None:
    """Check before a long run that its results can be stored; raises `InputError`."""
    check_writable(arguments.json, "--json")
    check_writable(arguments.plot, "--plot")


def publish(arguments: argparse.Namespace, command: str, result: Result) -> None:
    """Print the table and the notes; write JSON and PNG where asked for."""
    console = make_console()
    table = Table(title=result.title, title_justify="left")
    shown = result.rows if result.shown is None else result.shown
    for column in result.columns:
        numeric = any(isinstance(row[column.key], (int, float)) for row in shown)
        table.add_column(column.heading, justify="right" if numeric else "left", no_wrap=True)
    for row in shown:
        table.add_row(*(column.cell(row) for column in result.columns))
    console.print(headline(machine()), highlight=False)
    console.print(command, highlight=False, soft_wrap=True)
    console.print(table)
    for note in result.notes:
        console.print(note, highlight=False, soft_wrap=True)
    if arguments.json is not None:
        write_json(arguments.json, command, result.rows)
    if arguments.plot is not None:
        (result.draw or draw)(arguments.plot, result)


def draw(path: Path, result: Result) -> None:
    """Draw all panels, three in a row."""
    across = min(3, len(result.panels))
    down = math.ceil(len(result.panels) / across)
    most = max(len(panel.bars) for panel in result.panels)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * across, 0.5 + down * (0.75 + 0.24 * most)), layout="constrained")
        figure.suptitle(f"{result.title}\n{headline(machine())}", fontsize=9, x=0.01, ha="left")
        grid = figure.subplots(down, across, squeeze=False)
        for axes, panel in zip(grid.flat, result.panels, strict=False):
            _draw_panel(axes, panel, result)
        for axes in list(grid.flat)[len(result.panels) :]:
            axes.axis("off")
        figure.savefig(path, dpi=110, format="png")


def _draw_panel(axes: Axes, panel: Panel, result: Result) -> None:
    bars = list(reversed(panel.bars))
    values = [value for _, value, _, _ in bars]
    compared = any(label.startswith("ours") for label, _, _, _ in bars)
    for i, (label, value, low, high) in enumerate(bars):
        colour = _OTHERS if compared and not label.startswith("ours") else ACCENT
        axes.barh(i, value, color=colour, height=0.7)
        if high > low:
            axes.plot([low, high], [i, i], color=INK, linewidth=1)
        axes.annotate(
            result.number(value),
            (max(value, high, 0.0), i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=FAINT,
        )
    axes.set_yticks(range(len(bars)), [label for label, _, _, _ in bars])
    axes.set_title(panel.title)
    axes.set_xlabel(result.axis)
    axes.grid(axis="x")
    top = max([0.0, *values, *(high for _, _, _, high in bars), panel.line or 0.0])
    axes.set_xlim(min(0.0, *values), 1.18 * top if top > 0.0 else 1.0)
    if panel.line is not None:
        axes.axvline(panel.line, color="#b45309", linewidth=1, linestyle="--")


def microseconds(seconds: float) -> str:
    """Write a duration in us."""
    return f"{1e6 * seconds:,.1f}"


def percent(share: float) -> str:
    """Write a share with its sign in percent."""
    return f"{100 * share:+.1f} %"


def selected(rows: Sequence[Json], **values: object) -> list[Json]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def bars_of(rows: Sequence[Json], label: str, value: str, scale: float = 1.0) -> list[tuple[str, float, float, float]]:
    """Return bars without whiskers from rows."""
    return [(str(row[label]), scale * row[value], 0.0, 0.0) for row in rows if row[value] is not None]


def groups(rows: Sequence[Json], *keys: str) -> Mapping[tuple[Any, ...], list[Json]]:
    """Return the rows by the values of `keys`, in the order of the rows."""
    found: dict[tuple[Any, ...], list[Json]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found
