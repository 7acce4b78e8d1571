"""The command line: argparse over the package, one function per subcommand."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ardlora_ext.data import InputError
from ardlora_ext.finetune import METHODS, DivergenceError, Settings

_EXAMPLES = """\
examples:
  python -m ardlora_ext finetune --out run                      all-MiniLM-L6-v2 on the TREC questions, about 3 minutes
  python -m ardlora_ext finetune --out run --method lora        the same with fixed ranks
  python -m ardlora_ext finetune --out run --data reviews.csv   your own texts and labels
  python -m ardlora_ext finetune --out run --model llama/ --data notes.jsonl --task lm
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code: 0, 2 for bad input, 1 for a failed run or check, 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        code: int | None = arguments.run(arguments)
    except InputError as error:
        return _fail(error, 2)
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2", "rich"):
            raise
        return _fail(f"{arguments.command} needs {error.name}: pip install 'ardlora_ext[train]'", 2)
    except DivergenceError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted, nothing was saved", 130)
    return code or 0


def _fail(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ardlora_ext", description="LoRA fine-tuning whose ranks are learned during training."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_finetune(commands)
    _add_report(commands)
    _add_check_adapter(commands)
    return parser


def _add_finetune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a model and learn its ranks",
        description="Fine-tune a model with low-rank adapters whose ranks are learned, and report where the rank went.",
        epilog=_EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    parser.set_defaults(run=_finetune)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the adapter, the records and report.html"
    )

    data = parser.add_argument_group("model and data")
    data.add_argument(
        "--model", type=Path, metavar="DIR", help="local folder of a transformers model (default: all-MiniLM-L6-v2)"
    )
    data.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="a .jsonl or .csv file with the columns text, label and perhaps text_pair; "
        "or only text, or a .txt file, for language modelling (default: the TREC questions)",
    )
    data.add_argument("--task", choices=("auto", "classification", "lm"), default=Settings.task, help="what to learn")
    data.add_argument(
        "--max-length", type=int, metavar="N", default=Settings.max_length, help="tokens of a text or block at most"
    )

    ranks = parser.add_argument_group("adapters and ranks")
    ranks.add_argument("--method", choices=METHODS, default=Settings.method, help="what decides the ranks")
    ranks.add_argument("--lora-dropout", type=float, metavar="P", default=0.0, help="dropout of the adapters' input")
    ranks.add_argument("--r", type=int, metavar="N", default=Settings.r, help="rank of every unit at the start")
    ranks.add_argument(
        "--budget", type=int, metavar="N", help="adapter parameters at the end (default: as plain LoRA with --r has)"
    )
    ranks.add_argument(
        "--granularity", choices=("head", "matrix", "layer"), default=Settings.granularity, help="what has its own rank"
    )
    ranks.add_argument(
        "--target-modules",
        nargs="+",
        default=Settings.target_modules,
        metavar="NAME",
        help="suffixes of the modules to adapt (default: all-linear)",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs", type=int, metavar="N", default=Settings.epochs, help="passes over the training examples"
    )
    training.add_argument("--max-steps", type=int, metavar="N", help="steps to take, instead of --epochs")
    training.add_argument("--batch-size", type=int, metavar="N", default=Settings.batch_size, help="examples in a step")
    training.add_argument(
        "--lr", type=float, metavar="X", default=Settings.lr, help="peak learning rate of the adapters"
    )
    training.add_argument(
        "--head-lr", type=float, metavar="X", default=Settings.head_lr, help="peak learning rate of a new head"
    )
    training.add_argument(
        "--seed", type=int, metavar="N", default=Settings.seed, help="of all that is random but the data split"
    )
    training.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults that are not already told in words, and keep the examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _finetune(arguments: argparse.Namespace) -> None:
    import transformers

    from ardlora_ext import report
    from ardlora_ext.finetune import run

    _talk()
    transformers.logging.set_verbosity_error()  # a new head is expected to have new weights
    transformers.logging.disable_progress_bar()
    names = Settings.__dataclass_fields__
    chosen = {name: value for name, value in vars(arguments).items() if name in names}
    settings = Settings(**{**chosen, "target_modules": tuple(arguments.target_modules)})
    report.print_summary(run(settings), settings.out)


def _talk() -> None:
    """Let the package's own notices through to the terminal."""
    logger = logging.getLogger("ardlora_ext")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="draw report.html again from the saved files of a run",
        description="Draw report.html again from metrics.json and records.jsonl of a run.",
    )
    parser.set_defaults(run=_report)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that a run wrote")


def _report(arguments: argparse.Namespace) -> None:
    from ardlora_ext import report

    print(report.write_report(arguments.folder))


def _add_check_adapter(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check-adapter",
        help="tell whether PEFT, vLLM and llama.cpp will scale an adapter right",
        description="Print the scale that PEFT, vLLM and llama.cpp will use for each module of a LoRA checkpoint, "
        "beside the one it was trained with. Exit code 1 if they differ.",
    )
    parser.set_defaults(run=_check_adapter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of an adapter_config.json")


def _check_adapter(arguments: argparse.Namespace) -> int:
    from ardlora_ext.check_adapter import LOADERS, check_adapter, refusals

    try:
        modules, refused = check_adapter(arguments.folder), refusals(arguments.folder)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    width = max(len(module.name) for module in modules)
    print(f"{'module':{width}}  rank  trained  " + "  ".join(f"{loader:>9}" for loader in LOADERS))
    for module in modules:
        pairs = zip(LOADERS, module.used, strict=True)
        scales = (f"{scale:8.4g}{'*' if loader in module.wrong else ' '}" for loader, scale in pairs)
        print(f"{module.name:{width}}  {module.rank:4}  {module.trained:7.4g}  {'  '.join(scales)}".rstrip())
    wrong = {loader: sum(loader in module.wrong for module in modules) for loader in LOADERS}
    for loader, count in wrong.items():
        print(f"{loader}: " + (f"* {count} of {len(modules)} modules get a wrong scale" if count else "right"))
    if refused:
        print(f"vLLM does not load adapters with {' or '.join(refused)}")
    return int(any(wrong.values()))
