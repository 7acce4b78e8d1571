"""`finetune`: one run of `ardlora_ext.train.finetune`, or with `--dry-run` what it would train."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ardlora_ext.config.registry import METHODS
from ardlora_ext.errors import SavedElsewhere
from ardlora_ext.subcommands import add_config, add_units, fail
from ardlora_ext.train.finetune import DivergenceError
from ardlora_ext.train.settings import Settings

_DESCRIPTION = "Fine-tune a model with low-rank adapters whose ranks are learned, and report where the rank went."
_EPILOG = """\
examples:
  python -m ardlora_ext finetune --out run                      all-MiniLM-L6-v2 on the TREC questions, about 2 minutes
  python -m ardlora_ext finetune --out run --method lora        the same with fixed ranks
  python -m ardlora_ext finetune --out run --data reviews.csv   your own texts and labels
  python -m ardlora_ext finetune --out run --model llama/ --data notes.jsonl --task lm
  python -m ardlora_ext finetune --out run --config run.yaml --seed 1
  python -m ardlora_ext finetune --out run --model llama/ --data notes.jsonl --dry-run

exit code: 0, 1 when the loss stops being a number or the run is saved elsewhere for want of room, 2 for bad input
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, one for each field of `Settings`."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the adapter, the records and report.html"
    )
    add_config(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="load no weights, train nothing: print modules, parameters and bytes"
    )
    _add_data(parser.add_argument_group("model and data"))
    _add_ranks(parser.add_argument_group("adapters and ranks"))
    _add_training(parser.add_argument_group("training"))


def _add_data(data: argparse._ArgumentGroup) -> None:
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
        "--max-length",
        type=int,
        metavar="TOKENS",
        default=Settings.max_length,
        help="length of a text or block at most",
    )


def _add_ranks(ranks: argparse._ArgumentGroup) -> None:
    ranks.add_argument("--method", choices=METHODS, default=Settings.method, help="what decides the ranks")
    ranks.add_argument(
        "--lora-dropout", type=float, metavar="P", default=0.0, help="share of the adapters' input that is dropped"
    )
    ranks.add_argument(
        "--r",
        type=int,
        metavar="RANK",
        default=Settings.r,
        help="rank of every unit at the start (adalora: at the end)",
    )
    ranks.add_argument(
        "--budget",
        type=int,
        metavar="PARAMETERS",
        help="adapter parameters at the end (default: as plain LoRA with --r has)",
    )
    add_units(ranks)
    ranks.add_argument(
        "--target-modules",
        nargs="+",
        default=Settings.target_modules,
        metavar="NAME",
        help="suffixes of the modules to adapt (default: all-linear)",
    )


def _add_training(training: argparse._ArgumentGroup) -> None:
    training.add_argument(
        "--epochs", type=int, metavar="N", default=Settings.epochs, help="passes over the training examples"
    )
    training.add_argument("--max-steps", type=int, metavar="N", help="optimizer steps to take, instead of --epochs")
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
    training.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda or cuda:1 (default: a GPU where torch and this build can use one)",
    )
    training.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def run(arguments: argparse.Namespace, command: str) -> int:
    """Train, or tell what would be trained."""
    import transformers

    from ardlora_ext.report.summary import print_summary
    from ardlora_ext.train import finetune

    _talk()
    transformers.logging.set_verbosity_error()  # a new head is expected to have new weights
    transformers.logging.disable_progress_bar()
    chosen = {name: value for name, value in vars(arguments).items() if name in Settings.__dataclass_fields__}
    settings = Settings(**{**chosen, "target_modules": tuple(arguments.target_modules)})
    if arguments.dry_run:
        finetune.dry_run(settings)
        return 0
    try:
        print_summary(finetune.run(settings), settings.out)
    except (DivergenceError, SavedElsewhere) as error:
        return fail(error, 1)
    return 0


def _talk() -> None:
    """Let the package's own notices through to the terminal."""
    logger = logging.getLogger("ardlora_ext")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
