"""Try rank changes on a throw-away copy of an optimizer before it trains, so that a wrong one is not found mid-run.

The copy has the class, options and attributes of the real one and holds a copy of one adapter. It takes steps on random
gradients, follows ranks up and down, and goes on. The real optimizer, its parameters and torch's generators stay
untouched.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.ranks import resize
from ardlora_ext.ranks.eight_bit import placed
from ardlora_ext.ranks.optimizer import FOLLOW, moments, remember_copies, unwrapped
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate

_STEPS, _STEPS_AROUND = 3, 12  # after a rank change; of an optimizer around another, more than Lookahead's period
_LR = 0.01
_NOT_COPIED = {"step", "grad_scale", "found_inf"}  # a scheduler's wrapper of the real step; what a loss scaler left
_LARGE = 2**20


def rehearse(optimizer: Optimizer, layers: Mapping[str, LoraLinear]) -> None:
    """Check that ranks can change between the steps of `optimizer`, the outermost one.

    An optimizer whose copy cannot step at all (it wants a graph of gradients) is let through if there is no other one
    inside: `attach` looks at its state after its first real step.

    Raises:
        ValueError: they cannot, or its step is none that a controller could follow.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layer = next((a for a in layers.values() if all(id(p) in held for p in a.factors.values())), None)
    if layer is None:
        return
    devices = list({p.device for p in layer.factors.values() if p.is_cuda})
    with torch.random.fork_rng(devices), torch.no_grad(), _eager():
        double = _double(layer)
        try:
            stand_ins = {id(p): double.factors[name] for name, p in layer.factors.items()}
            stage = _Stage(double, _copied(optimizer, stand_ins, {}))
            does_something = stage.begin()
        except NotImplementedError:  # LOMO
            does_something = False
        except Exception as cause:  # whatever a stranger's code raises
            if unwrapped(optimizer) is optimizer:
                return
            raise ValueError(_refusal(optimizer, f"a copy cannot take a step, {_line(cause)}")) from cause
        if not does_something:
            raise ValueError(_refusal(optimizer, "its step does nothing (does it update weights during backward?)"))
        try:
            stage.change_ranks()
        except Exception as cause:
            raise ValueError(_refusal(optimizer, _line(cause))) from cause
    remember_copies(unwrapped(optimizer), stage.copies)


def _eager() -> AbstractContextManager[None]:
    """Let no optimizer compile its step for a trial; torch before 2.6 cannot."""
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


def _refusal(optimizer: Optimizer, why: str) -> str:
    inner = unwrapped(optimizer)
    name = type(optimizer).__name__ + ("" if inner is optimizer else f" around {type(inner).__name__}")
    return f"attach: optimizer must follow rank changes, got {name}: {why}; use {FOLLOW}"


def _line(cause: Exception) -> str:
    said = (str(cause).splitlines() or [""])[0].removesuffix(f"; use {FOLLOW}").removeprefix("rank change: ")
    return said if isinstance(cause, ValueError) and said else f"{type(cause).__name__}: {said}"


def _copied(value: Any, stand_ins: Mapping[int, nn.Parameter], memo: dict[int, Any]) -> Any:
    """Copy an optimizer, or what belongs to one, with stand-ins for some parameters and without the others."""
    if id(value) in memo:
        return memo[id(value)]
    found: Any = value  # anything else is shared
    if isinstance(value, Optimizer):
        found = memo[id(value)] = object.__new__(type(value))
        for key, part in vars(value).items():
            if key not in _NOT_COPIED:
                hooks = isinstance(part, OrderedDict) and key.endswith("_hooks")
                vars(found)[key] = OrderedDict() if hooks else _copied(part, stand_ins, memo)
    elif isinstance(value, nn.Parameter):
        found = stand_ins.get(id(value))
    elif isinstance(value, torch.Tensor) and value.numel() <= _LARGE:
        found = placed(value, value.clone())
    elif isinstance(value, torch.Generator):
        found = torch.Generator(value.device).set_state(value.get_state())
    elif type(value) in (dict, defaultdict):
        found = memo[id(value)] = value.__class__(*([value.default_factory] if isinstance(value, defaultdict) else []))
        for key, part in value.items():
            left_out = isinstance(key, nn.Parameter) and id(key) not in stand_ins
            if not left_out:
                found[_copied(key, stand_ins, memo)] = _copied(part, stand_ins, memo)
    elif type(value) is list:
        found = memo[id(value)] = []
        parts = [part for part in value if not isinstance(part, nn.Parameter) or id(part) in stand_ins]
        found += [_copied(part, stand_ins, memo) for part in parts]
        if value and isinstance(value[0], dict) and "params" in value[0]:
            found[:] = [group for group in found if group["params"]]
    elif type(value) is tuple:
        found = tuple(_copied(part, stand_ins, memo) for part in value)
    return found


