"""Stop a run anywhere between two optimizer steps and go on as if nothing had happened, in any training loop.

Two files, tensors and JSON, never pickle: what is trained (with its ranks, exact buffer sizes and gates), the
optimizer's state, the controller's, and the random generators of torch, numpy and Python. A crash while they are
written leaves the old pair or the new one. Several processes write one pair, which any number of them can read.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ardlora_ext import processes
from ardlora_ext.checkpoint.adapter_state import parse_tensors
from ardlora_ext.config.registry import config_to_dict
from ardlora_ext.errors import written_by_strangers
from ardlora_ext.file_set import read_set, write_set
from ardlora_ext.json_file import check_checksums, checksums, parse_json
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.layers.rows import fit_rows
from ardlora_ext.model.record import injection, uncompiled
from ardlora_ext.ranks import eight_bit
from ardlora_ext.ranks.optimizer import unwrapped
from ardlora_ext.unbroken import undone_by

RESUME, RESUME_TENSORS = "ardlora_resume.json", "ardlora_resume.safetensors"

_FORMAT = 2  # 1 had the generators of one process
_PLAIN = (bool, int, float, str, type(None))
Tensors = dict[str, torch.Tensor]


class Stateful(Protocol):
    """A scheduler, a gradient scaler, or anything else that a loop must remember."""

    def state_dict(self) -> Any:
        """Return plain numbers, strings, lists and dicts with string keys."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take over a state."""


def save_state(model: nn.Module, optimizer: Any, directory: str | Path, **others: Stateful) -> None:
    """Write all that `load_state` needs to go on bit for bit (on the CPU); call it between two optimizer steps.

    With several processes each of them calls it, the first one writes, and all wait until the files are there.

    Args:
        model: a wrapped model. Its frozen weights are not written.
        optimizer: the one given to `attach`.
        directory: where to write `ardlora_resume.json` and `ardlora_resume.safetensors`; made if missing.
        others: more to remember by name, e.g. `scheduler=scheduler, scaler=scaler`.

    Raises:
        ValueError: the model is not wrapped, or a state holds what JSON cannot.
        OSError: the directory cannot be written; the previous files are still there (the message tells).

    Example:
        ard.save_state(model, optimizer, "run/state", scheduler=scheduler)
    """
    model = uncompiled(model)
    record = injection(model)
    groups, numbers, tensors = _pack_optimizer(unwrapped(optimizer))
    tensors |= {f"model.{name}": value for name, value in moving_state(model).items()}
    generators = processes.gather((torch.get_rng_state(), {"python": random.getstate(), "numpy": _numpy_state()}))
    if processes.rank() > 0:
        processes.wait()
        return
    tensors |= {f"rng.torch.{i}": state for i, (state, _) in enumerate(generators)}
    data = save_tensors(tensors)
    state = {
        "format": _FORMAT,
        "config": config_to_dict(record.config),
        "controller": record.controller_state if record.controller is None else record.controller.state_dict(),
        "optimizer": {"kind": type(unwrapped(optimizer)).__name__, "groups": groups, "numbers": numbers},
        "others": {name: _checked(name, other.state_dict()) for name, other in others.items()},
        "rng": [others for _, others in generators],
    }
    state["sha256"] = checksums(state, RESUME, {RESUME_TENSORS: data})
    write_set(Path(directory), {RESUME_TENSORS: data, RESUME: json.dumps(state).encode()})
    processes.wait()


@torch.no_grad()
def load_state(model: nn.Module, optimizer: Any, directory: str | Path, **others: Stateful) -> None:
    """Bring a model, its optimizer and `others` to where `save_state` left them.

    The number of processes may be another one; those beyond the saved ones reuse their random generators.

    Make them first as the interrupted script did: `wrap`, the optimizer, and `attach` (before this call or after it).

    Args:
        model: wrapped with the same config.
        optimizer: of the same kind over the same parameters.
        directory: what `save_state` wrote.
        others: the names given to `save_state`.

    Raises:
        FileNotFoundError: there is no `ardlora_resume.json`.
        ValueError: the files are corrupt, or of another model, config or optimizer.
        Whatever is raised, by `others` too, and after Ctrl-C: nothing has changed then.
    """
    model = uncompiled(model)
    record, torch_optimizer = injection(model), unwrapped(optimizer)
    state, tensors = _read(Path(directory))
    values = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    must = f"load_state: {RESUME} must be one that save_state wrote for this run"
    with written_by_strangers(must):
        _check_model(model, state, values)
        unpacked = _unpack_optimizer(torch_optimizer, state["optimizer"], tensors)
        if set(others) != set(state["others"]):
            raise ValueError(f"load_state: others must be {sorted(state['others'])}, got {sorted(others)}")
        generators = _generators(state["rng"], tensors)

    with _all_or_nothing(model, torch_optimizer, others), written_by_strangers(must):
        try:
            model.load_state_dict(values, strict=False)
        except RuntimeError as cause:
            raise ValueError(f"load_state: ranks and factors must fit the model, got {cause}") from cause
        _fit_moments(torch_optimizer, unpacked["state"])
        torch_optimizer.load_state_dict(unpacked)
        record.started = True
        if record.controller is None:
            record.controller_state, record.resumed = state["controller"], True
        elif state["controller"]:
            record.controller.resume(state["controller"])
        for name, other in others.items():
            other.load_state_dict(state["others"][name])
        _set_generators(generators)


