"""What the hunts share: a tally, a small model whose saves can be told apart, and everything observable about it."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

import ardlora_ext as ard


@dataclass
class Tally:
    """What a hunt has seen: counts by name, and a sentence for each thing that should not be."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def check(self, holds: bool, failure: str) -> None:
        """Note a failure unless what was promised holds."""
        if not holds:
            self.failures.append(failure)


class Hunt(Protocol):
    """One way to try the package: `case` is called again and again with another seed."""

    def __init__(self, folder: Path, tally: Tally) -> None: ...

    def case(self, rng: random.Random) -> None:
        """Try one thing, and note it."""


class Block(nn.Module):
    """A block that a wrap takes as it is."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view(parameter.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return something of the size of `x`."""
        out: torch.Tensor = self.down(torch.relu(self.up(x + torch.tanh(self.q_proj(x)))))
        return out


CONFIGS: dict[str, ard.AdapterConfig] = {
    "ard": ard.ArdConfig(r0=3, update_interval=2),
    "ard-paper": ard.ArdConfig(mode="paper", r0=3, r_max=8, update_interval=2),
    "ela": ard.ElaConfig(r=3, b=1, deltaT=2),
    "dora": ard.DoraConfig(r=3),
    "pissa": ard.LoraConfig(r=3, init="pissa"),
    "saved": ard.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["down"]),
    "ada": ard.AdaConfig(init_r=4, target_r=2, tinit=4, tfinal=20, deltaT=2),
    "half": ard.LoraConfig(r=3, init="orthogonal"),
}


def build(config: ard.AdapterConfig, steps: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a wrapped and attached model that has trained for some steps, and its optimizer."""
    torch.manual_seed(0)
    model = ard.wrap(Block(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ard.attach(model, optimizer, total_steps=None if isinstance(config, ard.LoraConfig) else 60)
    for _ in range(steps):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save_all(folder: Path) -> None:
    """Write a checkpoint and a resume point of every config, each into the folder of its name."""
    for name, config in CONFIGS.items():
        model, optimizer = build(config, steps=5)
        ard.save_pretrained(model, folder / name)
        ard.save_state(model, optimizer, folder / name)


def sign(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Make a save of this model recognisable: every factor and the optimizer's options hold `number`."""
    with torch.no_grad():
        for layer in ard.adapters(model).values():
            layer.lora_B[: sum(layer.ranks)] = float(number)
    for group in optimizer.param_groups:
        group["signed"] = number


def signatures(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> set[float]:
    """Return the numbers that a loaded model holds: one, if it is of one save."""
    layers = ard.adapters(model).values()
    found = {float(v) for layer in layers for v in layer.lora_B.detach()[: sum(layer.ranks)].reshape(-1).tolist()}
    return found | ({float(group["signed"]) for group in optimizer.param_groups} if optimizer else set())


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str:
    """Return a digest of `observed`."""
    return hashlib.sha256(repr(observed(model, optimizer)).encode()).hexdigest()


def observed(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, identity: bool = True
) -> dict[str, object]:
    """Return all that can be seen of a model, its optimizer, its controller and the random generators, bit for bit.

    With `identity` also of which objects these are.
    """
    found: dict[str, object] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            data = value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
            value = (str(value.dtype), list(value.shape), data)
        found[name] = value

    for name, value in model.state_dict().items():
        add(name, value)
    for name, parameter in model.named_parameters():
        add(f"{name} itself", (id(parameter) if identity else 0, parameter.requires_grad))
        add(f"{name} gradient", parameter.grad)
    for name, layer in ard.adapters(model).items():
        add(f"{name} ranks", (layer.rank_table.tolist(), list(layer.ranks), layer.undo_merge is None))
    add("modules", [(name, type(module).__name__) for name, module in model.named_modules()])
    add("own", sorted(vars(model)))
    record = getattr(model, "_ardlora", None)
    if record is not None:
        controller = record.controller
        add("record", (id(record) if identity else 0, record.started, json.dumps(record.controller_state)))
        add("controller", "" if controller is None else json.dumps(controller.state_dict()))
        for adapter, other in record.named.items():  # those at rest too
            trains = None if other is record else other.trains  # what it was when it last rested
            add(f"adapter {adapter}", (other is record, other.requires_grad, trains, sorted(other.values)))
            held = [*other.values.values(), *(t for layer in other.layers for t in layer.trained.values())]
            for i, value in enumerate(held):
                add(f"adapter {adapter} {i}", value)
    if optimizer is not None:
        for i, group in enumerate(optimizer.param_groups):
            add(f"group {i}", {key: item for key, item in group.items() if key != "params"})
            for j, parameter in enumerate(group["params"]):
                for key, item in optimizer.state.get(parameter, {}).items():
                    add(f"state {i} {j} {key}", item)
        numbers = torch.get_rng_state().numpy().tobytes()
        generator = np.random.get_state(legacy=False)
        add("generators", repr((numbers, random.getstate(), _bare(generator))))
    return found


def _bare(generator: Any) -> list[object]:
    """Return numpy's state with its array as bytes."""
    inner = generator["state"]
    return [inner["key"].tobytes(), inner["pos"], generator["has_gauss"], generator["gauss"]]
