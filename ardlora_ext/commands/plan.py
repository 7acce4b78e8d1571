"""`plan`: what adapters on a model would cost, from its config alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ardlora_ext.config import AdapterConfig
from ardlora_ext.config.registry import METHODS, config_for
from ardlora_ext.errors import InputError, first_line
from ardlora_ext.subcommands import FACTORING, GRANULARITY, RANK, add_config

if TYPE_CHECKING:
    from torch import nn

    from ardlora_ext.plan import Plan

_DESCRIPTION = """\
Tell what adapters on a model would cost: matched modules, units, parameters, and bytes of weights, gradients, Adam's
moments, scores and activations saved for backward, beside PEFT's LoRA. No weights are loaded: the forward pass is
traced on tensors that have shapes and no memory. Units: bytes in KiB, MiB, GiB (powers of 1024), per process.
"""
_LENGTH = 2048
_EPILOG = """\
MODEL is a folder with a config.json, or one of: llama-3.1-8b, llama-3.1-70b, llama-3.1-405b, paligemma-2-3b,
mixtral-8x7b, qwen3-30b-a3b, gpt-oss-20b, deepseek-v3, smollm2-135m-instruct, all-minilm-l6-v2, bert-base, vit-base.

examples:
  python -m ardlora_ext plan llama-3.1-8b
  python -m ardlora_ext plan llama-3.1-70b --r 16 --paper --gpu h100
  python -m ardlora_ext plan my-model/ --method lora --granularity matrix --batch-size 8 --length 512 --json plan.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("model", metavar="MODEL", help="folder of a config.json, or a built-in name (below)")
    add_config(parser)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the frozen weights"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", default=1, help="sequences or images of a step")
    parser.add_argument(
        "--length", type=int, metavar="TOKENS", help="length of a sequence (default: 2048, or what the model can read)"
    )
    parser.add_argument("--method", choices=METHODS, default="ard", help="what decides the ranks")
    parser.add_argument("--r", type=int, metavar="RANK", default=8, help=RANK)
    parser.add_argument("--r-max", type=int, metavar="RANK", help="largest rank of a unit (default: 4 r for ard)")
    parser.add_argument("--granularity", choices=("head", "matrix", "layer"), help=GRANULARITY)
    parser.add_argument("--factoring", choices=("shared", "independent"), help=FACTORING)
    parser.add_argument(
        "--target-modules",
        nargs="+",
        default=("all-linear",),
        metavar="NAME",
        help="suffixes of the modules to adapt (default: all-linear)",
    )
    parser.add_argument("--paper", action="store_true", help="add the arithmetic behind the paper's 0.32 %% and 41 %%")
    parser.add_argument("--gpu", choices=("a100", "h100", "h200"), help="add estimates for TP and FSDP over such GPUs")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the numbers there instead of printing tables; - for stdout"
    )


def run(arguments: argparse.Namespace, command: str) -> None:
    """Print the plan, or write it as JSON."""
    import torch
    import transformers

    from ardlora_ext.plan import make_plan, skeleton
    from ardlora_ext.plan.skeleton import BUILT_IN
    from ardlora_ext.train.base_model import held_length

    transformers.logging.set_verbosity_error()
    for name in ("batch_size", "length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"plan: --{name.replace('_', '-')} must be >= 1, got {value}")
    name, model = skeleton(arguments.model, getattr(torch, arguments.dtype))
    length = held_length(model, arguments.length or _LENGTH)
    if arguments.length is not None and length < arguments.length:
        raise InputError(f"plan: --length must be <= {length}, the positions of {name}, got {arguments.length}")
    try:
        plan = make_plan(name, model, _config(arguments), arguments.batch_size, length)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"plan: {error}") from error
    except Exception as error:
        if arguments.model.lower() in BUILT_IN:
            raise
        raise InputError(f"plan: {name} must have a config.json that can be run, got {first_line(error)}") from error
    if arguments.json is None:
        from ardlora_ext.plan.cluster import GPUS
        from ardlora_ext.plan.show import show
        from ardlora_ext.report.console import make_console

        gpu = (arguments.gpu, GPUS[arguments.gpu]) if arguments.gpu else None
        show(plan, model, make_console(), gpu, arguments.paper)
        return
    text = json.dumps(_json(plan, model, arguments), indent=2) + "\n"
    if str(arguments.json) == "-":
        print(text, end="")
        return
    try:
        arguments.json.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"plan: --json must be a file that can be written, got {arguments.json}: {error}") from error


def _config(arguments: argparse.Namespace) -> AdapterConfig:
    """Return the method's config at its own defaults."""
    names = tuple(arguments.target_modules)
    options = {name: getattr(arguments, name) for name in ("granularity", "factoring", "r_max")}
    options["target_modules"] = "all-linear" if names == ("all-linear",) else names
    return config_for(arguments.method, arguments.r, options)


def _json(plan: Plan, model: nn.Module, arguments: argparse.Namespace) -> dict[str, Any]:
    from ardlora_ext.plan.cluster import GPUS, shardings
    from ardlora_ext.plan.paper import readings, savings

    found = plan.as_json()
    if arguments.paper:
        found["readings"] = [asdict(reading) for reading in readings(model, plan)]
        found["savings"] = [asdict(saving) for saving in savings(plan)]
    if arguments.gpu:
        found["shardings"] = [asdict(sharding) for sharding in shardings(plan, GPUS[arguments.gpu])]
    return found