def _all_or_nothing(model: nn.Module, optimizer: Optimizer, others: Mapping[str, Stateful]) -> undone_by:
    """Bring everything back to where it is now if the `with` block fails or is interrupted."""
    record = injection(model)
    weights, gradients = moving_state(model), {p: p.grad for p in model.parameters()}
    state, groups = optimizer.state, optimizer.param_groups  # a load makes new ones
    entries = {p: dict(entry) for p, entry in state.items()}
    options = [dict(group) for group in groups]
    controller, kept = record.controller, (record.started, record.controller_state, record.resumed)
    decided = (lambda: None) if controller is None else controller.remember()
    remembered = {name: copy.deepcopy(other.state_dict()) for name, other in others.items()}
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def undo() -> None:
        model.load_state_dict(weights, strict=False)
        for p, gradient in gradients.items():
            p.grad = gradient
        optimizer.state, optimizer.param_groups = state, groups
        state.clear()
        state.update(entries)
        for group, options_then in zip(groups, options, strict=True):
            group.clear()
            group.update(options_then)
        record.started, record.controller_state, record.resumed = kept
        decided()
        for name, other in others.items():
            other.load_state_dict(remembered[name])
        _set_generators(generators)

    return undone_by(undo)


def _generators(saved: Any, tensors: Tensors) -> tuple[torch.Tensor, Any, Any]:
    """Return the states of torch's, Python's and numpy's generators for this process, each one tried out."""
    number = processes.rank() % len(saved)
    version, words, gauss = saved[number]["python"]
    found = tensors[f"rng.torch.{number}"], (version, tuple(words), gauss), tuple(saved[number]["numpy"])
    try:
        torch.Generator().set_state(found[0])
        random.Random().setstate(found[1])
        np.random.RandomState().set_state(found[2])
    except (RuntimeError, ValueError, TypeError) as cause:
        raise ValueError(f"load_state: rng in {RESUME} must be states of generators, got {cause}") from cause
    return found


