"""`bench gpu`: a first day on a GPU in one command, of stages that cannot spoil each other.

Every stage is a process with a time limit of its own; after each one all results so far are written. `--dry` runs all
of it on the CPU, the CUDA kernels on the host, so that the day is not lost to a slip.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from ardlora_ext.bench.gpu.context import HOST_RUN
from ardlora_ext.bench.gpu.stage import ROW, SKIPPED, STAGES, Stage
from ardlora_ext.bench.machine import Json, write_json
from ardlora_ext.errors import InputError

_BESIDE = Path(__file__).resolve().parents[3]  # what runs is this package
_DRY_SECONDS = 240  # of a stage: a rehearsal is not about time
RESULTS, LOG = "gpu.json", "gpu.log"
_MODULE = "ardlora_ext.bench.gpu.stage"
_NAMES = [stage.name for stage in STAGES]
_EPILOG = """\
examples:
  python ardlora_ext/bench/gpu/build.py && python -m ardlora_ext.bench gpu --out day
  python -m ardlora_ext.bench gpu --out rehearsal --dry

exit code: 0, 1 when a stage failed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = _EPILOG
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help=f"folder for {RESULTS} and {LOG}")
    parser.add_argument("--dry", action="store_true", help="rehearse on the CPU, the CUDA kernels run on the host")
    parser.add_argument("--stages", nargs="+", choices=_NAMES, default=_NAMES, help="which (default: all)")


def run(arguments: argparse.Namespace, command: str) -> int:
    """Run the stages, and print what became of each."""
    if not arguments.dry and not torch.cuda.is_available():
        raise InputError("bench gpu: a GPU must be there that torch sees; rehearse without one by --dry")
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[Json] = []
    for stage in STAGES:
        if stage.name in arguments.stages:
            rows.append(_run(stage, arguments.out, arguments.dry))
            write_json(arguments.out / RESULTS, command, rows)
            print(_line(rows[-1]), flush=True)
    (arguments.out / HOST_RUN).unlink(missing_ok=True)
    print("\n" + "\n".join(_line(row) for row in rows))
    spent = sum(row["seconds"] for row in rows)
    counts = ", ".join(f"{sum(r['verdict'] == v for r in rows)} {v}" for v in ("ok", "failed", "skipped"))
    print(f"{counts} in {spent:.0f} s; {arguments.out / RESULTS}")
    return int(any(row["verdict"] == "failed" for row in rows))


def _line(row: Json) -> str:
    return f"{row['stage']:<11} {row['verdict']:<8} {row['seconds']:6.1f} of {row['limit']} s  {row['what']}"


def _run(stage: Stage, out: Path, dry: bool) -> Json:
    """Run one stage and return what became of it; what it prints goes to the log."""
    words = [sys.executable, "-m", _MODULE, stage.name, "--out", str(out), *["--dry"] * dry]
    path = os.pathsep.join([str(_BESIDE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    log, began, late = out / LOG, time.perf_counter(), False
    limit = _DRY_SECONDS if dry else stage.seconds
    with log.open("a+", encoding="utf-8") as text:
        text.write(f"==== {stage.name}\n")
        text.flush()
        start = text.tell()
        process = subprocess.Popen(words, stdout=text, stderr=text, env=environment, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            late, code = True, 1
        except BaseException:
            _end(process)
            raise
        if late:
            _end(process)
        text.seek(start)
        said = text.read().splitlines()
    rows: list[Json] = [json.loads(line.removeprefix(ROW)) for line in said if line.startswith(ROW)]
    skipped = [line.removeprefix(SKIPPED) for line in said if line.startswith(SKIPPED)]
    bad = [row for row in rows if not row["ok"]]
    if late:
        verdict, what = "failed", f"longer than {limit} s, after {len(rows)} cases"
    elif bad:
        verdict, what = "failed", f"{len(bad)} of {len(rows)} cases, the first: {bad[0]['case']}"
    elif code != 0:
        verdict, what = "failed", next((line for line in reversed(said) if line.strip()), f"exit code {code}")
    elif skipped:
        verdict, what = "skipped", skipped[0]
    else:
        verdict, what = "ok", f"{len(rows)} cases: {stage.help}"
    seconds = time.perf_counter() - began
    return {
        "stage": stage.name,
        "verdict": verdict,
        "seconds": seconds,
        "limit": limit,
        "what": what,
        "rows": rows,
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a stage and all that it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
