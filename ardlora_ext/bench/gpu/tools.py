"""Stages that run other programs: the build, the project's tests, compute-sanitizer, Nsight Compute."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ardlora_ext.bench.gpu import build
from ardlora_ext.bench.gpu.context import HOST_RUN, Context, Skipped, build_host_run
from ardlora_ext.bench.gpu.shapes import SMALL, TOOLS, make
from ardlora_ext.bench.machine import Json, source_tree
from ardlora_ext.native.compiled import core

_TESTS = ("native/cuda/test_cuda_ops.py", "native/cuda/test_cuda_resize.py", "bench/test_bench_kernels_cuda.py")
_SHOWN = 3000  # characters of what a program said
_OURS = "regex:shrink|expand|outer|sum_shares|gate"
_METRICS = "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum"


def built(context: Context) -> Iterator[Json]:
    """Have kernels for this GPU: of the build that runs, else made now; in a rehearsal those that run on the host."""
    began = time.perf_counter()
    if context.dry:
        build_host_run(context.out / HOST_RUN)
    elif core.cuda_problem(0):
        with tempfile.TemporaryDirectory() as folder:
            build.build(Path(folder), build.architecture())
    seconds = time.perf_counter() - began
    yield {"case": "kernels for this device", "ok": True, "build_seconds": seconds}


def tests(context: Context) -> Iterator[Json]:
    """The project's own tests, those on a GPU alone; a rehearsal only finds them."""
    tree = source_tree()
    if tree is None:
        raise Skipped("there is no source tree beside the package or where one works")
    files = [str(tree / "python_tests" / name) for name in _TESTS]
    wanted = ["--collect-only"] if context.dry else ["-k", "cuda or on_a_device"]
    code, said = _said(
        [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *wanted, *files]
    )
    yield {"case": said.strip().splitlines()[-1] if said.strip() else "pytest", "ok": code == 0, "said": said[-_SHOWN:]}


def sanitizer(context: Context) -> Iterator[Json]:
    """Our kernels under compute-sanitizer: bounds and races that no comparison sees."""
    tool = _tool("compute-sanitizer")
    if tool is None and not context.dry:
        raise Skipped("there is no compute-sanitizer")
    for check in ("memcheck", "racecheck"):
        before = [] if context.dry else [str(tool), "--tool", check, "--error-exitcode", "9"]
        code, said = _said([*before, *_shapes(context)])
        yield {"case": check, "ok": code == 0, "said": said[-_SHOWN:]}
        if context.dry:
            return


def ncu(context: Context) -> Iterator[Json]:
    """Time and DRAM bytes of each launch, as Nsight Compute counts them."""
    tool = _tool("ncu")
    if tool is None and not context.dry:
        raise Skipped("there is no ncu")
    if context.dry:  # the stage before has tried the process
        main([str(context.out), "--dry"])
        yield {"case": "ncu", "ok": True}
        return
    options = ["--clock-control", "none", "--metrics", _METRICS, "--csv", "--kernel-name", _OURS]
    code, said = _said([str(tool), *options, *_shapes(context)])
    yield {"case": "ncu", "ok": code == 0, "said": said[-40 * _SHOWN :]}


def _shapes(context: Context) -> list[str]:
    return [sys.executable, "-m", "ardlora_ext.bench.gpu.tools", str(context.out), *["--dry"] * context.dry]


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def _said(command: Sequence[str]) -> tuple[int, str]:
    """Return a program's exit code and what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=source_tree(), env=os.environ)
    print(done.stdout, done.stderr, sep="\n", flush=True)
    return done.returncode, done.stdout + done.stderr


def main(words: Sequence[str]) -> None:
    """Run every launch of a few shapes once: what the tools look at."""
    dry = "--dry" in words
    context = Context(torch.device("cpu" if dry else "cuda:0"), dry, Path(words[0]))
    for shape in SMALL[:2] if dry else TOOLS:
        call = make(shape, context.device)
        with context.kernels():
            call.run()
        context.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
