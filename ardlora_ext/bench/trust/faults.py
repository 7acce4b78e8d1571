"""Let an operation fail: each file operation of a save, each tensor operation of a load."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ardlora_ext as ard
from ardlora_ext import unbroken
from ardlora_ext.bench.trust.beds import CONFIGS, Block, Tally, build, fingerprint, save_all, sign, signatures

_OPERATIONS = ((os, "replace"), (os, "unlink"), (os, "open"), (os, "listdir"), (os, "fsync"), (io, "open"))
_NUMBERS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT)


class Injected(BaseException):
    """Stands for whatever may be raised, Ctrl-C included: nobody knows it."""


class FileFaults:
    """A save whose n-th file operation fails leaves the old set or the new one, as its message says, and no more."""

    def __init__(self, folder: Path, tally: Tally) -> None:
        self.folder, self.tally = folder / "saved", tally
        self.model, self.optimizer = build(CONFIGS["ard"])

    def case(self, rng: random.Random) -> None:
        """Save once, then save with a fault."""
        state = rng.random() < 0.5
        shutil.rmtree(self.folder, ignore_errors=True)
        self._save(state, 1)
        step, number = rng.randrange(30), rng.choice(_NUMBERS)
        error = rng.choice((OSError(number, os.strerror(number)), Injected()))
        once, message, raised = rng.random() < 0.5, "", False
        with failing_files(step, error, once):
            try:
                self._save(state, 2)
            except (OSError, Injected) as caught:
                raised, message = True, str(caught)
        found = self._load(state)
        if isinstance(error, OSError):
            wanted = {1.0} if "no file was replaced" in message else {2.0}
            self.tally.check(found == wanted, f"step {step}: {found} after {message!r}")
        self.tally.check(found in ({1.0}, {2.0}), f"step {step}: {found}")
        self.tally.check(raised or found == {2.0}, f"step {step}: the save returned, and {found} is there")
        self._save(state, 3)
        left = [path.name for path in self.folder.iterdir() if path.suffix in (".staged", ".commit")]
        self.tally.check(self._load(state) == {3.0} and not left, f"step {step}: the next save left {left}")
        self.tally.counts["faults"] += raised
        self.tally.counts["saves"] += 1

    def _save(self, state: bool, number: int) -> None:
        sign(self.model, self.optimizer, number)
        if state:
            ard.save_state(self.model, self.optimizer, self.folder)
        else:
            ard.save_pretrained(self.model, self.folder)

    def _load(self, state: bool) -> set[float]:
        if not state:
            return signatures(ard.load_pretrained(Block(), self.folder))
        model, optimizer = build(CONFIGS["ard"])
        ard.load_state(model, optimizer, self.folder)
        return signatures(model, optimizer)


@contextmanager
def failing_files(step: int, error: BaseException, once: bool) -> Iterator[None]:
    """Let file operation `step`, or it and all that follow, raise `error`."""
    left = [step]

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == -1 or (left[0] < -1 and not once):
                raise error
            return call(*args, **kwargs)

        return operation

    with ExitStack() as stack:
        for owner, name in _OPERATIONS:
            stack.enter_context(mock.patch.object(owner, name, failing(getattr(owner, name))))
        yield


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raise `Injected` at one tensor operation that can fail; note what allocates where nothing may."""

    def __init__(self, stop: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen, self.stop = 0, stop
        self.allocated: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = unbroken.holding()
        if not held:
            self.seen += 1
            if self.stop is not None and self.seen > self.stop:
                self.stop = None
                raise Injected
        out = func(*args, **(kwargs or {}))
        if held:
            given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.numel()]
            self.allocated += [str(func) for t in made if _storage(t) not in given]
        return out


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class LoadFaults:
    """A load that is stopped at its n-th tensor operation has changed nothing."""

    def __init__(self, folder: Path, tally: Tally) -> None:
        self.folder, self.tally = folder, tally
        save_all(folder)

    def case(self, rng: random.Random) -> None:
        """Stop one load."""
        name = rng.choice(sorted(CONFIGS))
        what = rng.choice(("load_state", "load_pretrained", "load_peft"))
        model, optimizer = build(CONFIGS[name], steps=rng.randrange(3)) if what == "load_state" else (Block(), None)
        before = fingerprint(model, optimizer)
        with suppress(Injected):
            with Operations(rng.randrange(400)):
                self._load(what, name, model, optimizer)
            self.tally.counts["loads that ended before"] += 1
            return
        self.tally.counts[what] += 1
        self.tally.check(fingerprint(model, optimizer) == before, f"{what} of {name} changed something")
        self._load(what, name, model, optimizer)  # and can be tried again

    def _load(self, what: str, name: str, model: nn.Module, optimizer: Any) -> None:
        if what == "load_state":
            ard.load_state(model, optimizer, self.folder / name)
        elif what == "load_pretrained":
            ard.load_pretrained(model, self.folder / name)
        else:
            dora, ard_lora = ard.DoraConfig(r=8), ard.ArdConfig(mode="paper", r0=8, granularity="matrix")
            ard.load_peft(model, self.folder / name, dora if name == "dora" else ard_lora)
