"""Builds the programs of csrc/testing, which run the CUDA kernels on the host, plain and under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
MODES = {
    "plain": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-fsanitize=thread"],
    "quick": ["-O0"],  # to compile
}


def build(folder: Path, mode: str, sources: Sequence[str], csrc: Path = CSRC, *flags: str) -> Path:
    """Compile `sources` of `csrc` with the engine of the shim into one program; skip where that cannot be."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler at run time")
    if not csrc.is_dir():
        pytest.skip("needs the source tree")
    command = [compiler, "-std=c++20", "-g1", f"-I{csrc}", f"-I{csrc / 'include'}"]
    engine, program = folder / "simt.o", folder / f"{Path(sources[0]).stem}_{mode}"
    if not engine.exists():  # never with a sanitizer
        _run([*command, "-O2", "-fPIC", "-c", str(csrc / "testing/simt.cpp"), "-o", str(engine)])
    files = [str(csrc / source) for source in sources]
    _run([*command, *MODES[mode], *flags, str(engine), "-x", "c++", *files, "-o", str(program)])
    return program


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program; the caller looks at its exit code."""
    env = {**os.environ, **environment}
    return subprocess.run([str(program), *arguments], env=env, capture_output=True, text=True, check=False)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("the compiler has no such sanitizer")
    assert done.returncode == 0, done.stderr
