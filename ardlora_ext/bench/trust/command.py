"""`bench trust`: hunt for what would break a promise of docs/reliability.md, for as long as asked."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ardlora_ext.bench.machine import Json
from ardlora_ext.bench.output import Column, Result, publish
from ardlora_ext.bench.trust.beds import Hunt, Tally
from ardlora_ext.bench.trust.changes import Changes, Interrupts
from ardlora_ext.bench.trust.faults import FileFaults, LoadFaults
from ardlora_ext.bench.trust.fuzz import Commands, Loaders
from ardlora_ext.bench.trust.kills import Kills
from ardlora_ext.bench.trust.native import Native
from ardlora_ext.bench.trust.threads import Threads

HUNTS: dict[str, Callable[[Path, Tally], Hunt]] = {
    "kills": Kills,
    "file-faults": FileFaults,
    "load-faults": LoadFaults,
    "changes": Changes,
    "interrupts": Interrupts,
    "loaders": Loaders,
    "commands": Commands,
    "native": Native,
    "threads": Threads,
}
_SHARES = {"kills": 4, "loaders": 7, "native": 4}  # of the time; the others have 1
_SHOWN = 20
_EPILOG = """\
examples:
  python -m ardlora_ext.bench trust --minutes 20
  python -m ardlora_ext.bench trust --hunts kills --minutes 2 --seed 7

exit code: 0, 1 when something was found; case N of a hunt can be repeated by its seed, which the failure names
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = _EPILOG
    parser.add_argument("--minutes", type=float, metavar="N", default=1.0, help="how long all hunts take together")
    parser.add_argument("--cases", type=int, metavar="N", help="most cases of a hunt (default: what the time allows)")
    parser.add_argument("--hunts", nargs="+", choices=sorted(HUNTS), default=list(HUNTS), help="which (default: all)")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the first case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, command and all rows")
    parser.set_defaults(plot=None)


def run(arguments: argparse.Namespace, command: str) -> int:
    """Hunt, print the counts, and tell what was found."""
    cases = arguments.cases or sys.maxsize
    rows: list[Json] = []
    found: list[str] = []
    for name in arguments.hunts:
        begun = time.perf_counter()
        whole = sum(_SHARES.get(other, 1) for other in arguments.hunts)
        seconds = 60.0 * arguments.minutes * _SHARES.get(name, 1) / whole
        done, tally = hunt(name, range(arguments.seed, arguments.seed + cases), seconds)
        found += [f"{name}: {failure}" for failure in tally.failures]
        counts = ", ".join(f"{count:,} {what}" for what, count in sorted(tally.counts.items()))
        took = time.perf_counter() - begun
        rows.append({"hunt": name, "cases": done, "found": len(tally.failures), "seconds": took, "counts": counts})
    columns = [
        Column("hunt", "hunt"),
        Column("cases", "cases", "{:,}".format),
        Column("found", "found"),
        Column("s", "seconds", "{:.0f}".format),
    ]
    notes = [f"{row['hunt']}: {row['counts']}" for row in rows] + found[:_SHOWN]
    publish(arguments, command, Result("Trust", columns, rows, "", [], notes))
    return int(bool(found))


def hunt(name: str, seeds: Sequence[int], seconds: float) -> tuple[int, Tally]:
    """Run the cases of these seeds until the time is up; return how many there were, and what they found."""
    tally, done = Tally(), 0
    with tempfile.TemporaryDirectory(prefix="ardlora-trust-") as folder:
        cases = HUNTS[name](Path(folder), tally)
        end = time.perf_counter() + seconds
        for seed in seeds:
            before = len(tally.failures)
            cases.case(random.Random(seed))
            tally.failures[before:] = [f"seed {seed}: {text}" for text in tally.failures[before:]]
            done += 1
            if time.perf_counter() > end:
                break
    return done, tally
