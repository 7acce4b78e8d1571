"""Random calls of the core, on every instruction set, in memory that ends where nobody may touch it, or without."""

from __future__ import annotations

import ctypes
import json
import mmap
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ardlora_ext.bench.trust.beds import Tally
from ardlora_ext.native.compiled import core

_SIZE, _PAGE = 1 << 18, mmap.PAGESIZE
_BEFORE = 64  # bytes in front of each buffer that must stay
_MARK = 0xA5
_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # by code
_BYTES = (4, 2, 2)
_ROUNDING = (2e-5, 1.6e-2, 2e-3)  # of results, relative to the largest
_CALLS = (20_000, 160_000)  # of the first process, and of later ones, where starting costs more than calling

Bytes = NDArray[np.uint8]
Found = tuple[
    Bytes, int, int, int
]  # a result, its dtype code, that of the coarsest rounding, how many of those it adds
View = tuple[int, int, int, int, int]  # what the core takes: address, rows, columns, row stride, dtype code


class Slot:
    """Memory for one buffer at a time, which ends where a page begins that can be neither read nor written."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, _SIZE + _PAGE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(self._address + _SIZE), _PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self._all: Bytes = np.frombuffer(self._map, np.uint8, _SIZE)
        self._length = 0

    def put(self, data: Bytes) -> int:
        """Place bytes; return their address."""
        self._length = len(data)
        begin = _SIZE - self._length
        self._all[begin - _BEFORE : begin] = _MARK
        self._all[begin:] = data
        return self._address + begin

    @property
    def data(self) -> Bytes:
        """What is in the buffer now, a copy."""
        found: Bytes = self._all[_SIZE - self._length :].copy()
        return found

    @property
    def intact(self) -> bool:
        """Whether nothing was written in front of it."""
        begin = _SIZE - self._length
        return bool((self._all[begin - _BEFORE : begin] == _MARK).all())


class Fuzz:
    """Random calls, each on an instruction set of this machine and again on the scalar kernels."""

    def __init__(self, rng: random.Random, tally: Tally) -> None:
        self.rng, self.tally = rng, tally
        self.slots = [Slot() for _ in range(16)]
        self.isas = core.available_isas()
        values = torch.rand(_SIZE // 4, generator=torch.Generator().manual_seed(rng.randrange(99))) * 2 - 1
        self.noise = [values.to(dtype).view(torch.uint8).numpy() for dtype in _TYPES]
        self._used = 0

    def run(self, calls: int) -> None:
        """Make this many native calls."""
        what = [(self.lora, 4), (self.resize, 2), (self.passes, 8)]
        try:
            while calls > 0:
                call, count = self.rng.choice(what)
                state = self.rng.getstate()
                results = []
                for isa in (self.rng.choice(self.isas), "scalar"):
                    core.set_isa(isa)
                    self.rng.setstate(state)
                    results.append((isa, call()))
                    self.tally.check(all(slot.intact for slot in self.slots[: self._used]), f"{isa}: writes in front")
                self._compare(call.__name__, *results)
                calls -= count
                self.tally.counts["native calls"] += count
        finally:
            core.set_isa("")

    def _compare(self, what: str, one: tuple[str, list[Found]], other: tuple[str, list[Found]]) -> None:
        for place, ((got, dtype, coarse, terms), (wanted, *_)) in enumerate(zip(one[1], other[1], strict=True)):
            a, b = (_numbers(data, dtype) for data in (got, wanted))
            bound = _ROUNDING[coarse] * terms**0.5 * max(1.0, float(np.abs(b).max(initial=0.0)))
            off = float(np.abs(a - b).max(initial=0.0))
            self.tally.check(off <= bound, f"{what}, result {place}: {one[0]} and scalar kernels differ by {off:.3g}")

    def pick(self, *values: int) -> int:
        return self.rng.choice(values)

    def buffer(self, rows: int, cols: int, dtype: int = 0, padding: int = 0) -> tuple[View, Slot]:
        """Return a matrix of noise in a slot of its own."""
        stride = cols + padding
        length = 0 if rows == 0 else ((rows - 1) * stride + cols) * _BYTES[dtype]
        begin = self.rng.randrange(64) * _BYTES[dtype]
        slot = self.slots[self._used]
        self._used += 1
        return (slot.put(self.noise[dtype][begin : begin + length]), rows, cols, stride, dtype), slot

    def lora(self) -> list[Found]:
        """Forward and backward of any table, dtype, gate, dropout and number of threads."""
        self._used = 0
        rng, pick = self.rng, self.pick
        kind = rng.randrange(3)
        units = 1 if kind == 0 else pick(1, 2, 4)
        ranks = [pick(0, 1, 2, 3, 7, 8, 9, 17) for _ in range(units)]
        table = core.UnitTable(kind, rng.randrange(2), units * pick(1, 5, 16, 43), units * pick(1, 3, 32, 45), ranks)
        k, n = (units if kind == 2 else 1) * table.a_width, (units if kind == 1 else 1) * table.b_width
        dtype = rng.randrange(3)
        adapter, m, padding, slack = rng.choice((0, dtype)), pick(0, 1, 2, 9, 33), pick(0, 0, 3), pick(0, 0, 4)
        x, _ = self.buffer(m, k, dtype, padding)
        dy, _ = self.buffer(m, n, dtype, padding)
        a, _ = self.buffer(table.a_rows + slack, table.a_width, adapter)
        b, _ = self.buffer(table.b_rows + slack, table.b_width, adapter)
        h, _ = self.buffer(m, table.hidden)
        dh = self.buffer(m, table.hidden)[0][0] if m % 2 else 0  # 0: scratch of the core's own
        y, out_y = self.buffer(m, n, dtype, padding)
        dx, out_dx = self.buffer(m, k, dtype, padding)
        da, out_a = self.buffer(table.a_rows + slack, table.a_width)
        db, out_b = self.buffer(table.b_rows + slack, table.b_width)
        gated = table.a_rows if table.gate_on_a else table.b_rows
        gate, _ = self.buffer(1, gated)
        dgate, out_gate = self.buffer(1, gated)
        with_gate = rng.random() < 0.5 and gated > 0
        threads, dropout, seed = pick(1, 1, 2), rng.choice((0.0, 0.3)), rng.randrange(1 << 40)
        first, last = (gate[0], dgate[0]) if with_gate else (0, 0)
        native = core.LoraAdapter(table, a, b, first, 0.5)
        of_x, of_y, of_dy, of_dx = ((view[0], view[2], view[3]) for view in (x, y, dy, dx))
        kept = h[0], table.hidden
        core.lora_forward(native, m, dtype, of_x, *kept, of_y, threads, dropout, seed)
        core.lora_backward(native, m, dtype, of_x, *kept, of_dy, dh, of_dx, da[0], db[0], last, threads, dropout, seed)
        found = [(out_y, dtype, 1), (out_dx, dtype, 1), (out_a, 0, m), (out_b, 0, m)]  # factors' add up the rows
        width = table.a_width if table.gate_on_a else table.b_width  # a gate's gradient adds up a row of a factor's
        found += [(out_gate, 0, width)] if with_gate else []
        return [(slot.data, code, dtype, terms) for slot, code, terms in found]

    def resize(self) -> list[Found]:
        """Rows that move in place, and into another buffer; compared with what the plan says."""
        self._used = 0
        rows, room, cols = self.pick(0, 1, 2, 9), self.pick(0, 1, 4, 12), self.pick(1, 3, 16)
        order = self.rng.sample(range(rows), rows)
        plans = [[s if self.rng.random() < 0.7 else -1 for s in order], [*order, *[-1] * room][:room]]
        (source, *_), here = self.buffer(rows, cols)
        (target, *_), there = self.buffer(room, cols)
        before = here.data.reshape(rows, 4 * cols)
        moves = [(source, target, 4 * cols, rows, 1), (source, source, 4 * cols, rows, 0)]
        core.rank_resize(np.array(moves[:1], dtype=np.int64), plans, 2)
        core.rank_resize(np.array(moves[1:], dtype=np.int64), plans, 2)
        for slot, plan in ((there, plans[1]), (here, plans[0])):
            wanted = [before[s] if s >= 0 else np.zeros(4 * cols, np.uint8) for s in plan]
            self.tally.check(
                slot.data.tobytes() == b"".join(row.tobytes() for row in wanted), "rank_resize: other rows"
            )
        return [(here.data, 0, 0, 1), (there.data, 0, 0, 1)]

    def passes(self) -> list[Found]:
        """The passes over factors and gradients that feed the controllers."""
        self._used = 0
        dtype, rows, cols = self.rng.randrange(3), self.pick(0, 1, 3, 8), self.pick(1, 2, 15, 16, 17, 70)
        (weight, *_), _ = self.buffer(rows, cols, dtype)
        (grad, *_), pulled = self.buffer(rows, cols, dtype)
        (mean, *_), sensitivity = self.buffer(rows, cols)
        (spread, *_), uncertainty = self.buffer(rows, cols)
        (others, *_), _ = self.buffer(rows, cols)
        (fresh, *_), started = self.buffer(new := self.pick(0, 1, 2), cols)
        (gate, *_), gates = self.buffer(1, rows)
        threads = self.pick(1, 2)
        dots = core.row_dots(np.array([[weight, grad, rows, cols]], dtype=np.int64), dtype, threads)
        block = np.array([[weight, grad, mean, spread, rows, cols, dtype]], dtype=np.int64)
        core.importance(block, 0.85, 0.9, threads)
        pull = np.array([[weight, grad, rows, cols, dtype]], dtype=np.int64)
        core.soft_orthogonality(pull, np.array([0.1]), self.rng.random() < 0.5, threads)
        kept = [i for i in range(rows) if self.rng.random() < 0.5 and rows + new <= cols]
        core.orthogonal_rows(np.array([[others, rows, cols, fresh, new]], dtype=np.int64), [kept], [0.5], threads)
        rho = np.array([self.rng.uniform(0.0, 9.0)])
        core.set_gates(np.array([[gate, rows]], dtype=np.int64), rho, self.rng.randrange(4), 0.05, 0.5)
        found = [(pulled, dtype), (sensitivity, 0), (uncertainty, 0), (gates, 0)]
        if new <= 1:  # of several, the later ones lean on roundings of the earlier
            found.append((started, 0))
        return [(dots.view(np.uint8), 0, dtype, 1), *((slot.data, code, dtype, 1) for slot, code in found)]


def _numbers(data: Bytes, dtype: int) -> NDArray[np.float32]:
    if dtype == 1:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(np.float16).astype(np.float32) if dtype == 2 else data.view(np.float32)


def starved(tally: Tally) -> None:
    """Call kernels where memory has run out: a MemoryError, nothing changed, and the next call works (Linux)."""
    import resource

    table = core.UnitTable(0, 0, 4096, 4096, [64])
    x, a, b, h, y = (
        np.ones(shape, np.float32) for shape in ((512, 4096), (64, 4096), (64, 4096), (512, 64), (512, 4096))
    )

    of_a, of_b = ((array.ctypes.data, 64, 4096, 4096, 0) for array in (a, b))
    adapter = core.LoraAdapter(table, of_a, of_b, 0, 1.0)
    of_x, of_y = ((array.ctypes.data, 4096, 4096) for array in (x, y))

    def forward() -> None:
        core.lora_forward(adapter, 512, 0, of_x, h.ctypes.data, 64, of_y, 1, 0.3, 1)

    moves = np.array([(x.ctypes.data, x.ctypes.data, 1 << 21, 4, 0)], dtype=np.int64)
    calls: list[Callable[[], None]] = [forward, lambda: core.rank_resize(moves, [[1, 0, 3, 2]], 1)]
    x[:] = np.arange(512, dtype=np.float32)[:, None]
    before, limits = (x.copy(), y.copy()), resource.getrlimit(resource.RLIMIT_AS)
    for call in calls:
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * _PAGE
        resource.setrlimit(resource.RLIMIT_AS, (used, limits[1]))
        try:
            call()
            failed = False
        except MemoryError:
            failed = True
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        tally.counts["calls without memory"] += failed
        unchanged = bool((x == before[0]).all() and (y == before[1]).all())
        tally.check(unchanged or not failed, "a call without memory changed something")
        call()
        x[:], y[:] = before


class Native:
    """Each case is a process, so that a crash is a finding and not the end."""

    def __init__(self, folder: Path, tally: Tally) -> None:
        self.tally, self.calls = tally, _CALLS[0]

    def case(self, rng: random.Random) -> None:
        """Make many calls in a process of their own."""
        words = [
            "-W",
            "ignore",
            "-c",
            "import sys; from ardlora_ext.bench.trust.native import report; report(*sys.argv[1:])",
        ]
        command = [sys.executable, *words, str(rng.randrange(10**9)), str(self.calls)]
        self.calls = _CALLS[1]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            self.tally.failures.append(f"{' '.join(command[-2:])} ended with {done.returncode}: {done.stderr[-300:]}")
            return
        found = json.loads(done.stdout.splitlines()[-1])
        self.tally.counts.update(found["counts"])
        self.tally.failures += found["failures"][:5]


def report(seed: str, calls: str) -> None:
    """Fuzz in this process and print what was found."""
    tally = Tally()
    starved(tally)
    Fuzz(random.Random(int(seed)), tally).run(int(calls))
    print(json.dumps({"counts": tally.counts, "failures": tally.failures}))
