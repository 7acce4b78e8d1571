"""`finetune`: one run of `ardlora_ext.train.finetune`, or with `--dry-run` what it would train."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

from ardlora_ext import processes
from ardlora_ext.config.registry import METHODS
from ardlora_ext.errors import SavedElsewhere
from ardlora_ext.subcommands import add_config, add_units, fail
from ardlora_ext.train.settings import DTYPES, TASKS, Settings

_DESCRIPTION = """\
Fine-tune a model with low-rank adapters whose ranks are learned, and report where the rank went.
transformers' Trainer runs it (TRL's SFTTrainer for chats); every argument of theirs is at hand: --training-arg."""
_EPILOG = """\
examples:
  python -m ardlora_ext finetune --out run                      all-MiniLM-L6-v2 on the TREC questions, about 2 minutes
  python -m ardlora_ext finetune --out run --method lora        the same with fixed ranks
  python -m ardlora_ext finetune --out run --data reviews.csv   your own texts and labels
  python -m ardlora_ext finetune --out run --data pairs.csv --columns text=question label=kind
  python -m ardlora_ext finetune --out run --model llama/ --data notes.txt --resume
  python -m ardlora_ext finetune --out run --model llama/ --data chats.jsonl --load-in-4bit --dtype bf16
  python -m ardlora_ext finetune --out run --config run.yaml --seed 1
  python -m ardlora_ext finetune --out run --model llama/ --data notes.jsonl --dry-run
  torchrun --nproc-per-node 2 -m ardlora_ext finetune --out run --data reviews.csv

columns: text and label (perhaps text_pair): classification, or regression where labels are measurements; tokens and
tags: token classification; text: language modelling; messages, or prompt and completion: chats (sft)

exit code: 0, 1 when the loss stops being a number or the run is saved elsewhere for want of room, 2 for bad input
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, one for each field of `Settings`."""
    parser.usage, parser.description, parser.epilog = "%(prog)s --out DIR [options]", _DESCRIPTION, _EPILOG
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the adapter, the records and report.html"
    )
    add_config(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="load no weights, train nothing: print modules, parameters and bytes"
    )
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `compare` has as well."""
    _add_model(parser.add_argument_group("model"))
    _add_data(parser.add_argument_group("data"))
    _add_ranks(parser.add_argument_group("adapters and ranks"))
    _add_training(parser.add_argument_group("training"))
    _add_run(parser.add_argument_group("evaluations, checkpoints and where it runs"))


def _option(group: argparse._ArgumentGroup, *names: str, help: str, **keywords: Any) -> None:
    """Add an option whose default is that of the field of `Settings` by its first name."""
    field = names[0].removeprefix("--").replace("-", "_")
    group.add_argument(*names, dest=field, default=Settings.__dataclass_fields__[field].default, help=help, **keywords)


def _add_model(group: argparse._ArgumentGroup) -> None:
    _option(
        group, "--model", metavar="DIR|ID", help="folder of a model, or its id on the hub (default: all-MiniLM-L6-v2)"
    )
    _option(group, "--dtype", choices=tuple(DTYPES), help="of the frozen weights and the products with them")
    _option(group, "--load-in-4bit", action="store_true", help="quantise the frozen weights to NF4 (bitsandbytes)")
    _option(group, "--load-in-8bit", action="store_true", help="quantise them to int8 (bitsandbytes)")
    _option(group, "--gradient-checkpointing", action="store_true", help="compute activations twice, keep few")
    _option(group, "--attn", metavar="NAME", help="attention: sdpa, eager, flash_attention_2 (default: the model's)")


def _add_data(group: argparse._ArgumentGroup) -> None:
    _option(
        group,
        "--data",
        metavar="FILE|DIR|ID",
        help=".csv, .tsv, .json, .jsonl, .parquet or .txt file, a folder of such, or a data set on the hub "
        "(default: the TREC questions)",
    )
    _option(group, "--task", choices=("auto", *TASKS), help="what to learn; auto: by the columns, see below")
    _option(group, "--columns", nargs="+", metavar="OURS=YOURS", help="names of columns: text=sentence label=kind")
    _option(group, "--split", metavar="NAME", help="split of a folder or a data set on the hub")
    _option(group, "--eval-data", metavar="FILE|DIR|ID", help="data to test on (default: a share of --data)")
    _option(group, "--eval-split", metavar="NAME", help="split to test on")
    _option(group, "--eval-share", type=float, metavar="X", help="share of --data to test on, at most 2 000 rows")
    _option(group, "--max-length", type=int, metavar="TOKENS", help="length of a text or block at most (default: 128)")
    _option(group, "--packing", action="store_true", help="several short chats in one sequence")
    _option(group, "--answers-only", action="store_true", help="of chats, learn what the assistant says alone")


