"""The command line of the benches: one module per subcommand, see `ardlora_ext.subcommands`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ardlora_ext import subcommands
from ardlora_ext.subcommands import Command

PROG = "python -m ardlora_ext.bench"
DESCRIPTION = "Benches of ardlora_ext."
COMMANDS = (
    Command("kernels", "ardlora_ext.bench.speed.kernels", "time the native kernels against the machine's roofline"),
    Command(
        "layer", "ardlora_ext.bench.speed.layers.command", "time adapted layers against PEFT and compositions of torch"
    ),
    Command(
        "descent", "ardlora_ext.bench.quality.descent", "test ARD-LoRA's step bounds where the smoothness is known"
    ),
    Command("host", "ardlora_ext.bench.speed.host", "time Python's share of an adapted layer against PEFT's"),
    Command("step", "ardlora_ext.bench.speed.step", "time a whole training step against the frozen base and PEFT"),
    Command("memory", "ardlora_ext.bench.speed.memory", "measure what a training step holds and takes"),
    Command("resize", "ardlora_ext.bench.speed.resize", "time a change of ranks against memcpy of the same bytes"),
    Command("scaling", "ardlora_ext.bench.speed.scaling", "time rank control over units, ranks and tokens"),
    Command("quality", "ardlora_ext.bench.quality.command", "compare rank-allocation methods at equal parameters"),
    Command("pictures", "ardlora_ext.bench.quality.pictures", "draw what saved comparisons of quality show"),
    Command("prune", "ardlora_ext.bench.quality.prune", "compare dropping components with recompressing them"),
    Command("trust", "ardlora_ext.bench.trust.command", "hunt for kills, faults and broken files that do harm"),
    Command("zoo", "ardlora_ext.bench.zoo.command", "take every architecture of transformers from wrap to merge"),
    Command("gpu", "ardlora_ext.bench.gpu.command", "a first day on a GPU: all that only a GPU can show, in stages"),
    Command("cuda-static", "ardlora_ext.bench.cuda.static", "tell what nvcc makes of the CUDA kernels; needs no GPU"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code: 0, 2 for bad input, 130 for Ctrl-C."""
    return subcommands.run(list(sys.argv[1:] if argv is None else argv), PROG, DESCRIPTION, COMMANDS)
