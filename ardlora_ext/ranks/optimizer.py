"""Optimizer state that follows a parameter whose rows change.

What has one entry per weight, flat or not, or one per row, moves with the rows; what has one per column, and scalars
such as `step`, stay as they are. That covers torch's Adam, AdamW, NAdam, RAdam, Adamax, Adagrad, RMSprop, Muon and SGD
with momentum, single, foreach and fused alike, and Lion, Prodigy, SM3 and many more. Moments in 8 bit (`eight_bit`) and
second moments as two vectors (`Factored`) have rules of their own; `rehearsal` tells before training who follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ardlora_ext.model.record import adapters, injection
from ardlora_ext.ranks import eight_bit
from ardlora_ext.ranks.eight_bit import EightBit
from ardlora_ext.unbroken import unbroken


@dataclass(frozen=True)
class Factored:
    """A second moment of one parameter as two vectors (Adafactor, CAME): v[i, j] = row[i] * column[j] / mean(row).

    A row's number moves with the row. The column's are means over all rows, so they are scaled with the mean of the
    row's: then v keeps its value for every row that stays. A new row starts at the mean of those: at zero, its first
    updates would be 1 / sqrt(1 - beta2) times too large.

    Attributes:
        row: one number per row of the parameter.
        column: one per column.
        column_key: of the state; the other one's is that of the moment.
    """

    row: torch.Tensor
    column: torch.Tensor
    column_key: str

    def gather(self, plan: Sequence[int], live: int) -> Factored:
        """Return the moment whose row i is row `plan[i]` of this one; -1 is a new row below `live`, else none."""
        flat = self.row.reshape(-1)
        source = torch.tensor(plan, dtype=torch.int64, device="cpu").to(flat.device, non_blocking=True)
        row = torch.where(source < 0, 0.0, flat[source.clamp(min=0)]) if len(flat) else flat.new_zeros(len(plan))
        kept = source[:live] >= 0
        if any(number >= 0 for number in plan[:live]):
            row[:live] = torch.where(kept, row[:live], row[:live].sum() / kept.sum())  # new ones are still 0
        before, after = flat.mean(), row.mean()
        ratio = torch.where((before > 0) & (after > 0), after / before, 1.0)
        return Factored(row.view(-1, *self.row.shape[1:]), self.column * ratio, self.column_key)

    def with_rows(self, row: torch.Tensor, rows: int) -> Factored:
        """Return the moment whose first rows have these numbers, of a parameter of so many rows."""
        flat = self.row.new_zeros(rows)
        flat[: len(row)] = row.to(flat.dtype)
        before, after = self.row.mean(), flat.mean()
        ratio = torch.where((before > 0) & (after > 0), after / before, 1.0)
        return Factored(flat.view(-1, *self.row.shape[1:]), self.column * ratio, self.column_key)


State = MutableMapping[str, Any]
Moment = torch.Tensor | EightBit | Factored

FOLLOW = "AdamW, Adam, SGD, Adafactor, CAME, Prodigy, Lion, Muon or an 8-bit AdamW"  # some that do, for messages
_COPIES = "_ardlora_copies"

# They step on parts or copies of the parameters, or let processes differ.
_DISTRIBUTED = {
    "ZeroRedundancyOptimizer": "it partitions its state over the processes; adapters are small, give each process all",
    "PostLocalSGDOptimizer": "it lets the processes differ between averages, and so would their ranks",
    "DeepSpeedOptimizer": "it (ZeRO-1, 2 and 3) steps on flat partitions of the parameters; use "
    "DistributedDataParallel, or ardlora_ext.fully_shard(model) (FSDP2)",
    "CPUOffloadOptimizer": f"it steps on copies of the parameters elsewhere; use {FOLLOW}",
}


def outermost(optimizer: Any) -> Optimizer:
    """Return the torch optimizer that a loop steps, without wrappers that are none themselves, such as Accelerate's.

    Raises:
        TypeError: there is none.
        ValueError: it is one that partitions parameters or state over processes.
    """
    seen = optimizer
    while True:
        kinds = [kind.__name__.removesuffix("Wrapper") for kind in type(seen).__mro__]  # Accelerate's wrappers
        name = next((kind for kind in kinds if kind in _DISTRIBUTED), None)
        if name is not None:
            raise ValueError(f"attach: optimizer must not be {name}: {_DISTRIBUTED[name]}")
        if isinstance(seen, Optimizer) and type(seen).__name__ != "AcceleratedOptimizer":
            return seen
        seen = getattr(seen, "optimizer", None)
        if seen is None:
            raise TypeError(f"attach: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the torch optimizer that updates the parameters: of one inside another (SAM, Lookahead), the inner one.

    Raises as `outermost` does.
    """
    seen = outermost(optimizer)
    while True:
        inner = [value for value in vars(seen).values() if isinstance(value, Optimizer) and value is not seen]
        if len(inner) != 1:
            return seen
        seen = inner[0]


