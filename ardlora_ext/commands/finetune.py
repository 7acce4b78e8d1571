"""`finetune`: one run of `ardlora_ext.train.finetune`, or with `--dry-run` what it would train."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

from ardlora_ext import processes
from ardlora_ext.errors import SavedElsewhere
from ardlora_ext.subcommands import add_config, add_options, fail
from ardlora_ext.train.settings import GROUPS, Settings

_DESCRIPTION = """\
Fine-tune a model with low-rank adapters whose ranks are learned, and report where the rank went.
transformers' Trainer runs it (TRL's SFTTrainer for chats); every argument of theirs is at hand: --training-arg."""
_EPILOG = """\
examples:
  python -m ardlora_ext finetune --out run                      all-MiniLM-L6-v2 on the TREC questions, about 2 minutes
  python -m ardlora_ext finetune --out run --method lora        the same with fixed ranks
  python -m ardlora_ext finetune --out run --task sft           SmolLM2-135M on questions, with answers before and after
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
    add_options(parser, GROUPS)


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
