"""The command line of the benches: a table of subcommands, each a module with `add_arguments` and `run`.

    def add_arguments(parser: argparse.ArgumentParser) -> None: ...
    def run(arguments: argparse.Namespace, command: str) -> None: ...   # command: the line that repeats this run

A module is imported only when its subcommand is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ardlora_ext.data import InputError


class Command(NamedTuple):
    """One subcommand: its name, the module that runs it, and a line of help."""

    name: str
    module: str
    help: str


COMMANDS = (
    Command("kernels", "ardlora_ext.bench.kernels", "time the native kernels against the machine's roofline"),
    Command("layer", "ardlora_ext.bench.layer", "time adapted linear layers against PEFT and compositions of torch"),
    Command("step", "ardlora_ext.bench.step", "time a whole training step against the frozen base and PEFT"),
    Command("memory", "ardlora_ext.bench.memory", "measure what a training step holds and takes"),
    Command("resize", "ardlora_ext.bench.resize", "time a change of ranks against memcpy of the same bytes"),
    Command("quality", "ardlora_ext.bench.quality", "compare rank-allocation methods at equal parameters"),
    Command("cuda-static", "ardlora_ext.bench.cuda_static", "tell what nvcc makes of the CUDA kernels; needs no GPU"),
)

_EXTRAS = ("matplotlib", "rich")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults that are not already told in words, and keep an epilog as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code: 0, 2 for bad input, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parser(words[:1]).parse_args(words)
        module = importlib.import_module(arguments.module)
        module.run(arguments, shlex.join(["python", "-m", "ardlora_ext.bench", *words]))
    except InputError as error:
        return _fail(error, 2)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        return _fail(f"bench needs {error.name}: pip install 'ardlora_ext[train]'", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _parser(chosen: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ardlora_ext.bench", description="Benches of ardlora_ext.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            formatter_class=_HelpFormatter,
        )
        sub.set_defaults(module=command.module)
        if command.name in chosen:
            importlib.import_module(command.module).add_arguments(sub)
    return parser
