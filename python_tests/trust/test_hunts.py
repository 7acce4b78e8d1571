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
    ("name", "cases"), [("file-faults", 150), ("load-faults", 400), ("loaders", 500), ("commands", 40)]
)
@pytest.mark.filterwarnings("ignore")  # of what broken files lead to
def test_nothing_is_found(name: str, cases: int) -> None:
    done, tally = hunt(name, range(cases), 60.0)
    assert tally.failures == []
    assert done == cases, "slower than ever"
    assert tally.counts.total() >= cases


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
