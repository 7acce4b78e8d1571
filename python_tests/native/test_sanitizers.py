"""The core without Python under sanitizers for memory, undefined behaviour and threads; their output is read."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ardlora_ext.native.compiled import core

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
COMMAND = [str(COMPILER), "-std=c++20", "-g1", "-O0", "-ffp-contract=off", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
COMMAND += ["-pthread", "-DARDLORA_STD_THREADS"]  # cpu/parallel.h
SANITIZERS = {"memory": ["-fsanitize=address,undefined"], "threads": ["-fsanitize=thread"]}
KERNELS = {"memory": ["-fsanitize=address,shift,signed-integer-overflow"], "threads": SANITIZERS["threads"]}  # in time
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
FLAGS = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
FAULTS = {
    "memory": {"past_end": "heap-buffer-overflow", "overflow": "runtime error: signed integer overflow"},
    "threads": {"race": "data race"},
}


def compiled(*arguments: str | Path) -> None:
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("the compiler has no such sanitizer")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    if COMPILER is None or not CSRC.is_dir():
        pytest.skip("needs a C++ compiler and the source tree")
    kind = str(request.param)
    folder, flags = tmp_path_factory.mktemp(kind), SANITIZERS[kind]
    best = next((isa for isa in core.available_isas() if isa in FLAGS), None)
    isas = ["scalar"] + ([best] if kind == "memory" and best is not None else [])
    for isa in isas:
        compiled(*KERNELS[kind], *FLAGS.get(isa, []), "-c", CSRC / f"cpu/isa/{isa}.cpp", "-o", folder / f"{isa}.o")
    sources = [CSRC / "testing/core_main.cpp", *CSRC.glob("core/*.cpp"), *CSRC.glob("cpu/*.cpp")]
    defined = [f"-DARDLORA_HAVE_{isa.upper()}" for isa in isas[1:]]
    compiled(*flags, *defined, *sources, *folder.glob("*.o"), "-o", folder / "core")
    return kind, folder / "core"


def run(path: Path, word: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(path), word], capture_output=True, text=True, check=False)


def test_nothing_is_reported(program: tuple[str, Path]) -> None:
    kind, path = program
    done = run(path, "40" if kind == "memory" else "25")
    assert done.stderr == ""
    assert done.stdout.endswith("scalar held\n")
    assert done.returncode == 0


def test_faults_are_reported(program: tuple[str, Path]) -> None:
    kind, path = program
    for fault, report in FAULTS[kind].items():
        assert report in run(path, fault).stderr, fault
