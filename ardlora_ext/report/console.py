"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

_WIDTH = 160  # columns in a file or a pipe, so that tables keep their numbers whole


def make_console() -> Console:
    """Return a console on stdout, as wide as the terminal, or wide enough for every table where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)