def moments(optimizer: Optimizer, parameter: torch.nn.Parameter, state: State | None = None) -> dict[str, Moment]:
    """Return what of the state of `parameter` [rows, width] moves with its rows, by key; tensors as [rows, any].

    All tensors are contiguous.

    Args:
        optimizer: whose state it is.
        parameter: of the optimizer.
        state: that of `parameter`, for callers who have looked it up.

    Raises:
        ValueError: some state has no place for a row, so it cannot follow a rank change.
    """
    shape = parameter.shape
    found: dict[str, Moment] = {}
    for key, value in (optimizer.state.get(parameter, {}) if state is None else state).items():
        if type(value) is not torch.Tensor:
            if not (value is None or isinstance(value, (int, float))):
                return _any_moments(optimizer, parameter)
        elif value.shape == shape and value.dtype is not torch.uint8 and value.is_contiguous():
            found[key] = value
        elif value.numel() != 1:
            return _any_moments(optimizer, parameter)
    return found


def _any_moments(optimizer: Optimizer, parameter: torch.nn.Parameter) -> dict[str, Moment]:
    """Return the same of state in any form that is known."""
    state = optimizer.state[parameter]
    rows, width = parameter.shape
    found: dict[str, Moment] = {**eight_bit.find(state), **_find_factored(state, rows, width)}
    done = {part for key in found for part in eight_bit.parts(key)}
    done |= {moment.column_key for moment in found.values() if isinstance(moment, Factored)}
    for key, value in state.items():
        if key in done or value is None or isinstance(value, (int, float, bool)):
            continue
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"rank change: optimizer state '{key}' of {type(optimizer).__name__} must be a tensor or a number, got "
                f"{type(value).__name__}"
            )
        if is_traceable_wrapper_subclass(value):
            raise ValueError(
                f"rank change: optimizer state '{key}' of {type(optimizer).__name__} must be plain or 8-bit, got "
                f"{type(value).__name__}"
            )
        shape = tuple(value.shape)
        of_row, of_column = shape in ((rows, 1), (rows,)), shape in ((1, width), (width,))
        if of_row and of_column:
            of_row, of_column = _elsewhere(optimizer, key)
        if (of_row or shape in ((rows, width), (rows * width,))) and value.is_contiguous():
            found[key] = value.view(rows, -1)
        elif value.numel() > 1 and not of_column:
            raise ValueError(
                f"rank change: optimizer state '{key}' of {type(optimizer).__name__} must have an entry per weight, "
                f"row or column of {[rows, width]}, got {list(shape)}; use {FOLLOW}"
            )
    return found


def _find_factored(state: Mapping[str, Any], rows: int, width: int) -> dict[str, Factored]:
    """Return the factored moments among the optimizer state of a parameter [rows, width], by the key of their rows."""
    found = {}
    for key, row in state.items():
        partner = key.replace("row", "col")
        column = state.get(partner)
        if partner == key or not (isinstance(row, torch.Tensor) and isinstance(column, torch.Tensor)):
            continue
        if row.numel() == len(row) == rows and column.numel() == column.shape[-1] == width:
            found[key] = Factored(row, column, partner)
    return found


def _elsewhere(optimizer: Optimizer, key: str) -> tuple[bool, bool]:
    """Tell whether a vector of a square parameter has an entry per row, or per column: as in one that is not square."""
    for parameter, state in optimizer.state.items():
        if parameter.dim() == 2 and key in state and parameter.shape[0] != parameter.shape[1]:
            return state[key].numel() == parameter.shape[0], state[key].numel() == parameter.shape[1]
    return False, False


def stored(state: State, key: str, moment: Moment) -> dict[str, Any]:
    """Return the entries of a parameter's state that put what `moments` returned, with other rows, where it was."""
    if isinstance(moment, EightBit):
        return eight_bit.stored(state, key, moment)
    if isinstance(moment, Factored):
        return {key: moment.row, moment.column_key: moment.column}
    return {key: moment.view(-1) if state[key].dim() == 1 else moment}


Coded = list[tuple[dict[str, Any], torch.nn.Parameter, str, EightBit, list[int]]]  # new state, of whom, key, plan