def _set_generators(states: tuple[torch.Tensor, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def moving_state(model: nn.Module) -> Tensors:
    """Return copies of what training changes: trained parameters, buffers, and the ranks of adapters (extra state)."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    layers = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    quantised = tuple(f"{name}.base_layer." for name in layers)  # some keep their weight in buffers
    return {
        name: value.detach().clone().contiguous()
        for name, value in model.state_dict().items()
        if name not in frozen and not name.startswith(quantised) and isinstance(value, torch.Tensor)
    }


def _pack_optimizer(optimizer: Optimizer) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]], Tensors]:
    """Split the optimizer's state into groups and numbers, which are JSON, and tensors."""
    state = optimizer.state_dict()
    tensors: Tensors = {}
    numbers: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for index, entry in state["state"].items():
        numbers[str(index)] = {}
        for key, value in eight_bit.flattened(entry).items():
            if is_traceable_wrapper_subclass(value):
                raise ValueError(
                    f"save_state: optimizer state '{key}' must be plain tensors, got {type(value).__name__}; keep the "
                    "optimizer's state_dict with torch.save"
                )
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{key}"] = value.detach().clone().contiguous()
            else:
                numbers[str(index)][key] = _checked(f"optimizer state '{key}'", value)
    for i, group in enumerate(state["param_groups"]):
        groups.append({})
        for key, value in group.items():
            if isinstance(value, torch.Tensor):
                tensors[f"group.{i}.{key}"] = value.detach().clone()
            else:
                groups[i][key] = _checked(f"optimizer option '{key}'", value)
    return groups, numbers, tensors


def _unpack_optimizer(optimizer: Optimizer, saved: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """Rebuild what `optimizer.load_state_dict` takes."""
    now = [len(group["params"]) for group in optimizer.param_groups]
    then = [len(group["params"]) for group in saved["groups"]]
    if (type(optimizer).__name__, now) != (saved["kind"], then):
        raise ValueError(
            f"load_state: optimizer must be {saved['kind']} with groups of {then} parameters, got "
            f"{type(optimizer).__name__} with {now}"
        )
    state: dict[int, dict[str, Any]] = {int(index): dict(entry) for index, entry in saved["numbers"].items()}
    groups = []
    for group, entry in zip(optimizer.param_groups, saved["groups"], strict=True):
        tuples = {key for key, value in group.items() if isinstance(value, tuple)}  # JSON has lists only
        groups.append({key: tuple(value) if key in tuples else value for key, value in entry.items()})
    for name, value in tensors.items():
        owner, _, rest = name.partition(".")
        index, _, key = rest.partition(".")
        if owner == "optimizer":
            state[int(index)][key] = value
        elif owner == "group":
            groups[int(index)][key] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {index: eight_bit.unflattened(entry, parameters[index].dtype) for index, entry in state.items()}
    return {"state": entries, "param_groups": groups}


def _checked(name: str, value: Any) -> Any:
    """Return `value` if JSON gives it back (tuples as lists).

    Raises:
        ValueError: it does not.
    """
    if not _is_plain(value):
        raise ValueError(f"save_state: {name} must be plain numbers, strings, lists and dicts, got {value!r:.80}")
    return value


def _fit_moments(optimizer: Optimizer, state: Mapping[int, dict[str, Any]]) -> None:
    """Give moments the rows that their parameters have now: those past the live ones are zero."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entry in state.items():
        rows, *width = parameters[index].shape or (0,)
        for held in (entry, *(value for value in entry.values() if isinstance(value, dict))):
            for key, moment in eight_bit.find(held).items():
                had = len(moment.codes)
                if had != rows:
                    held |= eight_bit.stored(held, key, moment.gather([i if i < had else -1 for i in range(rows)]))
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and value.dim() > 1 and list(value.shape[1:]) == width:
                entry[key] = fit_rows(value, rows)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _numpy_state() -> list[Any]:
    kind, words, *rest = np.random.get_state(legacy=True)
    return [kind, np.asarray(words).tolist(), *rest]


def _read(directory: Path) -> tuple[dict[str, Any], Tensors]:
    files = read_set(directory, (RESUME, RESUME_TENSORS), RESUME)
    if RESUME not in files:
        raise FileNotFoundError(
            f"load_state: directory must hold {RESUME}, got '{directory}' without it; save_state writes it"
        )
    must = f"load_state: {RESUME} must be one that save_state wrote"
    with written_by_strangers(must):
        try:
            state: dict[str, Any] = parse_json(files[RESUME], RESUME)
        except ValueError as cause:
            raise ValueError(f"{must}, got {cause}") from cause
        version, _ = state["format"], state["sha256"]
        if version != _FORMAT:
            raise ValueError(f"load_state: format of {RESUME} must be {_FORMAT}, got {version}")
        try:
            check_checksums(state, RESUME, {RESUME_TENSORS: files.get(RESUME_TENSORS, b"")})
        except ValueError as cause:
            raise ValueError(f"load_state: {cause}") from cause
    return state, parse_tensors(files[RESUME_TENSORS], f"load_state: {RESUME_TENSORS}")


def _check_model(model: nn.Module, state: Mapping[str, Any], values: Tensors) -> None:
    """Check that a state fits the model before anything changes."""
    now = json.loads(json.dumps(config_to_dict(injection(model).config)))
    then = state["config"]
    differ = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    if differ:
        key = differ[0]
        raise ValueError(
            f"load_state: config must be the saved one, with {key}={then.get(key)!r}, got {now.get(key)!r}"
        )
    own = moving_state(model)
    missing = sorted(own.keys() ^ values.keys())
    if missing:
        raise ValueError(f"load_state: model must train what the saved one did, got a difference in '{missing[0]}'")
    for name, value in sorted(values.items()):
        rows = ".lora_" in f".{name}"  # these may have another number of rows, not another width
        mine = own[name].shape
        if (value.shape[1:] if rows else value.shape) != (mine[1:] if rows else mine):
            raise ValueError(f"load_state: '{name}' must have shape {list(value.shape)}, got {list(mine)}")
        if value.is_floating_point() != own[name].is_floating_point():
            raise ValueError(f"load_state: '{name}' must be {own[name].dtype} as in the model, got {value.dtype}")