def _add_ranks(group: argparse._ArgumentGroup) -> None:
    _option(group, "--method", choices=METHODS, help="what decides the ranks")
    _option(
        group,
        "--mode",
        choices=("anneal", "paper", "code"),
        help="ard: anneal (fat start, thin end; the default) or paper; elalora: paper or code",
    )
    _option(group, "--r", type=int, metavar="RANK", help="rank of every unit at the start (adalora: at the end)")
    _option(
        group,
        "--budget",
        type=int,
        metavar="PARAMETERS",
        help="adapter parameters at the end (default: as plain LoRA with --r has)",
    )
    add_units(group)
    _option(
        group,
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="suffixes of the modules to adapt (default: all-linear)",
    )
    _option(group, "--lora-dropout", type=float, metavar="P", help="share of the adapters' input that is dropped")


def _add_training(group: argparse._ArgumentGroup) -> None:
    _option(group, "--epochs", "--num-train-epochs", type=int, metavar="N", help="passes over the training examples")
    _option(group, "--max-steps", type=int, metavar="N", help="optimizer steps to take, instead of --epochs")
    _option(group, "--batch-size", "--per-device-train-batch-size", type=int, metavar="N", help="examples at once")
    _option(group, "--gradient-accumulation-steps", type=int, metavar="N", help="batches in an optimizer step")
    _option(group, "--lr", "--learning-rate", type=float, metavar="X", help="peak learning rate of the adapters")
    _option(group, "--head-lr", type=float, metavar="X", help="peak learning rate of a new head")
    _option(group, "--seed", type=int, metavar="N", help="of all that is random but the data split")
    _option(
        group,
        "--training-arg",
        nargs="+",
        metavar="NAME=VALUE",
        help="any other of transformers' TrainingArguments (TRL's SFTConfig for chats): weight_decay=0.1",
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    _option(group, "--eval-steps", type=int, metavar="N", help="steps between evaluations (default: a fifth of all)")
    _option(
        group,
        "--early-stopping",
        type=int,
        metavar="N",
        help="stop after N evaluations without progress, with the best weights (default: never)",
    )
    _option(
        group,
        "--save-steps",
        type=int,
        metavar="N",
        help="steps between checkpoints (default: a fifth of all; deleted when the run has ended)",
    )
    _option(
        group,
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|DIR",
        help="go on from the last whole checkpoint in --out, if there is one, or from DIR",
    )
    _option(group, "--overwrite", action="store_true", help="delete the checkpoints of an earlier run in --out")
    _option(group, "--report-to", nargs="+", metavar="NAME", help="trackers: tensorboard, wandb, ... (default: none)")
    _option(
        group,
        "--device",
        metavar="NAME",
        help="cpu, cuda or cuda:1 (default: a GPU where torch and this build can use one)",
    )
    _option(group, "--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def settings_of(arguments: argparse.Namespace, **changes: Any) -> Settings:
    """Return what the options say."""
    given: dict[str, Any] = {**vars(arguments), **changes}
    known: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if name in Settings.__dataclass_fields__
    }
    return Settings(**known)


def run(arguments: argparse.Namespace, command: str) -> int:
    """Train, or tell what would be trained."""
    settings = settings_of(arguments)  # before the slow imports

    from ardlora_ext.report.summary import print_summary
    from ardlora_ext.train import finetune
    from ardlora_ext.train.progress import DivergenceError

    quiet()
    if arguments.dry_run:
        finetune.dry_run(settings)
        return 0
    try:
        metrics = finetune.run(settings)
        if metrics is not None:
            print_summary(metrics, settings.out)
    except (DivergenceError, SavedElsewhere) as error:
        return fail(error, 1)
    return 0


def quiet() -> None:
    """Let the package's own notices through to the terminal, and of the libraries what is an error."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()  # a new head is expected to have new weights
    transformers.logging.disable_progress_bar()
    logger = logging.getLogger("ardlora_ext")
    if processes.launched_rank() == 0 and not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of one library to another
