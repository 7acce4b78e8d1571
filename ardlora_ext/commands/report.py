"""`report`: report.html of one run again, or one page that compares several."""

from __future__ import annotations

import argparse
from pathlib import Path

_EPILOG = """\
examples:
  python -m ardlora_ext report run                            run/report.html from run/metrics.json and records.jsonl
  python -m ardlora_ext report ard lora --to comparison.html  both runs on one page
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = (
        "Draw a self-contained HTML page from metrics.json and records.jsonl of a run, or compare several runs."
    )
    parser.epilog = _EPILOG
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder that `finetune` wrote")
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="the page to write (default: report.html in DIR; comparison.html here for several)",
    )


def run(arguments: argparse.Namespace, command: str) -> None:
    """Write the page and print its path."""
    from ardlora_ext import report

    folders: list[Path] = arguments.folders
    if len(folders) == 1:
        print(report.write_report(folders[0], arguments.to))
    else:
        print(report.write_comparison(folders, arguments.to or Path("comparison.html")))
