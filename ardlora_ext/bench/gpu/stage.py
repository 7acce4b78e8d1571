"""`python -m ardlora_ext.bench.gpu.stage NAME`: one stage in a process of its own. Its rows go to stdout, as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ardlora_ext.bench.gpu.context import Context, Skipped
from ardlora_ext.bench.machine import Json

ROW, SKIPPED = "row: ", "skipped: "  # how lines of stdout begin that the command reads
_ROOM = "ardlora_ext.bench.gpu"


class Stage(NamedTuple):
    """A stage: the function `module:name` of this folder, and the seconds it may take."""

    name: str
    where: str
    seconds: int
    help: str


STAGES = (  # most valuable first; together 9 minutes
    Stage("build", "tools:built", 60, "the kernels of this GPU's architecture"),
    Stage("smoke", "numbers:smoke", 25, "one small call of each type"),
    Stage("precise", "numbers:precise", 45, "real shapes against float64"),
    Stage("methods", "training:methods", 35, "every method against the CPU"),
    Stage("step", "speed:step", 90, "a training step of LLaMA-7B-size layers, frozen, ours, PEFT's"),
    Stage("graph", "training:graph", 20, "CUDA graphs by torch's recipe"),
    Stage("compiled", "training:compiled", 40, "torch.compile in CUDA graphs, beside eager training"),
    Stage("optimizers", "training:optimizers", 35, "fused, capturable, 8-bit; autocast and loss scaling"),
    Stage("trainer", "training:trainer", 35, "transformers' Trainer in bfloat16"),
    Stage("repeated", "numbers:repeated", 20, "the same bits twice, on side streams"),
    Stage("kernels", "speed:kernels", 40, "adapted layers in turns, queue and L2 out of the way"),
    Stage("tests", "tools:tests", 40, "the project's own tests that want a GPU"),
    Stage("sanitizer", "tools:sanitizer", 30, "compute-sanitizer's memcheck and racecheck"),
    Stage("ncu", "tools:ncu", 25, "time and DRAM bytes of each kernel"),
)


def run(name: str, context: Context) -> Iterator[Json]:
    """Yield the rows of a stage; each has `case` and `ok`."""
    module, _, function = next(stage.where for stage in STAGES if stage.name == name).partition(":")
    stage: Callable[[Context], Iterator[Json]] = getattr(importlib.import_module(f"{_ROOM}.{module}"), function)
    for row in stage(context):
        yield {key: value.item() if isinstance(value, np.generic) else value for key, value in row.items()}


def main() -> int:
    """Run a stage; return 1 where a row is not ok."""
    parser = argparse.ArgumentParser(prog=f"python -m {_ROOM}.stage")
    parser.add_argument("name", choices=[stage.name for stage in STAGES])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    if not arguments.dry and not torch.cuda.is_available():
        print(f"{SKIPPED}torch sees no CUDA device")
        return 0
    if arguments.dry:
        torch.set_num_threads(1)
    context = Context(torch.device("cpu" if arguments.dry else "cuda:0"), arguments.dry, arguments.out)
    good = True
    try:
        for row in run(arguments.name, context):
            good = good and row["ok"]
            print(ROW + json.dumps(row), flush=True)
    except Skipped as why:
        print(f"{SKIPPED}{why}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
