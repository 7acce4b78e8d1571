"""Figures of one run, drawn from its saved records: nothing here needs the model.

Colours: one light-to-dark scale for amounts (rank, depth), distinct hues for the kinds of matrix.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from ardlora_ext.report.numbers import format_metric
from ardlora_ext.report.places import Ranks, group_ranks, kind_labels, layer_names, locate

Json = Mapping[str, Any]

INK, FAINT, GRID = "#1e293b", "#64748b", "#e2e8f0"
GROWN, PRUNED, ACCENT = "#0f766e", "#b45309", "#1d4ed8"
KIND_COLOURS = ("#1d4ed8", "#ea8a0c", "#0f9d77", "#c2255c", "#7048e8", "#0c8599", "#8d5524", "#868e96")
AMOUNT = LinearSegmentedColormap.from_list("amount", ["#f3f6fb", "#c3dafe", "#7fb0f7", "#3b76e0", "#1f45a8", "#111f56"])

WIDTH_IN, _DPI = 11.0, 170
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#cbd5e1",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def rank_heatmap(ranks: Ranks) -> bytes:
    """Draw the rank of every unit: rows are kinds of matrix, columns layers, stripes in a tile heads or experts.

    Where they are too narrow to tell them apart, they are sorted by rank.
    """
    kinds = kind_labels(ranks)
    columns = {module: -1 if (layer := locate(module).layer) is None else layer for module in ranks}
    rows = list(dict.fromkeys(kinds.values()))
    layers = sorted(set(columns.values()) - {-1}) + ([-1] if -1 in columns.values() else [])
    every = list(chain.from_iterable(ranks.values()))
    norm = Normalize(0, max(1, *every))

    with matplotlib.rc_context(STYLE):
        heights = [0.75, 0.58 * len(rows), 0.09]
        figure = Figure(figsize=(WIDTH_IN, 1.6 + sum(heights)), layout="constrained")
        grid = figure.add_gridspec(3, 2, width_ratios=[1, 0.13], height_ratios=heights)
        tiles = figure.add_subplot(grid[1, 0])
        above = figure.add_subplot(grid[0, 0], sharex=tiles)
        beside = figure.add_subplot(grid[1, 1], sharey=tiles)
        for module, units in ranks.items():
            corner = (layers.index(columns[module]), rows.index(kinds[module]))
            _draw_tile(tiles, corner, units, norm, len(layers))
        _finish_tiles(tiles, rows, layers)
        by_layer, by_kind = group_ranks(ranks, columns), group_ranks(ranks, kinds)
        _layer_bars(above, [statistics.fmean(by_layer[layer]) for layer in layers], norm)
        _kind_bars(beside, [statistics.fmean(by_kind[row]) for row in rows], norm)
        _colour_bar(figure.add_subplot(grid[2, 0]), norm, statistics.fmean(every))
        return png(figure)


def _draw_tile(axes: Axes, corner: tuple[int, int], units: Sequence[int], norm: Normalize, layers: int) -> None:
    left, bottom, width, height = corner[0] + 0.03, corner[1] + 0.06, 0.94, 0.88
    stripe = width / len(units)
    patches = [Rectangle((left + index * stripe, bottom), stripe, height) for index in range(len(units))]
    room_in = WIDTH_IN * 0.74 / layers * stripe
    narrow = room_in < 0.02
    edges = 0.0 if narrow else 0.4  # wider than a stripe they would be all that is seen
    tile = PatchCollection(patches, cmap=AMOUNT, norm=norm, linewidths=edges, edgecolors="none" if narrow else "white")
    tile.set_array(sorted(units) if narrow else list(units))  # a hundred experts show how ranks are spread
    axes.add_collection(tile)
    if room_in < 0.085:
        return
    for index, rank in enumerate(units):
        dark = norm(rank) > 0.45
        axes.text(
            left + (index + 0.5) * stripe,
            bottom + height / 2,
            str(rank),
            ha="center",
            va="center",
            fontsize=9 if room_in > 0.3 else 6,
            color="white" if dark else INK,
        )


def _finish_tiles(axes: Axes, rows: Sequence[str], layers: Sequence[int]) -> None:
    axes.set(
        xlim=(0, len(layers)), ylim=(len(rows), 0), xlabel="layer (stripes in a tile: heads or experts, from the first)"
    )
    axes.set_yticks([index + 0.5 for index in range(len(rows))], rows)
    every = max(1, len(layers) // 40)
    shown = range(0, len(layers), every)
    axes.set_xticks([index + 0.5 for index in shown], ["other" if layers[i] < 0 else str(layers[i]) for i in shown])
    axes.tick_params(length=0, labelsize=9.5, labelcolor=INK)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _layer_bars(axes: Axes, means: Sequence[float], norm: Normalize) -> None:
    bars = axes.bar([i + 0.5 for i in range(len(means))], means, width=0.94, color=[AMOUNT(norm(m)) for m in means])
    if len(means) <= 24:
        axes.bar_label(bars, fmt="%.1f", fontsize=8.5, color=INK, padding=2)
    axes.set_ylabel("mean rank\nper layer", rotation=0, ha="right", va="center", fontsize=9)
    _bare(axes)


def _kind_bars(axes: Axes, means: Sequence[float], norm: Normalize) -> None:
    bars = axes.barh([i + 0.5 for i in range(len(means))], means, height=0.88, color=[AMOUNT(norm(m)) for m in means])
    axes.bar_label(bars, fmt="%.1f", fontsize=8.5, color=INK, padding=3)
    axes.set_title("per kind", fontsize=9, fontweight="normal", color=FAINT)
    axes.margins(x=0.3)
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)


def _colour_bar(axes: Axes, norm: Normalize, mean: float) -> None:
    Colorbar(axes, cmap=AMOUNT, norm=norm, orientation="horizontal", ticks=MaxNLocator(integer=True))
    axes.axvline(mean, color=PRUNED, linewidth=2)
    axes.set_xlabel(f"rank of the unit; the line marks the mean, {mean:.1f}", fontsize=8.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def ranks_over_time(rank_history: Sequence[Json], last_step: int) -> bytes:
    """Draw the mean rank of each kind of matrix, and of each layer, over the steps."""
    modules = list(rank_history[0]["ranks"])
    kinds, layers = kind_labels(modules), layer_names(modules)
    depth = list(dict.fromkeys(layers.values()))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 3.7), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        shades = {name: AMOUNT(0.4 + 0.6 * i / max(1, len(depth) - 1)) for i, name in enumerate(depth)}
        hues = {name: KIND_COLOURS[i % len(KIND_COLOURS)] for i, name in enumerate(dict.fromkeys(kinds.values()))}
        for axes, keys, colours in ((left, kinds, hues), (right, layers, shades)):
            _rank_lines(axes, rank_history, keys, colours, last_step)
        left.set_ylim(0, max(left.get_ylim()[1], 1))
        for axes, keys, colours in ((left, kinds, hues), (right, layers, shades)):
            _end_labels(axes, rank_history[-1]["ranks"], keys, colours)
        left.set(title="Mean rank by kind of matrix", xlabel="step", ylabel="mean rank")
        right.set(title="Mean rank by layer", xlabel="step")
        return png(figure)


def _rank_lines(
    axes: Axes, history: Sequence[Json], keys: Mapping[str, str], colours: Mapping[str, Any], last_step: int
) -> None:
    steps = [entry["step"] for entry in history] + [last_step]
    means: dict[str, list[float]] = {name: [] for name in colours}
    for entry in history:
        for name, units in group_ranks(entry["ranks"], keys).items():
            means[name].append(statistics.fmean(units))
    for name, values in means.items():
        axes.plot(steps, [*values, values[-1]], drawstyle="steps-post", color=colours[name], label=name)
    axes.margins(x=0)


def _end_labels(axes: Axes, ranks: Ranks, keys: Mapping[str, str], colours: Mapping[str, Any]) -> None:
    """Write each line's name at its end, spread so that names do not overlap; thin out when there are too many."""
    ends = {name: statistics.fmean(units) for name, units in group_ranks(ranks, keys).items()}
    every = 1 if len(ends) <= 15 else -(-len(ends) // 6)
    names = sorted(list(ends)[::every], key=lambda name: ends[name])
    heights = _spread([ends[name] for name in names], gap=0.062 * axes.get_ylim()[1])
    for name, height in zip(names, heights, strict=True):
        axes.annotate(
            name, (1.015, height), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=colours[name]
        )


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Push sorted values apart until neighbours are `gap` away, each as little as possible, none below zero."""
    spread = list(values)
    for _ in range(200):
        for i in range(len(spread) - 1):
            overlap = max(0.0, gap - (spread[i + 1] - spread[i])) / 2
            spread[i], spread[i + 1] = max(0.0, spread[i] - overlap), spread[i + 1] + overlap
    return spread


def params_over_time(rank_history: Sequence[Json], budget: int | None, last_step: int) -> bytes:
    """Draw the live adapter parameters against the budget, and below how many units grew or shrank at each change."""
    steps = [entry["step"] for entry in rank_history]
    params = [entry["params"] for entry in rank_history]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 4.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
        above.plot([*steps, last_step], [*params, params[-1]], drawstyle="steps-post", color=ACCENT)
        above.fill_between([*steps, last_step], [*params, params[-1]], step="post", color=ACCENT, alpha=0.10)
        title = "Live adapter parameters"
        if budget is not None:
            title += f" (dashed: the budget, {budget:,})"
            above.axhline(budget, color=PRUNED, linestyle=(0, (5, 3)), linewidth=1.5)
        above.set(title=title, xlim=(0, last_step), ylim=(0, max([*params, budget or 0]) * 1.15))
        above.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        changes = [_moves(a["ranks"], b["ranks"]) for a, b in pairwise(rank_history)]
        width = max(0.004 * last_step, 0.5)
        below.bar(steps[1:], [up for up, _ in changes], width=width, color=GROWN, label="grew")
        below.bar(steps[1:], [-down for _, down in changes], width=width, color=PRUNED, label="shrank")
        below.axhline(0, color=FAINT, linewidth=0.8)
        below.set(title="Units whose rank changed", xlabel="step")
        below.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        below.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
        below.legend(loc="upper right", ncols=2, bbox_to_anchor=(1, 1.35))
        return png(figure)


def _moves(before: Ranks, after: Ranks) -> tuple[int, int]:
    """Count the units that grew and that shrank."""
    pairs = list(zip(chain.from_iterable(before.values()), chain.from_iterable(after.values()), strict=True))
    return sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)


def loss_and_metric(history: Sequence[Json], evals: Sequence[Json], metric_name: str) -> bytes:
    """Draw the training loss (strong: smoothed) and the metric on held-out examples, or the one of them there is."""
    steps = [entry["step"] for entry in history]
    losses = [entry["loss"] for entry in history]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 3.4), layout="constrained")
        axes = list(figure.subplots(1, bool(losses) + bool(evals), squeeze=False)[0])
        if losses:
            left = axes.pop(0)
            left.plot(steps, losses, color=ACCENT, alpha=0.25, linewidth=0.9)
            left.plot(steps, smoothed(losses), color=ACCENT)
            left.set(title="Training loss", xlabel="step")
            left.margins(x=0)
        if evals:
            _draw_metric(axes.pop(), evals, metric_name)
        return png(figure)


def _draw_metric(axes: Axes, evals: Sequence[Json], name: str) -> None:
    """Draw a metric, with its first and last value in numbers."""
    points = [entry["step"] for entry in evals]
    values = [entry["metric"] for entry in evals]
    axes.plot(points, values, color=GROWN, marker="o", markersize=5, clip_on=False)
    items, count = "examples" if name == "accuracy" else "blocks", evals[0].get("examples")
    where = f"on {count:,} held-out {items}" if count is not None else "on held-out examples"
    axes.set(title=f"{name.capitalize()} {where}", xlabel="step")
    axes.margins(x=0, y=0.15)
    if name == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for index in (0, -1):
        below = name == "accuracy" and index == 0
        axes.annotate(
            format_metric(name, values[index]),
            (points[index], values[index]),
            (0, -14 if below else 8),
            textcoords="offset points",
            ha="left" if index == 0 else "right",
            fontweight="bold",
        )


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the bias-corrected exponential mean over about a thirtieth of the values."""
    keep = 1 - 1 / max(2.0, len(values) / 30)
    total, weight, smooth = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight)
    return smooth


def png(figure: Figure) -> bytes:
    """Return the picture of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
