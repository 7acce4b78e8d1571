"""Timing in turns: all candidates run once per round, in an order that rotates, so that drift of the machine hits all
of them alike and cancels in differences and ratios taken round by round.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ardlora_ext.bench.stats import median_spread

Floats = NDArray[np.float64]
_SAMPLE_SECONDS = 2e-3  # a sample repeats a short call until it is this long
CLOCKS = {"wall": "perf_counter", "cpu": "process_time"}  # by which function of `time`


@dataclass(frozen=True)
class Times:
    """Seconds per call of every candidate, [rounds] each; index i of all of them was taken in round i."""

    seconds: Mapping[str, Floats]

    def spread(self, name: str) -> tuple[float, float, float]:
        """Return the median and the 10 % and 90 % quantiles."""
        return median_spread(list(self.seconds[name]))

    def ratio(self, name: str, to: str) -> float:
        """Return the median over the rounds of time(name) / time(to)."""
        return float(np.median(self.seconds[name] / self.seconds[to]))

    def difference(self, name: str, to: str) -> float:
        """Return the median over the rounds of time(name) - time(to)."""
        return float(np.median(self.seconds[name] - self.seconds[to]))


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Declare `--clock`."""
    words = "wall time, or this process's own of all its threads: for one thread on a machine that others use, too"
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help=f"{words} (default: wall)")


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, label: str, clock: str = "wall") -> Times:
    """Time every call `rounds` times after one warm-up each; a bar named `label` shows the progress."""
    repeats = max(_repeats(call) for call in calls.values())
    names = list(calls)
    seconds = {name: np.zeros(rounds) for name in names}
    for i in tqdm(range(rounds), desc=label, unit="round", leave=False, disable=None):  # None: only on a terminal
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name][i] = _time(calls[name], repeats, clock)
    return Times(seconds)


def _time(call: Callable[[], object], repeats: int, clock: str = "wall") -> float:
    now: Callable[[], float] = getattr(time, CLOCKS[clock])
    began = now()
    for _ in range(repeats):
        call()
    return (now() - began) / repeats


def _repeats(call: Callable[[], object]) -> int:
    call()
    return max(1, math.ceil(_SAMPLE_SECONDS / max(_time(call, 1), 1e-7)))
