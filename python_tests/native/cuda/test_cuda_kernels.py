"""The CUDA kernels on the host: each through its launcher, in several block orders, against plain loops."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.cuda_programs import PROGRAMS, PTX
from helpers.simt import build, run

every_mode = pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simt")


@every_mode
def test_wrappers_and_what_the_shim_reports(folder: Path, mode: str) -> None:
    program = build(folder, mode, PTX)
    done = run(program)
    assert done.returncode == 0, done.stdout + done.stderr
    faults = {
        "leave_before_barrier": "deadlock: 31 of 32 threads wait, one at __syncthreads",
        "split_warp": "lanes of warp 0 meet at different instructions: shfl.idx and shfl.bfly",
        "copy_past_shared": "cp.async: shared address 512 is out of 512 bytes",
        "read_before_wait": "NaN",
        "exchange_without_barrier": "data race" if mode == "tsan" else "NaN",
        "exchange_without_syncwarp": "data race" if mode == "tsan" else "NaN",
    }
    if mode == "asan":
        faults["past_shared"] = "heap-buffer-overflow"
    if mode == "tsan":
        faults["two_blocks_on_one_address"] = "data race"
    for fault, report in faults.items():
        done = run(program, fault)
        assert done.returncode != 0, fault
        assert report in done.stdout + done.stderr, fault


@every_mode
@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_equal_plain_loops(folder: Path, mode: str, name: str) -> None:
    done = run(build(folder, mode, PROGRAMS[name]), *([] if mode == "plain" else ["small"]))
    assert done.returncode == 0, done.stdout + done.stderr
