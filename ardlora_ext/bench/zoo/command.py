"""`bench zoo`: which architectures of transformers can be wrapped, trained, exported, reloaded and merged."""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path

from ardlora_ext.bench.machine import Json
from ardlora_ext.bench.output import Column, Result, publish
from ardlora_ext.bench.zoo.journey import FAIL, PASS, REFUSED, UNKNOWN
from ardlora_ext.bench.zoo.tiny import architectures
from ardlora_ext.bench.zoo.workers import outcomes
from ardlora_ext.errors import InputError

_EPILOG = """\
examples:
  python -m ardlora_ext.bench zoo
  python -m ardlora_ext.bench zoo --types llama t5 vit whisper --all

Every model type of the installed transformers, made tiny: wrap with ArdConfig(), two steps of training,
save_pretrained; PEFT's load, our own and the merged model must compute what the trained one does. The table has what
did not pass.

  refused     one sentence of ours says what cannot be, and what can
  not built   no tiny config or no inputs were found for it: nothing is known

exit code: 0, 1 when something failed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = _EPILOG
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="model types (default: all)")
    parser.add_argument("--sample", type=int, metavar="N", help="so many of them, drawn by --seed")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the sample")
    parser.add_argument("--seconds", type=float, metavar="N", default=60.0, help="longest time for one")
    parser.add_argument("--all", action="store_true", help="show those that passed, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, command and all rows")
    parser.set_defaults(plot=None)


def run(arguments: argparse.Namespace, command: str) -> int:
    """Try them, print the table and the counts."""
    known = architectures()
    kinds = list(known) if arguments.types is None else list(arguments.types)
    for kind in kinds:
        if kind not in known:
            raise InputError(f"--types must be model types of transformers, got {kind!r}")
    if arguments.sample is not None:
        kinds = sorted(random.Random(arguments.seed).sample(kinds, min(arguments.sample, len(kinds))))
    rows: list[Json] = []
    begun = time.perf_counter()
    for kind, outcome in outcomes(kinds, arguments.seconds):
        rows.append({"type": kind, "class": known[kind], **outcome._asdict()})
    counts = Counter(row["verdict"] for row in rows)
    notes = [
        ", ".join(f"{counts[v]} {v}" for v in (PASS, REFUSED, FAIL, UNKNOWN))
        + f" of {len(rows)}; {time.perf_counter() - begun:.0f} s"
    ]
    for verdict in (PASS, REFUSED):
        by = Counter(row["modality"] for row in rows if row["verdict"] == verdict)
        notes.append(f"{verdict}: " + ", ".join(f"{count} {name}" for name, count in sorted(by.items())))
    shown = [row for row in rows if arguments.all or row["verdict"] != PASS]
    notes += [f"{row['type']}: {row['verdict']}: {row['word']}" for row in shown if row["word"]]
    columns = [Column(key, key) for key in ("type", "class", "modality", "inputs", "verdict")]
    publish(arguments, command, Result("Zoo", columns, rows, "", [], notes, shown=shown))
    return int(counts[FAIL] > 0)
