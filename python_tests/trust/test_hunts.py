"""The hunts of `bench trust`, a bounded number of cases with fixed seeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ardlora_ext.bench.trust.command import hunt


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("file-faults", 150),
        ("load-faults", 200),
        ("changes", 200),
        ("interrupts", 120),
        ("loaders", 500),
        ("commands", 40),
        ("threads", 3),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of what broken files lead to
def test_nothing_is_found(name: str, cases: int) -> None:
    done, tally = hunt(name, range(cases), 300.0)
    assert tally.failures == []
    assert done == cases, "slower than ever"
    assert tally.counts.total() >= cases


@pytest.mark.skipif(os.name != "posix", reason="no guard pages here")
def test_native_calls_find_nothing() -> None:
    """In a process of its own, which a kernel that goes too far ends; on every instruction set."""
    _, tally = hunt("native", range(1), 300.0)
    assert tally.failures == []
    assert tally.counts["native calls"] >= 10_000


@pytest.mark.skipif(os.name != "posix", reason="no kill -9 here")
def test_kills_beside_readers_find_nothing(tmp_path: Path) -> None:
    """In a process of its own that has one thread: it forks."""
    words = ["trust", "--hunts", "kills", "--cases", "20", "--json", str(tmp_path / "kills.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-m", "ardlora_ext.bench", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "kills.json").read_text())["rows"]
    assert (row["cases"], row["found"]) == (20, 0)
