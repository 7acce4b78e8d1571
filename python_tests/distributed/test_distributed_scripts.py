"""The scripts of docs/distributed.md run in two processes; one that torchrun starts again ends as if never broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers import workers
from helpers.documents import ROOT, blocks

SCRIPTS = {
    block.mark.removeprefix("file: "): block.text
    for block in blocks(ROOT / "docs/distributed.md")
    if block.mark.startswith("file: ")
}

CRASH = """
import os, runpy, signal
from torch.optim.optimizer import register_optimizer_step_post_hook

steps = 0

def die(*_):
    global steps
    steps += 1
    if steps == 13 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

register_optimizer_step_post_hook(die)
runpy.run_path("train.py", run_name="__main__")
"""


def script(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(SCRIPTS[name], encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "train.py"])
def test_tutorials(name: str, tmp_path: Path) -> None:
    ends = workers.run_script(2, script(tmp_path, name))
    assert all(compared > 10 for _, compared, _ in ends), "both took part in every step"
    assert all((forwards == 0) == ("fsdp" in name) for _, _, forwards in ends)
    assert list(tmp_path.rglob("adapter_model.safetensors"))


def test_a_killed_process_changes_nothing(tmp_path: Path) -> None:
    printed = workers.run_script(2, script(tmp_path / "unbroken", "train.py"))[0][0]
    broken = script(tmp_path / "broken", "train.py").parent
    (broken / "crash.py").write_text(CRASH)
    command = "torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 crash.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=broken, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr or "Signal 9" in done.stderr, done.stderr
    assert printed.startswith("loss ")
    assert done.stdout == printed, "the same loss and ranks"
    ends = [load_file(folder / "adapter/ardlora_state.safetensors") for folder in (tmp_path / "unbroken", broken)]
    assert ends[0].keys() == ends[1].keys()
    assert all((ends[0][key] == ends[1][key]).all() for key in ends[0]), "bit for bit"
