"""Threads that share a model, and others that save, load and train beside them: bits as of one after the other."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext.bench.trust.beds import CONFIGS, Block, Tally, build

_SWITCH = 1e-5  # seconds after which Python lets another thread run: as often as it can
_THREADS = 3


def _gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(model(x.tanh()).square().sum(), [x, *trained], allow_unused=True))


class Threads:
    """Gradients on a shared model, and models that others train, save and load meanwhile, are those of one thread."""

    def __init__(self, folder: Path, tally: Tally) -> None:
        self.folder, self.tally = folder, tally

    def case(self, rng: random.Random) -> None:
        """Run a few threads at once."""
        name = rng.choice(sorted(CONFIGS))
        model, _ = build(CONFIGS[name], steps=3)
        inputs = [torch.randn(5, 16, generator=torch.Generator().manual_seed(i)) for i in range(_THREADS)]
        expected = [_gradients(model, x) for x in inputs]
        ard.save_pretrained(model, self.folder / name)
        own, work = [build(CONFIGS[name]) for _ in range(2)], list[Callable[[], bool]]()
        for x, wanted in zip(inputs, expected, strict=True):
            work.append(lambda x=x, wanted=wanted: _same(_gradients(model, x), wanted))  # type: ignore[misc]
        work.append(lambda: self._saved(model, name))
        trained = _trained(*own[0])
        wrong: list[str] = []

        def repeat(check: Callable[[], bool], times: int, what: str) -> None:
            try:
                for _ in range(times):
                    if not check():
                        wrong.append(f"{name}: {what}: other bits")
                        return
            except Exception as error:
                wrong.append(f"{name}: {what}: {error!r}")

        whats = [*(f"gradients {i}" for i in range(_THREADS)), "save and load"]
        threads = [threading.Thread(target=repeat, args=(w, 15, what)) for w, what in zip(work, whats, strict=True)]
        again: list[list[torch.Tensor]] = []
        threads.append(threading.Thread(target=lambda: again.append(_trained(*own[1]))))
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(before)
        self.tally.failures += wrong
        self.tally.check(len(again) == 1 and _same(again[0], trained), f"{name}: another model's training")
        self.tally.counts["passes beside others"] += 15 * _THREADS
        self.tally.counts["saves and loads beside them"] += 15

    def _saved(self, model: nn.Module, name: str) -> bool:
        ard.save_pretrained(model, self.folder / name)
        found = ard.load_pretrained(Block(), self.folder / name)
        pairs = zip(ard.adapters(model).values(), ard.adapters(found).values(), strict=True)
        return all(a.ranks == b.ranks and torch.equal(a.lora_B, b.lora_B) for a, b in pairs)


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Take steps, with rank changes, on a model of its own."""
    for t in range(8):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(t))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]
