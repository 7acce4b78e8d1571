"""The NEON kernels, cross-compiled and run under an emulator where both are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("aarch64-linux-gnu-g++") or shutil.which("aarch64-linux-gnu-g++-12")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


@pytest.mark.skipif(COMPILER is None or EMULATOR is None, reason="needs aarch64-linux-gnu-g++ and qemu-aarch64")
def test_neon_agrees_with_the_scalar_kernels(tmp_path: Path) -> None:
    sources = [
        *CSRC.glob("core/*.cpp"),
        *CSRC.glob("cpu/*.cpp"),
        CSRC / "cpu/isa/scalar.cpp",
        CSRC / "cpu/isa/neon.cpp",
    ]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-static", "-DARDLORA_HAVE_NEON"]
    program = tmp_path / "isa"
    includes = [f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    command = [str(COMPILER), *flags, *includes, str(CSRC / "testing/isa_main.cpp"), *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True)
    done = subprocess.run([str(EMULATOR), str(program)], check=False, capture_output=True, text=True)
    assert done.stdout == "neon scalar agree\n", done.stdout
