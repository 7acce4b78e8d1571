"""The command line: one module of `ardlora_ext.commands` per subcommand."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ardlora_ext import subcommands
from ardlora_ext.subcommands import Command

PROG = "python -m ardlora_ext"
DESCRIPTION = "LoRA fine-tuning whose ranks are learned during training."
COMMANDS = (
    Command("finetune", "ardlora_ext.commands.finetune", "fine-tune a model and learn its ranks"),
    Command("compare", "ardlora_ext.commands.compare", "fine-tune by several methods, ranks and seeds, and compare"),
    Command("plan", "ardlora_ext.commands.plan", "tell what adapters on a model would cost, without its weights"),
    Command("export", "ardlora_ext.commands.export", "write a saved adapter again in another PEFT form"),
    Command("check-adapter", "ardlora_ext.commands.check_adapter", "tell which loaders will scale an adapter right"),
    Command(
        "frontier", "ardlora_ext.commands.frontier", "score a trained adapter at many sizes, and write one of them"
    ),
    Command("report", "ardlora_ext.commands.report", "draw report.html from the saved files of a run"),
    Command("bench", "ardlora_ext.bench.cli", "measure kernels, training steps and the quality of allocation"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code: 0, 2 for bad input, 1 for a failed run or check, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"]:
        from ardlora_ext.bench import cli as bench

        return bench.main(words[1:])
    return subcommands.run(words, PROG, DESCRIPTION, COMMANDS)