def store_coded(optimizer: Optimizer | None, coded: Coded) -> None:
    """Add to the new entries of each parameter's state its 8-bit moments with other rows, all in one go."""
    moved = eight_bit.gathered([moment for *_, moment, _ in coded], [plan for *_, plan in coded])
    for (state, parameter, key, *_), moment in zip(coded, moved, strict=True):
        assert optimizer is not None
        state |= stored(optimizer.state[parameter], key, moment)


def remember_copies(optimizer: Optimizer, keys: set[str]) -> None:
    """Note which state is a copy of the weights (Prodigy's `p0`, a schedule-free `z`): new rows begin as theirs do."""
    setattr(optimizer, _COPIES, keys)


def copied(optimizer: Optimizer) -> set[str]:
    """Return the keys of state that is a copy of the weights."""
    found: set[str] = getattr(optimizer, _COPIES, set())
    return found


def copies(optimizer: Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Return the state of `parameter` that is a copy of it, [rows, width], by key."""
    keys = copied(optimizer)
    if not keys:
        return {}
    state = optimizer.state.get(parameter, {})
    found = {key: state[key] for key in keys if key in state}
    return {key: value.view(parameter.shape) for key, value in found.items() if value.numel() == parameter.numel()}


def restart(optimizer: Optimizer) -> None:
    """Forget all state: every moment and step count of every parameter, as a fresh optimizer would."""
    optimizer.state.clear()


def settle_loss_scale(optimizer: Optimizer) -> bool:
    """Unscale gradients before a fused optimizer would inside its step, so that a controller reads true ones.

    `torch.amp.GradScaler` leaves scale and verdict on such optimizers; others get unscaled gradients, or no step.

    Returns:
        Whether the step will be skipped, because a gradient is not finite.
    """
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if found_inf is not None and bool(found_inf):
        return True
    if scale is not None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        by_device = {device: [g for g in grads if g.device == device] for device in {g.device for g in grads}}
        with unbroken():
            for device, here in by_device.items():
                torch._foreach_div_(here, scale.to(device))
            optimizer.grad_scale = None  # type: ignore[attr-defined]
    return False


def pin_lr(optimizer: Optimizer) -> None:
    """Let every step run at the peak learning rate from now on, whatever a scheduler writes.

    The scheduler's value is back in the groups after each step, so schedulers and logs go on as before.
    """
    if getattr(optimizer, "_ardlora_pinned", False):
        return
    scheduled: list[Any] = []

    def before(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if not scheduled:  # not in `pin_lr`: it is called by a post-hook, while torch goes through them
            optimizer.register_step_post_hook(after)
        scheduled[:] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])

    def after(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for group, lr in zip(optimizer.param_groups, scheduled, strict=True):
            group["lr"] = lr

    optimizer.register_step_pre_hook(before)
    optimizer._ardlora_pinned = True  # type: ignore[attr-defined]


def check_optimizer(optimizer: Optimizer, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Check that `optimizer` trains every adapter parameter and that the state it has can follow rank changes.

    Raises:
        ValueError: it holds none or only some of them, or keeps state that cannot be remapped.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = list(parameters)
    missing = [n for n, p in named if id(p) not in held]
    if missing:
        count = "none" if len(missing) == len(named) else f"{len(named) - len(missing)} of {len(named)}"
        example = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"attach: optimizer must hold the adapter parameters, got {count} of them (missing: {example}); "
            "build it after ardlora_ext.wrap(model, ...)"
        )
    for _, parameter in named:
        if parameter.dim() == 2:  # magnitudes have no rows
            moments(optimizer, parameter)


def loraplus_param_groups(
    model: torch.nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return parameter groups for LoRA+ (arXiv:2402.12354): lora_B learns `ratio` times as fast as everything else.

    Args:
        model: a wrapped model.
        lr: learning rate of lora_A, other adapter parameters and `modules_to_save`.
        ratio: eta_B / eta_A; 16 in the paper.
        weight_decay: of both groups.

    Returns:
        [everything else, lora_B], each `{"params", "lr", "weight_decay"}`, for any torch optimizer.

    Raises:
        ValueError: the model is not wrapped, or a value is out of range.

    Example:
        optimizer = torch.optim.AdamW(ard.loraplus_param_groups(model, lr=2e-4))
    """
    injection(model)
    for name, value in (("lr", lr), ("ratio", ratio)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"loraplus_param_groups: {name} must be > 0, got {value}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"loraplus_param_groups: weight_decay must be >= 0, got {weight_decay}")
    fast = [layer.lora_B for layer in adapters(model).values() if layer.lora_B.requires_grad]
    known = {id(p) for p in fast}
    slow = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [(slow, lr), (fast, lr * ratio)]
    return [{"params": params, "lr": rate, "weight_decay": weight_decay} for params, rate in groups if params]
