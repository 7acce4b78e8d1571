"""`export`: a saved adapter once more, in another PEFT form or below a server's rank limit."""

from __future__ import annotations

import argparse
from pathlib import Path

from ardlora_ext.errors import InputError

_EPILOG = """\
examples:
  python -m ardlora_ext export run --to served --compress 64    for a server with max_lora_rank = 64
  python -m ardlora_ext export run --to small --form compact    every module at its own rank: for PEFT and vLLM

`portable` pads every module to one rank, so PEFT, vLLM and llama.cpp all scale it right; `compact` is smaller and
wrong in llama.cpp. The base model is not needed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = "Write an adapter that `finetune` or `save_pretrained` saved once more, in another form."
    parser.epilog = _EPILOG
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the saved adapter")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write, may be the same")
    parser.add_argument("--form", choices=("portable", "compact"), default="portable", help="form of the checkpoint")
    parser.add_argument(
        "--compress", type=int, metavar="RANK", help="cut every module to this rank at most, as well as it can be"
    )


def run(arguments: argparse.Namespace, command: str) -> None:
    """Write it, and tell its rank and what was cut."""
    from ardlora_ext.checkpoint.reexport import reexport

    try:
        done = reexport(arguments.folder, arguments.to, form=arguments.form, compress=arguments.compress)
    except (ValueError, OSError) as error:
        raise InputError(f"export: {error}") from error
    print(f"{arguments.to}: {len(done.ranks)} modules, {arguments.form}, r = {done.r}")
    cut = {name: error for name, error in done.errors.items() if error > 0.0}
    if cut:
        worst = max(cut, key=lambda name: cut[name])
        cuts = f"{len(cut)} modules were cut to rank {arguments.compress}"
        print(f"{cuts}; largest relative error {cut[worst]:.3g} ({worst})")
