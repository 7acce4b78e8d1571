"""Stop what changes a model at one line, one tensor operation, or by Ctrl-C: it is as it was, or as it should be."""

from __future__ import annotations

import itertools
import random
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

import ardlora_ext as ard
from ardlora_ext import unbroken
from ardlora_ext.bench.trust.beds import CONFIGS, Block, Tally, build, observed, save_all
from ardlora_ext.bench.trust.faults import Injected, Operations
from ardlora_ext.model.record import injection
from ardlora_ext.native.transfers import Fetched
from ardlora_ext.ranks import resize

_PACKAGE = str(Path(ard.__file__).parent)
_OWN = {str(Path(unbroken.__file__)), str(Path(__file__))}  # where signals are held, and this file


@dataclass
class Bed:
    """A model, what steps on it, and a change that is about to be made."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    change: Callable[[], object]

    def seen(self, identity: bool = False) -> dict[str, object]:
        """Return all that can be seen; with `identity` also of which objects they are."""
        return observed(self.model, self.optimizer, identity)


def _random_update(model: nn.Module, rng: random.Random) -> ard.RankUpdate:
    modules = {}
    for name, layer in ard.adapters(model).items():
        order = rng.sample(range(max(layer.ranks)), max(layer.ranks))
        kept = [tuple(k for k in order if k < r)[: rng.randint(0, r)] for r in layer.ranks]
        if layer.layout.shared:  # a common order: the shortest prefix that all have
            least = min(layer.ranks)
            kept = [tuple(k for k in order if k < least)[: len(k)] for k in kept]
        modules[name] = tuple(ard.UnitUpdate(k, rng.randint(0, layer.max_rank - len(k))) for k in kept)
    return ard.RankUpdate(modules, seed=rng.randrange(99), init="unit" if _trained(model) else "zero")


def _trained(model: nn.Module) -> bool:
    return any(layer.lora_E is not None for layer in ard.adapters(model).values())


def _backward(model: nn.Module) -> None:
    model(torch.linspace(-1, 1, 64).view(4, 16)).square().mean().backward()


def _rank_change(rng: random.Random) -> Bed:
    model, optimizer = build(CONFIGS[rng.choice(("ard", "ela", "dora"))], steps=rng.randrange(3))
    if rng.random() < 0.5:
        _backward(model)
    update = _random_update(model, rng)
    return Bed(model, optimizer, lambda: resize.apply(model, update, optimizer))


def _decision(rng: random.Random) -> Bed:
    name = rng.choice(("ard", "ela", "ada"))
    model, optimizer = build(CONFIGS[name], steps=rng.choice((11, 13, 15, 40, 43)))
    controller = injection(model).controller
    if rng.random() < 0.3:
        return Bed(model, optimizer, controller.finalize)
    _backward(model)
    controller.observe()
    if name != "ard":  # its averages take in a step in place, in one native call
        controller.importance.update = lambda: Fetched([])
    return Bed(model, optimizer, lambda: controller.carry_out(controller.propose))


def _trained_bed(rng: random.Random, names: tuple[str, ...] = ("ard", "ela", "dora", "saved", "half")) -> Bed:
    model, optimizer = build(CONFIGS[rng.choice(names)], steps=3)
    injection(model).controller.finalize()
    return Bed(model, optimizer, lambda: None)


def _merge(rng: random.Random) -> Bed:
    bed, how = _trained_bed(rng), rng.choice(("merge", "merge_adapter", "unmerge_adapter", "unwrap"))
    if how == "unmerge_adapter":
        ard.merge_adapter(bed.model)
    bed.change = lambda: getattr(ard, how)(bed.model)
    return bed


def _compress(rng: random.Random) -> Bed:
    bed = _trained_bed(rng, ("ard", "ela", "dora"))
    ranks = {name: [max(0, r - 1) for r in layer.ranks] for name, layer in ard.adapters(bed.model).items()}
    if rng.random() < 0.5:
        bed.change = lambda: ard.svd_prune(bed.model, ranks, bed.optimizer)
    else:
        bed.change = lambda: ard.compress(bed.model, 0.6, optimizer=bed.optimizer)
    return bed


def _wrap(rng: random.Random) -> Bed:
    model, config = Block(), CONFIGS[rng.choice(sorted(CONFIGS))]
    if rng.random() < 0.5:
        return Bed(model, None, lambda: ard.wrap(model, config))
    ard.wrap(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return Bed(model, optimizer, lambda: ard.attach(model, optimizer, total_steps=60))


def _named(rng: random.Random) -> Bed:
    bed = _trained_bed(rng)
    other, how = CONFIGS[rng.choice(("dora", "saved", "ela"))], rng.choice(("add", "set", "delete", "rest", "disable"))
    if how != "add":
        ard.add_adapter(bed.model, "other", other)
    changes: dict[str, Callable[[], object]] = {
        "add": lambda: ard.add_adapter(bed.model, "other", other),
        "set": lambda: ard.set_adapter(bed.model, "other"),
        "delete": lambda: ard.delete_adapter(bed.model, "default"),
        "rest": lambda: ard.delete_adapter(bed.model, "other"),
        "disable": lambda: _disabled(bed.model),
    }
    bed.change = changes[how]
    return bed


def _disabled(model: nn.Module) -> None:
    with ard.disable_adapter(model):
        model(torch.ones(1, 16))


KINDS: dict[str, Callable[[random.Random], Bed]] = {
    "rank change": _rank_change,
    "decision": _decision,
    "merge": _merge,
    "compress": _compress,
    "wrap": _wrap,
    "named": _named,
}


class Lines:
    """Do something at line number `stop` of the package, or only count lines."""

    def __init__(self, stop: int | None, act: Callable[[FrameType], bool]) -> None:
        self.seen, self.stop, self.act = 0, stop, act
        self.places: dict[tuple[CodeType, int], tuple[int, int]] = {}  # of each line, its first and last number

        self._tracers = self._call, self._line  # the interpreter does not keep them while they raise

    def __enter__(self) -> Lines:
        sys.settrace(self._tracers[0])
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, _argument: Any) -> Any:
        return self._tracers[1] if frame.f_code.co_filename.startswith(_PACKAGE) else None

    def _line(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line" and frame.f_code.co_filename != __file__:
            if self.stop is not None and self.seen >= self.stop and self.act(frame):
                self.stop = None
            if self.stop is None:
                place = frame.f_code, frame.f_lineno
                self.places[place] = self.places.get(place, (self.seen,))[0], self.seen
            self.seen += 1
        return self._tracers[1]


def _raise(frame: FrameType) -> bool:
    """Raise where something can fail: not while signals are held, nor where that begins and ends."""
    if unbroken.holding() or frame.f_code.co_filename in _OWN:
        return False
    raise Injected


def _interrupt(_frame: FrameType) -> bool:
    signal.raise_signal(signal.SIGINT)
    return True


def _differing(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)][:4]


class Changes:
    """A change that is stopped has happened whole or not at all, and can be made again."""

    def __init__(self, folder: Path, tally: Tally) -> None:
        self.tally = tally

    def case(self, rng: random.Random) -> None:
        """Stop one change once."""
        kind, seed = rng.choice(sorted(KINDS)), rng.randrange(10**9)
        how = rng.choice(("operation", "line", "Ctrl-C"))
        if threading.current_thread() is not threading.main_thread():
            how = "line" if how == "Ctrl-C" else how
        change = Change(self.tally, f"{kind} {seed}", lambda: KINDS[kind](random.Random(seed)))
        counter = change.whole(how)
        change.stop(how, rng.randrange(max(1, counter.seen)))


class Interrupts:
    """Ctrl-C at every line of the package that a change or a load runs: when it comes there first, and last.

    Each case is the next line; after the last one of a change comes the next change.
    """

    def __init__(self, folder: Path, tally: Tally) -> None:
        self.folder, self.tally = folder, tally
        save_all(folder)
        self._left: list[int] = []
        self._change: Change | None = None
        self._kinds = itertools.cycle([*LOADS, *KINDS])

    def case(self, rng: random.Random) -> None:
        """Interrupt the change under way at its next line."""
        if self._change is None or not self._left:
            kind, seed = next(self._kinds), rng.randrange(10**9)
            self._change = Change(self.tally, f"{kind} {seed}", lambda: self._bed(kind, random.Random(seed)))
            counter = self._change.whole("Ctrl-C")
            assert isinstance(counter, Lines)
            self._left = sorted({at for place in counter.places.values() for at in place}, reverse=True)
            self.tally.counts[f"{kind}: lines of the package"] = len(counter.places)
        self._change.stop("Ctrl-C", self._left.pop())

    def _bed(self, kind: str, rng: random.Random) -> Bed:
        if kind in KINDS:
            return KINDS[kind](rng)
        name = rng.choice(sorted(CONFIGS))
        if kind == "load_state":
            model, optimizer = build(CONFIGS[name], steps=1)
            return Bed(model, optimizer, lambda: ard.load_state(model, optimizer, self.folder / name))
        if kind == "load_pretrained":
            base = Block()
            return Bed(base, None, lambda: ard.load_pretrained(base, self.folder / name))
        base, config = Block(), ard.DoraConfig(r=8) if name == "dora" else ard.ArdConfig(mode="paper", r0=8)
        return Bed(base, None, lambda: ard.load_peft(base, self.folder / name, config))


LOADS = ("load_state", "load_pretrained", "load_peft")


class Change:
    """A change that can be made anew on an equal model: once whole, then stopped somewhere."""

    def __init__(self, tally: Tally, name: str, make: Callable[[], Bed]) -> None:
        self.tally, self.name, self.make = tally, name, make
        self.after: dict[str, object] = {}
        self.count = 0
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell starts jobs

    def whole(self, how: str) -> Operations | Lines:
        """Make it; return what has counted the places where it can be stopped."""
        twin = self._made()
        counter: Operations | Lines = Operations(None) if how == "operation" else Lines(None, _raise)
        with counter:
            twin.change()
        self.after, self.count = twin.seen(), counter.seen
        return counter

    def _made(self) -> Bed:
        torch.manual_seed(0)  # the generators are looked at as well
        torch.set_grad_enabled(True)  # torch leaves it off where a signal meets no_grad() on its way in
        return self.make()

    def stop(self, how: str, at: int) -> None:
        """Stop it at this place and check what is left."""
        bed = self._made()
        before, content = bed.seen(identity=True), bed.seen()
        act = _interrupt if how == "Ctrl-C" else _raise
        stopper: Any = Operations(at) if how == "operation" else Lines(at, act)
        raised = False
        with suppress(Injected, KeyboardInterrupt), stopper:
            raised = True
            bed.change()
            raised = False
        name = f"{self.name}, {how} {at} of {self.count}"
        found, unchanged = bed.seen(), bed.seen(identity=True) == before
        self.tally.check(
            unchanged or found == self.after,
            f"{name}: half changed: {_differing(found, content)} done, {_differing(found, self.after)} not",
        )
        self.tally.check(raised or not unchanged or self.after == content, f"{name}: returned and did nothing")
        if how == "operation":
            self.tally.check(not stopper.allocated, f"{name}: allocates where it may not: {stopper.allocated[:3]}")
        held = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        self.tally.check(not held or how != "Ctrl-C", f"{name}: Ctrl-C is held for good")
        if unchanged and self.after != content:
            bed.change()
            found = bed.seen()
            self.tally.check(found == self.after, f"{name}: {_differing(found, self.after)} are others the second time")
        self.tally.counts[f"{how}: {'as before' if unchanged else 'done'}"] += 1
