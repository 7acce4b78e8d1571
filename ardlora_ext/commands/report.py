"""`report`: the page of a run drawn again from its saved files, or several runs compared."""

from __future__ import annotations

import argparse
from pathlib import Path

_EPILOG = """\
examples:
  python -m ardlora_ext report run            run/report.html from run/metrics.json and run/records.jsonl
  python -m ardlora_ext report ard lora dora  comparison.html of three runs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = (
        "Draw a self-contained HTML page from metrics.json and records.jsonl of a run, or compare several runs."
    )
    parser.epilog = _EPILOG
    parser.add_argument(
        "folders",
        type=Path,
        metavar="DIR",
        nargs="+",
        help="folders of runs: of finetune, of Trainer with RankCallback, or of controller.report",
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="the page to write (default: report.html in DIR; of several runs, comparison.html here)",
    )


def run(arguments: argparse.Namespace, command: str) -> None:
    """Write the page and print its path."""
    from ardlora_ext.report.page import write_report
    from ardlora_ext.report.several import comparison

    if len(arguments.folders) > 1:
        print(comparison.write_comparison(arguments.folders, arguments.to))
    else:
        print(write_report(arguments.folders[0], arguments.to))
