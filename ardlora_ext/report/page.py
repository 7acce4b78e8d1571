"""report.html, drawn from the saved files of a run alone.

One file without any outside reference: the figures are PNGs inside it.
"""

from __future__ import annotations

import base64
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ardlora_ext.config.registry import title_of
from ardlora_ext.errors import InputError
from ardlora_ext.report import places, plots
from ardlora_ext.report.numbers import format_amount, format_count, format_duration, format_metric
from ardlora_ext.report.run_files import METRICS_FILE, REPORT_FILE, Json, complete, load_run, write_page
from ardlora_ext.report.sizes import draw_sizes, load_frontier

_ROWS_OPEN = 12
_ROWS_MOST = 2000


# --- report.html ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A figure of the report."""

    title: str
    caption: str
    png: bytes

    @property
    def source(self) -> str:
        """The picture as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def write_report(folder: Path, target: Path | None = None) -> Path:
    """Draw the page of the run that saved its files in `folder`; `target` is report.html in it by default."""
    metrics, records = load_run(folder)
    sizes = load_frontier(folder)
    html = render_of([folder], lambda: render(metrics, records, sizes))
    target = target or folder / REPORT_FILE
    write_page(target, html)
    return target


def render_of(folders: Sequence[Path], page: Callable[[], str]) -> str:
    """Return a page drawn from what these folders hold.

    Raises:
        InputError: it cannot be drawn: what a file holds may fail anywhere in the drawing.
    """
    try:
        return page()
    except Exception as error:
        files = ", ".join(str(folder / METRICS_FILE) for folder in folders)
        text = " ".join(str(error).split())[:200]
        raise InputError(f"report: {files} must be complete, got none or an unfit {text}") from error


def environment() -> Environment:
    """Return the templates of the pages, with the filters for numbers."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters.update(count=format_count, amount=format_amount, duration=format_duration, title_of=title_of)
    return pages


def render(metrics: Json, records: Sequence[Json], sizes: Json | None = None) -> str:
    """Return the report as one HTML page; with `sizes`, what `frontier` found."""
    metrics = complete(metrics)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            m=metrics,
            metric=lambda value: format_metric(metrics["metric_name"], value),
            figures=_figures(metrics) | _of_sizes(sizes),
            sizes=sizes,
            facts=_where_rank_went(metrics),
            units=list(chain.from_iterable(metrics["ranks"].values())),
            mean=statistics.fmean,
            records=records[:_ROWS_MOST],
            records_total=len(records),
            records_open=len(records) <= _ROWS_OPEN,
            events=_count(record.get("event", "?") for record in records),
        )
    )


def _figures(metrics: Json) -> dict[str, Figure]:
    steps, history = metrics["steps"], metrics["rank_history"]
    first = set(chain.from_iterable(history[0]["ranks"].values()))
    began = str(first.pop()) if len(first) == 1 else f"{min(first)} to {max(first)}"
    figures = {
        "heatmap": Figure(
            "Rank of every unit at the end of training",
            "Darker is more. Bars: mean rank of a layer (above) and of a kind of matrix (right).",
            plots.rank_heatmap(metrics["ranks"]),
        ),
    }
    if metrics["history"] or metrics["evals"]:
        curves = {"history": "training loss", "evals": "held-out metric"}
        seen = " and ".join(text for key, text in curves.items() if metrics[key])
        figures["training"] = Figure(
            seen[0].upper() + seen[1:],
            "Held-out examples are only looked at: no decision of the run depends on them."
            if metrics["evals"]
            else "Strong: smoothed.",
            plots.loss_and_metric(metrics["history"], metrics["evals"], metrics["metric_name"] or "metric"),
        )
    if len(history) > 1:
        figures["ranks"] = Figure(
            "Mean rank over training",
            f"Units started with rank {began}. Layers: the darker, the nearer to the output.",
            plots.ranks_over_time(history, steps),
        )
        figures["params"] = Figure(
            "Live adapter parameters and rank changes over training",
            "Live are all components that are computed with, also one on trial above a unit's rank while ranks move.",
            plots.params_over_time(history, metrics["params_budget"], steps),
        )
    return figures


def _of_sizes(sizes: Json | None) -> dict[str, Figure]:
    if sizes is None:
        return {}
    caption = "Each size is cut from the whole adapter by what the loss would lose, and not trained on."
    if sizes.get("chosen") is not None:
        caption += f" Ringed: {sizes['chosen']:,} parameters, the size that was asked for."
    return {"sizes": Figure("Score against adapter parameters", caption, draw_sizes(sizes))}


def _where_rank_went(metrics: Json) -> list[str]:
    """Say in words what the heat map shows."""
    ranks = metrics["ranks"]
    units = list(chain.from_iterable(ranks.values()))
    if len(set(units)) == 1:
        return [f"Every unit has rank {units[0]}."]
    mean = statistics.fmean(units)
    above = sum(rank > mean for rank in units)
    facts = [
        f"Ranks from {min(units)} to {max(units)}: {above:,} of {len(units):,} units are above the mean, {mean:.1f}."
    ]
    for what, names in (("layer", places.layer_names(ranks)), ("kind", places.kind_labels(ranks))):
        means = {name: statistics.fmean(units) for name, units in places.group_ranks(ranks, names).items()}
        if len(means) > 1:
            most, least = max(means, key=lambda name: means[name]), min(means, key=lambda name: means[name])
            facts.append(
                f"Most rank by {what}: {most} (mean {means[most]:.1f}); least: {least} (mean {means[least]:.1f})."
            )
    return facts


def _count(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts
