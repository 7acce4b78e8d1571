"""`bench pictures`: draw what comparisons saved with `bench quality --json FILE` show, a PNG for each question.

    waterfall.png   what each part is worth: the arms in the order they are given, each minus the one before, paired
    rates.png       validation loss against learning rate, all runs of a method
    ranks.png       final ranks of every seed, and how alike the seeds are: Spearman beside that of random ranks
    cuts.png        predicted against measured cost of each cut (`ard:budget=auto,holdout=True`)

What the files have no rows for is not drawn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ardlora_ext.bench.quality.trial import Row
from ardlora_ext.bench.stats import paired, spearman
from ardlora_ext.errors import InputError
from ardlora_ext.report.plots import AMOUNT, FAINT, GROWN, INK, KIND_COLOURS, PRUNED, STYLE

_LINEAR = 0.01  # shares of the gain below it are drawn to a linear scale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `pictures`."""
    parser.epilog = __doc__.partition("\n\n")[2]
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what `quality --json` wrote, of one bed")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where the pictures go")
    parser.add_argument(
        "--arms", nargs="+", metavar="NAME", help="methods to draw, in order (default: as in the files)"
    )


def run(arguments: argparse.Namespace, _command: str) -> None:
    """Draw every picture that the files have rows for."""
    rows = [row for path in arguments.files for row in saved_rows(path)]
    beds, known = {row["bed"] for row in rows}, list(dict.fromkeys(row["method"] for row in rows))
    arms = arguments.arms or known
    unknown = [arm for arm in arms if arm not in known]
    if len(beds) != 1:
        raise InputError(f"bench: files must be of one bed, got {', '.join(sorted(beds)) or 'no rows'}")
    if unknown:
        raise InputError(f"bench: --arms must be of {', '.join(known)}, got {unknown[0]}")
    if not arguments.out.is_dir():
        raise InputError(f"bench: --out must be an existing folder, got {arguments.out}")
    for name, draw in PICTURES.items():
        with matplotlib.rc_context(STYLE):
            figure = draw(rows, arms)
            if figure is not None:
                figure.savefig(arguments.out / f"{name}.png", dpi=110, format="png")
                print(arguments.out / f"{name}.png")


def saved_rows(path: Path) -> list[Row]:
    """Return the rows of a file.

    Raises:
        InputError: it is not what `quality --json` writes now.
    """
    try:
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if all({"bed", "measure", "method", "split", "cuts"} <= row.keys() for row in rows):
            return rows
        why = "rows without a measure"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}"
    raise InputError(f"bench: {path} must be written by bench quality --json, got {why}")


