"""`report`: report.html of a run, drawn again from its saved files."""

from __future__ import annotations

import argparse
from pathlib import Path

_EPILOG = """\
example:
  python -m ardlora_ext report run    run/report.html from run/metrics.json and run/records.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = "Draw a self-contained HTML page from metrics.json and records.jsonl of a run."
    parser.epilog = _EPILOG
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that `finetune` wrote")
    parser.add_argument("--to", type=Path, metavar="FILE", help="the page to write (default: report.html in DIR)")


def run(arguments: argparse.Namespace, command: str) -> None:
    """Write the page and print its path."""
    from ardlora_ext import report

    print(report.write_report(arguments.folder, arguments.to))
