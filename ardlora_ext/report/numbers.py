"""Numbers for people."""

from __future__ import annotations


def format_metric(name: str | None, value: float | None) -> str:
    """Write an accuracy in percent, anything else with four digits, nothing as a dash."""
    if value is None:
        return "–"
    return f"{value:.1%}" if name == "accuracy" else f"{value:.4g}"


def better(name: str, value: float, other: float) -> bool:
    """Tell whether a value of a metric is better than another: of perplexities the smaller, else the larger."""
    return value < other if name == "perplexity" else value > other


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