def by_seed(rows: Sequence[Row], arm: str, key: str | None = None) -> dict[int, float]:
    """Return what the report runs of a method measured, where it is a number, by seed."""
    runs = [row for row in rows if row["method"] == arm and row["split"] == "report"]
    found = {row["seed"]: row[key or row["measure"]] for row in runs}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def waterfall(rows: Sequence[Row], arms: Sequence[str]) -> Figure | None:
    """Draw the mean of the first arm and what each further one adds, on the seeds that all of them have."""
    values = {arm: by_seed(rows, arm) for arm in arms}
    seeds = sorted(set.intersection(*(set(found) for found in values.values())))
    if len(arms) < 2 or not seeds:
        return None
    means = [statistics.fmean(values[arm][s] for s in seeds) for arm in arms]
    figure = Figure(figsize=(1.4 + 1.5 * len(arms), 3.4), layout="constrained")
    axes = figure.subplots()
    low = min(means) - 0.25 * (max(means) - min(means) or 1.0)
    low = low if min(means) < 0.0 else max(low, 0.0)
    axes.bar(0, means[0] - low, bottom=low, color=FAINT, width=0.62)
    axes.text(0, means[0], f"{means[0]:.4g}", ha="center", va="bottom", color=INK, fontsize=8.5)
    lower = rows[0]["better"] == "lower"
    for place, (before, after) in enumerate(itertools.pairwise(arms), start=1):
        change = paired([values[after][s] for s in seeds], [values[before][s] for s in seeds])
        old, new = means[place - 1 : place + 1]
        axes.plot([place - 0.7, place + 0.31], [old, old], "--", color=FAINT, linewidth=0.8)
        axes.bar(place, new - old, bottom=old, color=GROWN if (new < old) == lower else PRUNED, width=0.62)
        if math.isfinite(change.low):
            axes.plot([place] * 2, [old + change.low, old + change.high], color=INK, linewidth=1.4)
        top = max(old, new, old + np.nan_to_num(change.high))
        axes.text(place, top, f"{change.mean:+.3g}", ha="center", va="bottom", color=INK, fontsize=8.5)
    axes.set_xticks(range(len(arms)), [_folded(arm) for arm in arms], fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    axes.set_title(f"{rows[0]['bed']}: {rows[0]['measure']} ({rows[0]['better']} is better), {len(seeds)} seeds")
    return figure


def _folded(label: str) -> str:
    """Break a label where its fields begin."""
    return label.replace(":", ":\n").replace(",", ",\n")


def rates(rows: Sequence[Row], arms: Sequence[str]) -> Figure | None:
    """Draw the validation loss of each learning rate."""
    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    axes = figure.subplots()
    sweep(axes, rows, dict(zip(arms, itertools.cycle(KIND_COLOURS))))
    axes.set_title(f"{rows[0]['bed']}: loss against rate")
    return figure if axes.lines else None


def sweep(axes: Axes, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    """Draw mean, best and worst validation loss by learning rate: of tuning runs, or where there are none of all."""
    for arm, colour in colours.items():
        ran = [row for row in rows if row["method"] == arm and row["valid"] is not None and math.isfinite(row["valid"])]
        losses: dict[float, list[float]] = {}
        for row in [row for row in ran if row["split"] == "tune"] or ran:
            losses.setdefault(row["lr"], []).append(row["valid"])
        if len(losses) < 2:
            continue
        grid = sorted(losses)
        means = [statistics.fmean(losses[rate]) for rate in grid]
        axes.fill_between(
            grid, [min(losses[r]) for r in grid], [max(losses[r]) for r in grid], color=colour, alpha=0.12
        )
        axes.plot(grid, means, "o-", color=colour, markersize=3, label=arm)
        axes.plot(grid[int(np.argmin(means))], min(means), "o", color=colour, markersize=8, mfc="none")
    axes.set(xscale="log", xlabel="learning rate (the best is ringed)", title="validation loss while tuning")
    if axes.lines:
        axes.set_yscale("log")
        axes.legend(fontsize=7)


def ranks(rows: Sequence[Row], arms: Sequence[str]) -> Figure | None:
    """Draw the ranks of every module and seed of the methods that end with unequal ones."""
    tables = {arm: np.array([_flat(row) for row in _reported(rows, arm)]) for arm in arms}
    tables = {arm: table for arm, table in tables.items() if len(table) > 1 and (np.ptp(table, axis=1) > 0).any()}
    if not tables:
        return None
    first = next(iter(tables))
    names, units = list(_reported(rows, first)[0]["ranks"]), tables[first].shape[1]
    size = (max(5.5, 2.2 + 0.2 * units), len(tables) * (0.9 + 0.16 * max(map(len, tables.values()))) + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, sharex=True)[:, 0]
    top = max(int(table.max()) for table in tables.values())
    for axes, (arm, table) in zip(panels, tables.items(), strict=True):
        image = axes.imshow(table, cmap=AMOUNT, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        alike = f"between seeds {likeness(table):.2f}, of random ranks {chance(table):.2f}"
        axes.set_title(f"{arm}\nSpearman {alike}", fontsize=8.5)
        axes.set_ylabel("seed")
        axes.grid(visible=False)
    panels[-1].set_xticks(range(units), _columns(names, units), rotation=90, fontsize=6.5)
    figure.colorbar(
        image, ax=list(panels), label="final rank", fraction=0.03, pad=0.02, ticks=MaxNLocator(integer=True)
    )
    return figure


def _reported(rows: Sequence[Row], arm: str) -> list[Row]:
    found = {row["seed"]: row for row in rows if row["method"] == arm and row["split"] == "report"}
    return [found[seed] for seed in sorted(found)]


def _flat(row: Row) -> list[int]:
    return [rank for units in row["ranks"].values() for rank in units]


def _columns(names: Sequence[str], units: int) -> list[str]:
    """Return a label for each unit: the module's, on its first one."""
    each = units // len(names)
    return [name.removeprefix("layers.") if u == 0 else "" for name in names for u in range(each)]


def likeness(table: np.ndarray) -> float:
    """Return the mean Spearman correlation of all pairs of seeds [seeds, units]."""
    found = [spearman(a, b) for a, b in itertools.combinations(table.tolist(), 2)]
    found = [value for value in found if math.isfinite(value)]
    return statistics.fmean(found) if found else math.nan


def chance(table: np.ndarray) -> float:
    """Return the same when each seed's ranks are dealt to its units at random."""
    return likeness(np.random.default_rng(0).permuted(table, axis=1))


def cuts(rows: Sequence[Row], arms: Sequence[str]) -> Figure | None:
    """Draw what cuts were predicted to cost against what they did, as shares of the gain so far."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    ends = [0.0, _LINEAR]
    for arm, colour in zip(arms, itertools.cycle(KIND_COLOURS)):
        points = [(cut["predicted"], cut["measured"]) for row in rows if row["method"] == arm for cut in row["cuts"]]
        points = [point for point in points if None not in point]
        if points:
            label = f"{arm}: {len(points)} cuts"
            axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=4, alpha=0.6, mew=0, label=label)
            ends[1] = max(ends[1], *itertools.chain(*points))
    if not axes.lines:
        return None
    axes.set_xscale("symlog", linthresh=_LINEAR)
    axes.set_yscale("symlog", linthresh=_LINEAR)
    axes.plot(ends, ends, "--", color=FAINT, linewidth=1)
    axes.set(xlabel="predicted share of the gain", ylabel="measured on held-out data")
    axes.legend(fontsize=7, loc="upper left")
    axes.set_title(f"{rows[0]['bed']}: cost of each cut")
    return figure


PICTURES: dict[str, Callable[[Sequence[Row], Sequence[str]], Figure | None]] = {
    "waterfall": waterfall,
    "rates": rates,
    "ranks": ranks,
    "cuts": cuts,
}
