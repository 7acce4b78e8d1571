"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from torch import nn

from ardlora_ext.plan.cluster import Gpu, shardings
from ardlora_ext.plan.memory import Bytes, Plan
from ardlora_ext.plan.paper import SAVED, SHARE, readings, savings

_ROWS = ("base", "weights", "gradients", "moments", "scores", "head", "activations")


def size(number: float) -> str:
    """Write bytes in the largest binary unit that leaves at least 1."""
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    while abs(number) >= 1024 and len(units) > 1:
        number /= 1024
        units.pop()
    return f"{number:.0f} B" if units[-1] == "B" else f"{number:.2f} {units[-1]}"


def show(plan: Plan, model: nn.Module, console: Console, gpu: tuple[str, Gpu] | None, paper: bool) -> None:
    """Print a plan; with the paper's arithmetic and the estimate for several GPUs where they are asked for."""
    method = type(plan.config).__name__.removesuffix("Config")
    most = "at most " if getattr(plan.config, "budget", None) == "auto" else ""
    console.print(
        f"[bold]{plan.model}[/]: {plan.parameters:,} parameters in {plan.dtype}, "
        f"{plan.batch} x {plan.length} tokens (images have their own), {method}: "
        f"{len(plan.layouts)} modules, {plan.units:,} units, budget {most}{plan.budget:,} "
        f"({plan.budget / plan.parameters:.3%} of the model)"
        + (f", {plan.trained_whole:,} parameters of the head" if plan.trained_whole else ""),
        highlight=False,
    )
    if plan.problem:
        console.print(f"Activations are not known: {plan.problem}.", style="yellow", highlight=False)
    console.print(_kinds(plan), _memory(plan), _curve(plan))
    console.print(
        f"With every layer checkpointed about {size(plan.checkpointed)} of activations stay (estimate).",
        highlight=False,
    )
    if paper:
        _paper(plan, model, console)
    if gpu is not None:
        console.print(_cluster(plan, *gpu))


def _table(title: str, columns: Sequence[str], left: int = 1) -> Table:
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right")
    return table


def _kinds(plan: Plan) -> Table:
    table = _table("matched", ("kind", "cut by", "modules", "units", "in", "out", "parameters per rank"), 2)
    for kind in plan.kinds:
        numbers = (kind.modules, kind.units, kind.in_features, kind.out_features, kind.parameters_per_rank)
        table.add_row(kind.name, kind.cut, *(f"{n:,}" for n in numbers))
    return table


def _memory(plan: Plan) -> Table:
    columns: dict[str, Bytes] = {
        "while ranks move": plan.training,
        "at the end": plan.final,
        "PEFT, mean rank": plan.peft_mean,
        "PEFT, r_max": plan.peft_max,
    }
    table = _table("memory of one process", ("", *columns))
    names = {"base": "frozen weights", "moments": "Adam's moments", "activations": "saved activations"}
    for row in _ROWS:
        table.add_row(names.get(row, row), *(size(getattr(column, row)) for column in columns.values()))
    table.add_row("total", *(size(column.total) for column in columns.values()), style="bold")
    return table


def _curve(plan: Plan) -> Table:
    columns = ("rank", "parameters", "of the model", "state", "activations", "PEFT parameters", "state", "activations")
    table = _table("budget curve: every unit at this rank, or at what it can use", columns, 0)
    for p in plan.curve:
        table.add_row(
            str(p.rank),
            f"{p.parameters:,}",
            f"{p.share:.3%}",
            size(p.state),
            size(p.activations),
            f"{p.peft_parameters:,}",
            size(p.peft_state),
            size(p.peft_activations),
        )
    return table


def _paper(plan: Plan, model: nn.Module, console: Console) -> None:
    wanted = SHARE * plan.parameters
    title = f"the paper's {SHARE:.2%} of the parameters: {wanted:,.0f} here"
    columns = ("matrices", "heads' factors", "units", "parameters per rank", "mean rank")
    table = _table(title, columns, 2)
    for r in readings(model, plan):
        mean = f"{r.mean_rank:.1f}" + (" (out of reach)" if r.mean_rank < 1 else "")
        table.add_row(r.targets, r.factoring, f"{r.units:,}", f"{r.per_rank:,}", mean)
    console.print(table)
    table = _table(
        f"the paper's {SAVED:.0%} less memory", ("against", "adapter state", "while ranks move", "all memory")
    )
    for s in savings(plan):
        table.add_row(s.baseline, *(f"{-share:+.1%}" for share in (s.state, s.moving, s.total)))
    console.print(table)
    console.print(
        f"Adapter state falls by {SAVED:.0%} against LoRA at r_max when the mean rank ends at {1 - SAVED:.2f} r_max. "
        "All memory cannot fall so far: frozen weights and activations do not depend on ranks.",
        highlight=False,
    )


def _cluster(plan: Plan, name: str, gpu: Gpu) -> Table:
    title = f"several GPUs ({name}), estimated, not measured; {plan.batch} x {plan.length} tokens per FSDP group"
    columns = (
        "TP",
        "FSDP",
        "on each GPU",
        "gradients sent",
        "if all trained",
        "base gathered",
        "TP extra",
        "time share",
    )
    table = _table(title, columns, 0)
    for s in shardings(plan, gpu):
        sent = (size(v) for v in (s.gpu_bytes, s.reduced, s.reduced_full, s.gathered, s.tp_extra))
        table.add_row(str(s.tp), str(s.fsdp), *sent, f"{s.time_share:.1%}")
    return table
