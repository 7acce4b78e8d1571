"""Kill a process that saves in a loop, with others beside it that load all the time."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import ardlora_ext as ard
from ardlora_ext.bench.trust.beds import CONFIGS, Block, Tally, build, sign, signatures
from ardlora_ext.checkpoint.peft_read import read_peft

_READERS = 2


class Kills:
    """Every load finds one whole save, and after the kill the last one that returned, or the one that was under way."""

    def __init__(self, folder: Path, tally: Tally) -> None:
        torch.set_num_threads(1)  # a process is forked for each case
        self.tally = tally
        self.folders = {kind: folder / kind for kind in ("pretrained", "state")}
        self.model, self.optimizer = build(CONFIGS["ard"])

    def case(self, rng: random.Random) -> None:
        """Fork a writer and readers, kill the writer at a random moment, and look at what is left."""
        kind = rng.choice(sorted(self.folders))
        folder = self.folders[kind]
        shutil.rmtree(folder, ignore_errors=True)
        self._save(kind, 0)
        receive, send = os.pipe()
        writer = _fork(lambda: self._write(kind, send))
        os.close(send)
        readers = [_fork(lambda: self._read(kind)) for _ in range(_READERS)]
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        with os.fdopen(receive, "rb") as pipe:
            acknowledged = len(pipe.read())
        unsettled = [path.name for path in folder.iterdir() if path.suffix in (".staged", ".commit")]
        try:
            found = self._load(kind)
        except Exception as error:
            found = {repr(error)}  # type: ignore[arg-type]
        self.tally.check(
            found in ({acknowledged}, {acknowledged + 1}), f"{kind}: {acknowledged} saves returned, found {found}"
        )
        for reader in readers:
            os.kill(reader, signal.SIGTERM)
            code = os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])
            self.tally.check(code == 0, f"{kind}: a reader beside the writer ended with {code}")
        self._save(kind, -1)
        left = [path.name for path in folder.iterdir() if path.suffix in (".staged", ".commit")]
        self.tally.check(not left and self._load(kind) == {-1}, f"{kind}: the next save left {left}")
        self.tally.counts["kills"] += 1
        self.tally.counts["saves"] += acknowledged
        self.tally.counts["kills inside a save"] += bool(unsettled)
        self.tally.counts["kills after its commit"] += any(name.endswith(".commit") for name in unsettled)

    def _save(self, kind: str, number: int) -> None:
        sign(self.model, self.optimizer, number)
        if kind == "state":
            ard.save_state(self.model, self.optimizer, self.folders[kind])
        else:
            ard.save_pretrained(self.model, self.folders[kind])

    def _load(self, kind: str) -> set[float]:
        """Return the signatures of what is there: one, if it is whole."""
        if kind == "state":
            model, optimizer = build(CONFIGS["ard"])
            ard.load_state(model, optimizer, self.folders[kind])
            return signatures(model, optimizer)
        return signatures(ard.load_pretrained(Block(), self.folders[kind]))

    def _write(self, kind: str, acknowledge: int) -> None:
        for number in range(1, sys.maxsize):
            self._save(kind, number)
            os.write(acknowledge, b".")

    def _read(self, kind: str) -> None:
        ended: list[int] = []
        signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
        while not ended:
            if len(self._load(kind)) != 1:
                os._exit(2)  # of two saves
            if kind == "pretrained":
                read_peft(self.folders[kind], "trust")


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"trust: {error!r}", file=sys.stderr)
        finally:
            os._exit(code)
    return child