def _live(double: LoraLinear) -> dict[str, torch.Tensor]:
    """Return the live rows of each factor."""
    rows = dict(zip(("lora_A", "lora_B"), double.layout.rows(double.ranks), strict=True))
    rows["lora_E"] = sum(double.ranks)
    return {name: p.data[: rows[name]] for name, p in double.factors.items()}


def _double(layer: LoraLinear) -> LoraLinear:
    """Copy the factors of a layer, without base layer and hooks; weights at zero would look like moments."""
    double = object.__new__(type(layer))
    nn.Module.__init__(double)
    vars(double).update({key: value for key, value in vars(layer).items() if key not in vars(nn.Module())})
    double.rank_table = layer.rank_table.clone()
    for name, parameter in layer.factors.items():
        double.register_parameter(name, nn.Parameter(parameter.detach().clone()))
    if layer.lora_E is None:
        double.register_parameter("lora_E", None)
    double.register_buffer("lora_gate", None if layer.lora_gate is None else layer.lora_gate.clone())
    for rows in _live(double).values():
        rows.copy_(torch.randn_like(rows))
    return double


class _Stage:
    """A copied adapter and a copied optimizer that trains it."""

    def __init__(self, double: LoraLinear, trial: Optimizer) -> None:
        self.double, self.trial, self.inner = double, trial, unwrapped(trial)
        self.copies: set[str] = set()  # state that is the weight itself
        self._closure = False  # whether `step` wants one

    def _gradients(self) -> torch.Tensor:
        with torch.no_grad():
            for name, rows in _live(self.double).items():
                parameter = self.double.factors[name]
                parameter.grad = torch.zeros_like(parameter)
                parameter.grad[: len(rows)] = torch.randn_like(rows)
        return torch.zeros(())

    def _step(self) -> None:
        self._gradients()
        if self._closure:
            self.trial.step(self._gradients)  # type: ignore[arg-type]
        else:
            self.trial.step()

    def begin(self) -> bool:
        """Take the first step; tell whether it did anything."""
        for group in self.trial.param_groups:
            lr = group.get("lr", _LR)  # a warm-up may begin at 0
            group["lr"] = torch.full_like(lr, _LR) if isinstance(lr, torch.Tensor) else _LR
        before = {name: rows.clone() for name, rows in _live(self.double).items()}
        try:
            self._step()
        except Exception:  # LBFGS, SAM
            self._closure = True
            self._step()
        after = _live(self.double)
        return bool(self.inner.state) or any(not torch.equal(rows, before[name]) for name, rows in after.items())

    def change_ranks(self) -> None:
        """Grow and shrink ranks between steps."""
        self._find_copies()
        for grow in (True, False):
            ranks = [(r, min(2 * r + 1, self.double.max_rank) if grow else max(r // 2, 1)) for r in self.double.ranks]
            units = tuple(UnitUpdate(tuple(range(min(r, new))), max(new - r, 0)) for r, new in ranks)
            resize.apply(self.double, RankUpdate({"": units}), self.inner)
            for _ in range(_STEPS if self.inner is self.trial else _STEPS_AROUND):
                self._step()
        if not all(torch.isfinite(rows).all() for rows in _live(self.double).values()):
            raise ValueError("weights are not finite after a rank change")

    def _find_copies(self) -> None:
        """Note the state that is nearer to the weight than half the weight's norm."""
        weight = self.double.lora_A.detach().float()
        for key, value in moments(self.inner, self.double.lora_A).items():
            if not isinstance(value, torch.Tensor) or value.shape != weight.shape:
                continue
            if bool((value.float() - weight).norm() < 0.5 * weight.norm()):
                self.copies.add(key)
        remember_copies(self.inner, self.copies)
