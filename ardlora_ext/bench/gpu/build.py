"""Build the core with the CUDA kernels of this machine's GPU alone. Needs no build of the core to run:

python ardlora_ext/bench/gpu/build.py && python -m ardlora_ext.bench gpu --out OUT
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]


class BuildError(Exception):
    """Something that a build needs is not there; the message says what."""


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def architecture() -> str:
    """Return the GPU's architecture as CMake names it, "90-real"."""
    capability = _said("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").splitlines()[0]
    return f"{capability.replace('.', '')}-real"


def commands(folder: Path, arch: str | None) -> list[list[str]]:
    """Return what configures, builds and installs into the source tree; without `arch`, without CUDA.

    Raises:
        BuildError: this file lies in no source tree, or a tool is missing.
    """
    if not (_ROOT / "CMakeLists.txt").is_file():
        raise BuildError(f"build: must run in the source tree, got a package in {_ROOT}")
    missing = [name for name in ("cmake", "ninja") if shutil.which(name) is None]
    missing += [] if find_spec("pybind11") else ["pybind11"]
    if missing:
        raise BuildError(f"build: needs {' and '.join(missing)} (pip install {' '.join(missing)})")
    pybind11 = _said(sys.executable, "-m", "pybind11", "--cmakedir")
    cuda = ["-DARDLORA_CUDA=OFF"] if arch is None else ["-DARDLORA_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={arch}"]
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}", *cuda]
    return [
        ["cmake", "-S", str(_ROOT), "-B", str(folder), "-G", "Ninja", *options],
        ["cmake", "--build", str(folder), "-j", str(os.cpu_count() or 1)],
        ["cmake", "--install", str(folder), "--prefix", str(_ROOT)],
    ]


def build(folder: Path, arch: str | None) -> None:
    """Run them; raises `subprocess.CalledProcessError` where one fails."""
    for command in commands(folder, arch):
        subprocess.run(command, check=True)


if __name__ == "__main__":
    build(_ROOT / "build" / "gpu", architecture())
