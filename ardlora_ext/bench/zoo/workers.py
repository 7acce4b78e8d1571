"""Cases in processes of their own: what hangs is ended, what takes too much memory ends itself."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import torch
import transformers

from ardlora_ext.bench.zoo.journey import FAIL, UNKNOWN, Outcome, travel

_MEMORY = 8 << 30  # bytes of address space
_CASES = 60  # of one process: what transformers imports is never given back


def outcomes(kinds: Sequence[str], seconds: float) -> Iterator[tuple[str, Outcome]]:
    """Yield each model type and what became of it, in order; none takes longer than `seconds`."""
    context = multiprocessing.get_context("spawn")
    ours, process = None, None
    for number, kind in enumerate(kinds):
        if process is None or ours is None:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            ours.recv()  # it has imported everything
        ours.send(kind)
        try:
            answer = ours.recv() if ours.poll(seconds) else Outcome(UNKNOWN, "-", "-", f"longer than {seconds:.0f} s")
            late = answer.word.startswith("longer than")
        except EOFError:
            answer, late = Outcome(FAIL, "-", "-", "the process ended"), True
        if late or number % _CASES == _CASES - 1:
            process.kill()
            process.join()
            ours, process = None, None
        yield kind, answer
    if process is not None and ours is not None:
        ours.send(None)
        process.join()


def _work(connection: Connection) -> None:
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115 - until this process ends
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    connection.send(None)
    while (kind := connection.recv()) is not None:
        connection.send(travel(kind))
