"""Which parameters of a model are stacks of experts' matrices: found by their structure, whatever the class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

_SIZES = (("input_size", "output_size"), ("in_features", "out_features"))


@dataclass(frozen=True)
class Stack:
    """One stacked parameter.

    Attributes:
        module: the experts module.
        parameter: its name there.
        experts: E.
        in_features: of each expert's matrix.
        out_features: of each expert's matrix.
        transposed: whether the parameter is [E, in, out]; else [E, out, in].
        quantised: whether it holds codes instead of numbers; its sizes mean nothing then.
    """

    module: nn.Module
    parameter: str
    experts: int
    in_features: int
    out_features: int
    transposed: bool
    quantised: bool


def expert_stacks(model: nn.Module) -> dict[str, Stack]:
    """Return the stacks of a model by the full name of the parameter: 3-D, its first axis the experts of its module.

    Its module says so by a number of experts that is the length of the axis, or by the word in its name or type.
    """
    found = {}
    for name, module in model.named_modules():
        for key, parameter in _stacked(name, module):
            transposed = is_transposed(module, key)
            rows, columns = parameter.shape[1:]
            sizes = (rows, columns) if transposed else (columns, rows)
            coded = not parameter.is_floating_point()
            full = f"{name}.{key}" if name else key
            found[full] = Stack(module, key, len(parameter), *sizes, transposed, coded)
    return found


def _stacked(name: str, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    named = "expert" in f"{name.rpartition('.')[2]}.{type(module).__name__}".lower()
    counts = [v for k, v in vars(module).items() if "expert" in k and isinstance(v, int) and not isinstance(v, bool)]
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3 and min(parameter.shape) > 1 and (named or len(parameter) in counts):
            yield key, parameter


def is_transposed(module: nn.Module, key: str) -> bool:
    """Tell whether a stack is [E, in, out]: stated by the module, else by sizes it states, else by the pair's sizes.

    Up and down projections meet at two sizes: out of the one is into the other, or half of it with a gate. What it is
    used as in the forward pass is checked there.
    """
    stated = getattr(module, "is_transposed", None)
    if isinstance(stated, bool):
        return stated
    shapes = {k: tuple(p.shape[1:]) for k, p in module.named_parameters(recurse=False) if p.ndim == 3}
    for names in _SIZES:
        sizes = tuple(getattr(module, name, None) for name in names)
        if sizes[0] != sizes[1] and sizes in (shapes[key], shapes[key][::-1]):
            return sizes == shapes[key]
    if len(shapes) != 2:
        return False
    up, down = shapes.values()
    usual = up[1] == down[0] and up[0] in (down[1], 2 * down[1])
    other = up[0] == down[1] and up[1] in (down[0], 2 * down[0])
    return other and not usual
