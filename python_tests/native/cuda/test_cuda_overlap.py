"""Launches that overlap: what nvcc makes of every kernel waits for the kernel before it touches memory or leaves."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ardlora_ext.native.compiled import core

from helpers.simt import CSRC

SOURCES = ("controller.cu", "launch.cu", "lora_linear.cu")
WAIT, NEXT = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
# What touches global memory (a generic access may), and what leaves or goes round the wait.
TOO_EARLY = re.compile(r"\b(?:(?:ld|st|atom|red)\.(?!param|shared)|cp\.async|prefetch|bra\b|ret;|exit;|call\b)")


def ptx(source: Path, arch: str, csrc: Path = CSRC) -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the PATH")
    command = [nvcc, f"-arch={arch}", "-std=c++17", "-ptx", f"-I{csrc}", f"-I{csrc / 'include'}", str(source)]
    done = subprocess.run([*command, "-o", "-"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernels(text: str) -> dict[str, list[str]]:
    """The instructions of each kernel."""
    found = {}
    for name, body in re.findall(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", text, re.DOTALL):
        lines = (line.partition("//")[0].strip() for line in body.splitlines())
        found[name] = [line for line in lines if line]
    return found


def faults(text: str) -> list[str]:
    """Kernels that do not wait first, or never let the next one come."""
    wrong = []
    for name, lines in kernels(text).items():
        at = next((i for i, line in enumerate(lines) if line.startswith(WAIT)), None)
        early = at is None or any(TOO_EARLY.search(line) for line in lines[:at])
        if early or not any(line.startswith(NEXT) for line in lines[at:]):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("source", SOURCES)
def test_every_kernel_waits_first(source: str) -> None:
    text = ptx(CSRC / "cuda" / source, "sm_90")
    assert len(kernels(text)) == text.count(".visible .entry") > 0
    assert faults(text) == []


def test_older_architectures_have_nothing_of_it() -> None:
    for source in SOURCES[:2]:
        text = ptx(CSRC / "cuda" / source, "sm_80")
        assert kernels(text)
        assert "griddepcontrol" not in text


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("  begin_kernel();\n  if (*step.finite == 0.0f) return;", "  if (*step.finite == 0.0f) return;"),
        (
            "  begin_kernel();\n  if (*step.finite == 0.0f) return;",
            "  if (*step.finite == 0.0f) return;\n  begin_kernel();",
        ),
    ],
    ids=["dropped", "after a read"],
)
def test_a_wait_that_is_missing_or_late_is_found(tmp_path: Path, right: str, wrong: str) -> None:
    csrc = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    path = csrc / "cuda/importance.cuh"
    text = path.read_text()
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong))
    (found,) = faults(ptx(csrc / "cuda/controller.cu", "sm_90", csrc))
    assert "importance_kernel" in found


def test_the_setting_tells_what_was_before() -> None:
    before = core.cuda_overlap_launches(True)
    assert core.cuda_overlap_launches(before) == core.cuda_built()
