"""`check-adapter`: the scale that every loader will use, beside the trained one."""

from __future__ import annotations

import argparse
from pathlib import Path

from ardlora_ext.errors import InputError

_EPILOG = """\
examples:
  python -m ardlora_ext check-adapter run      what `finetune` or `save_pretrained` wrote, or any PEFT LoRA checkpoint

exit code: 0, 1 when a loader would use another scale than the trained one, 2 for bad input
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = (
        "Print the scale that PEFT, vLLM and llama.cpp will use for each module of a LoRA checkpoint, beside the\n"
        "one it was trained with; a star marks one that differs."
    )
    parser.epilog = _EPILOG
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of an adapter_config.json")


def run(arguments: argparse.Namespace, command: str) -> int:
    """Print a line per module and a verdict per loader; 1 if one is wrong."""
    from ardlora_ext.checkpoint.check_adapter import LOADERS, check_adapter, of_experts, refusals

    try:
        modules, refused = check_adapter(arguments.folder), refusals(arguments.folder)
        experts = of_experts(arguments.folder)
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
        verdict = f"* {count} of {len(modules)} modules get a wrong scale" if count else "right scales"
        but = f", but it does not load adapters with {' or '.join(refused)}" if refused and loader != "PEFT" else ""
        print(f"{loader}: {verdict}{but}")
    if experts:
        print("stacked experts:")
        print("  vLLM reads them in models that it marks as 3-D (gpt-oss, Qwen3.5), if all projections have adapters;")
        print("  in others it takes the rows of gate_up_proj in turns for gate and up, which is wrong for halves")
        print("  SGLang leaves them out in silence, or fails with --lora-strict-loading")
        print("  llama.cpp's converter has no names for them")
        print("  a merged model is right everywhere")
    return int(any(wrong.values()))
