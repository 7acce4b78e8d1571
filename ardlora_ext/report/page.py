"""What a person sees of a run: report.html, drawn from the saved files alone, and the closing table in the terminal.

report.html is one file without any outside reference: the figures are PNGs inside it. Files are written to a temporary
name and renamed, so a reader finds the old content or the new, never half of it.
"""

from __future__ import annotations

import base64
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from ardlora_ext import plots
from ardlora_ext.console import make_console
from ardlora_ext.data import InputError

Json = Mapping[str, Any]

METRICS_FILE, RECORDS_FILE, REPORT_FILE = "metrics.json", "records.jsonl", "report.html"
_ROWS_OPEN = 12
_ROWS_MOST = 2000


# --- files ------------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either its old content or all of the new."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_records(folder: Path, records: Iterable[Json]) -> None:
    """Write records.jsonl, one rank decision in a line."""
    write_atomic(folder / RECORDS_FILE, "".join(json.dumps(record) + "\n" for record in records))


def write_metrics(folder: Path, metrics: Json) -> None:
    """Write metrics.json, one key in a line: short, and still readable."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in metrics.items()]
    write_atomic(folder / METRICS_FILE, "{\n" + ",\n".join(lines) + "\n}\n")


def load_run(folder: Path) -> tuple[Json, list[Json]]:
    """Return the metrics and the records of the run saved in `folder`.

    Raises:
        InputError: A file is missing or is not what a run writes.
    """
    try:
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        lines = (folder / RECORDS_FILE).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise InputError(f"report: {folder} must hold {METRICS_FILE} and {RECORDS_FILE} of a run: {error}") from error
    except ValueError as error:
        raise InputError(f"report: {METRICS_FILE} and {RECORDS_FILE} in {folder} must be JSON: {error}") from error
    if not isinstance(metrics, dict) or not metrics.get("ranks") or not metrics.get("rank_history"):
        raise InputError(f"report: {folder / METRICS_FILE} must hold the ranks of a run, got none")
    return metrics, records


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
    try:
        html = render(metrics, records)
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"report: {folder / METRICS_FILE} must be complete, got none or an unfit {error}") from error
    target = target or folder / REPORT_FILE
    write_atomic(target, html)
    return target


def environment() -> Environment:
    """Return the templates of the pages, with the filters for numbers."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters.update(count=format_count, amount=format_amount, duration=format_duration)
    return pages


def render(metrics: Json, records: list[Json]) -> str:
    """Return the report as one HTML page."""
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            m=metrics,
            metric=lambda value: format_metric(metrics["metric_name"], value),
            figures=_figures(metrics),
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
    start = max(chain.from_iterable(history[0]["ranks"].values()))
    figures = {
        "heatmap": Figure(
            "Rank of every unit at the end of training",
            "Darker is more. Bars: mean rank of a layer (above) and of a kind of matrix (right).",
            plots.rank_heatmap(metrics["ranks"], start),
        ),
        "training": Figure(
            "Training loss and held-out metric",
            "The curve on the right uses a fixed part of the test set; no decision of the run depends on it.",
            plots.loss_and_metric(metrics["history"], metrics["evals"], metrics["metric_name"]),
        ),
    }
    if len(history) > 1:
        figures["ranks"] = Figure(
            "Mean rank over training",
            f"Every unit started with rank {start}. Layers: the darker, the nearer to the output.",
            plots.ranks_over_time(history, steps),
        )
        figures["params"] = Figure(
            "Live adapter parameters and rank changes over training",
            "Live are all components that are computed with, also one on trial above a unit's rank while ranks move.",
            plots.params_over_time(history, metrics["params_budget"], steps),
        )
    return figures


def _where_rank_went(metrics: Json) -> list[str]:
    """Say in words what the heat map shows."""
    ranks = metrics["ranks"]
    first = list(chain.from_iterable(metrics["rank_history"][0]["ranks"].values()))
    last = list(chain.from_iterable(ranks.values()))
    if len(set(last)) == 1:
        return [f"Every unit has rank {last[0]}."]
    grew = sum(b > a for a, b in zip(first, last, strict=True))
    shrank = sum(b < a for a, b in zip(first, last, strict=True))
    facts = [f"Of {len(last):,} units {grew:,} ended above their first rank, {shrank:,} below it."]
    for what, names in (("layer", plots.layer_names(ranks)), ("kind", plots.kind_labels(ranks))):
        means = {name: statistics.fmean(units) for name, units in plots.group_ranks(ranks, names).items()}
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


# --- the closing table ------------------------------------------------------------------------------------------------


def print_summary(metrics: Json, folder: Path, console: Console | None = None) -> None:
    """Print what a run reached, what it cost, and where the rank went."""
    console = console or make_console()
    table = Table(title=f"{metrics['method']} · {metrics['model']} · {metrics['data']}", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _summary_rows(metrics, folder):
        table.add_row(name, value)
    layers = Table(title="final rank per layer")
    for heading in ("layer", "units", "mean", "min", "max"):
        layers.add_column(heading, justify="right")
    layers.add_column("mean rank", justify="left")
    groups = plots.group_ranks(metrics["ranks"], plots.layer_names(metrics["ranks"]))
    widest = max(statistics.fmean(units) for units in groups.values())
    for name, units in groups.items():
        mean = statistics.fmean(units)
        bar = "█" * round(24 * mean / max(widest, 1e-9))
        layers.add_row(name, str(len(units)), f"{mean:.2f}", str(min(units)), str(max(units)), bar)
    console.print(layers, table)


def _summary_rows(metrics: Json, folder: Path) -> list[tuple[str, str]]:
    metric: Callable[[float], str] = lambda value: format_metric(metrics["metric_name"], value)  # noqa: E731
    units = list(chain.from_iterable(metrics["ranks"].values()))
    budget = metrics["params_budget"]
    share = metrics["params_live"] / metrics["params_total"]
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [
        (metrics["metric_name"], f"{metric(metrics['metric_before'])} → {metric(metrics['metric_after'])}"),
        ("loss", f"{metrics['loss_before']:.4f} → {metrics['loss_after']:.4f}"),
        ("adapter parameters", f"{metrics['params_live']:,} live ({share:.2%} of the model)"),
        ("", f"{metrics['params_peak']:,} at the peak, budget {'none' if budget is None else f'{budget:,}'}"),
        ("rank", f"mean {statistics.fmean(units):.2f}, min {min(units)}, max {max(units)}, {len(units):,} units"),
        ("time", f"{format_duration(metrics['seconds'])}, {metrics['step_ms_median']:.0f} ms a step (median)"),
        ("speed", f"{metrics['tokens_per_s']:,.0f} tokens/s"),
        ("peak memory", format_amount(metrics["peak_rss_mb"], " MB")),
        (f"files in {folder}", ", ".join(files)),
    ]


# --- numbers for people -----------------------------------------------------------------------------------------------


def format_metric(name: str, value: float) -> str:
    """Write an accuracy in percent, anything else with four digits."""
    return f"{value:.1%}" if name == "accuracy" else f"{value:.4g}"


def format_count(value: int | None) -> str:
    """Write a count with separators, or a dash."""
    return "–" if value is None else f"{value:,}"


def format_amount(value: object, unit: str = "") -> str:
    """Write a number with at most four digits, other things as they are, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}") + unit
    return f"{value}{unit}"


def format_duration(seconds: float) -> str:
    """Write seconds as "42 s", "3 min 05 s" or "2 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
