"""The closing table of a run in the terminal."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ardlora_ext.report import places
from ardlora_ext.report.console import make_console
from ardlora_ext.report.numbers import format_amount, format_duration, format_metric
from ardlora_ext.report.run_files import Json
from ardlora_ext.report.several.comparison import Group, best_of

_HEADS = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


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
    groups = places.group_ranks(metrics["ranks"], places.layer_names(metrics["ranks"]))
    widest = max(statistics.fmean(units) for units in groups.values())
    for name, units in groups.items():
        mean = statistics.fmean(units)
        bar = "█" * round(24 * mean / max(widest, 1e-9))
        layers.add_row(name, str(len(units)), f"{mean:.2f}", str(min(units)), str(max(units)), bar)
    console.print(layers, table)
    if metrics.get("answers"):
        answers = Table(title="answers", show_lines=True)
        for heading in ("prompt", "before", "after", "wanted"):
            answers.add_column(heading, ratio=1)
        for entry in metrics["answers"]:
            answers.add_row(*(escape(entry[key]) for key in ("prompt", "before", "after", "wanted")))
        console.print(answers)
    for line in _loading(metrics, folder):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def print_comparison(groups: Sequence[Group], console: Console | None = None) -> None:
    """Print mean and spread over seeds of each group of runs, a star behind the best of each method."""
    metric = groups[0].runs[0].m["metric_name"]
    table = Table(title="mean ± standard deviation over seeds; * the best of its method")
    table.add_column("runs")
    for heading in ("seeds", metric, "", "loss", "parameters", "peak", "mean rank", "time of one"):
        table.add_column(heading, justify="right" if heading else "left")
    best = best_of(groups)
    for group in groups:
        star = "*" if group in best else ""
        loss, live, peak = (format_amount(group.mean(key)) for key in ("loss_after", "params_live", "params_peak"))
        time = format_duration(group.mean("seconds") or 0.0)
        table.add_row(
            group.name, str(len(group.runs)), group.score, star, loss, live, peak, f"{group.mean_rank:.2f}", time
        )
    (console or make_console()).print(table)


def _loading(metrics: Json, folder: Path) -> list[str]:
    """Return how the adapter is loaded by those that can serve such a model."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"] or "BASE"
    lines = [f'PEFT: PeftModel.from_pretrained(base, "{folder}")']
    if head := _HEADS.get(metrics["task"]):
        labels = len(metrics["labels"]) or 1
        lines.insert(0, f'base = {head}.from_pretrained("{base}", num_labels={labels})')
    else:
        served = f"--enable-lora --max-lora-rank {config['r']} --lora-modules tuned={folder}"
        lines.append(f"vLLM: vllm serve {base} {served}")
        lines.append(f"llama.cpp: python convert_lora_to_gguf.py {folder} --base {base}")
    return lines


def _export_rows(metrics: Json) -> list[tuple[str, str]]:
    """Return what the PEFT file holds, and why where that is more than the budget; nothing for runs of before."""
    exported = metrics.get("params_exported")
    if exported is None:
        return []
    rank, budget = metrics["served_rank"], metrics["params_budget"]
    rows = [("PEFT file", f"{exported:,} parameters, every module at rank {rank}, which a server must hold")]
    if budget is not None and exported > budget:
        why = "more than the budget: padded to the next rank that servers take, which --serve-rank N caps;"
        rows.append(("", f"{why} the compact form has {metrics['params_compact']:,}"))
    return rows


def _summary_rows(metrics: Json, folder: Path) -> list[tuple[str, str]]:
    metric: Callable[[float], str] = lambda value: format_metric(metrics["metric_name"], value)  # noqa: E731
    units = list(chain.from_iterable(metrics["ranks"].values()))
    budget = metrics["params_budget"]
    auto = "auto" if metrics.get("config", {}).get("budget") == "auto" else "none"
    share = metrics["params_live"] / metrics["params_total"]
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [
        (metrics["metric_name"], f"{metric(metrics['metric_before'])} → {metric(metrics['metric_after'])}"),
        ("loss", f"{metrics['loss_before']:.4f} → {metrics['loss_after']:.4f}"),
        ("adapter parameters", f"{metrics['params_live']:,} live ({share:.2%} of the model)"),
        ("", f"{metrics['params_peak']:,} at the peak, budget {auto if budget is None else f'{budget:,}'}"),
        *_export_rows(metrics),
        ("rank", f"mean {statistics.fmean(units):.2f}, min {min(units)}, max {max(units)}, {len(units):,} units"),
        ("time", f"{format_duration(metrics['seconds'])}, {metrics['step_ms_median']:.0f} ms a step (median)"),
        ("speed", f"{metrics['tokens_per_s']:,.0f} tokens/s"),
        ("peak memory", format_amount(metrics["peak_rss_mb"], " MB")),
        (f"files in {folder}", ", ".join(files)),
    ]
