"""The checks of .pre-commit-config.yaml, run here too: a tool that is not installed is a skip that says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.documents import ROOT


def files(*patterns: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


PYTHON = ["ardlora_ext", "python_tests", "examples"]
CHECKS = {
    "ruff check": ["ruff", "check", "--no-cache", *PYTHON],
    "ruff format": ["ruff", "format", "--check", "--no-cache", *PYTHON],
    "mypy --strict": ["mypy"],
    "clang-format": [
        "clang-format",
        "--dry-run",
        "-Werror",
        *files("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.inl", "csrc/**/*.cu", "csrc/**/*.cuh"),
    ],
    "cmake-format": ["cmake-format", "--check", *files("CMakeLists.txt", "cmake/*.cmake")],
}


@pytest.mark.parametrize("name", CHECKS)
def test_style(name: str, tmp_path: Path) -> None:
    tool, *arguments = CHECKS[name]
    found = shutil.which(tool, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{tool} is not installed: pip install 'ardlora_ext[lint]'")
    environment = {**os.environ, "MYPY_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([found, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
