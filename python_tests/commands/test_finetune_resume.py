"""`finetune` goes on where it was, in one process or two: every way ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from ardlora_ext.train import finetune as runs

from helpers.command_line import finetune, refused, saved

pytestmark = pytest.mark.usefixtures("one_process")
UNTIMED = ("seconds", "step_ms_median", "tokens_per_s", "peak_rss_mb", "settings", "command")


def result(folder: Path) -> dict[str, Any]:
    """What two equal runs have in common: their metrics but for times, and the bytes of their adapters."""
    metrics = {name: value for name, value in saved(folder).items() if name not in UNTIMED}
    names = ("adapter_model.safetensors", "ardlora_state.safetensors", "ardlora_state.json", "records.jsonl")
    return {**metrics, **{name: (folder / name).read_bytes() for name in names}}


# --- resume -----------------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """Ctrl-C at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_resumed_run_equals_the_unbroken_one(
    tmp_path: Path, encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", encoder, "--data", reviews, "--max-steps", 40, "--batch-size", 4, "--lora-dropout", 0.1)
    assert finetune("--out", tmp_path / "whole", *options, "--resume") == 0  # there is nothing to resume
    make = runs.make_trainer
    out = tmp_path / "run"
    for step in (13, 30):
        with monkeypatch.context() as patched:
            patched.setattr(runs, "make_trainer", lambda *a, s=step: make(*a[:-1], [*a[-1], Stop(s)]))
            assert finetune("--out", out, *options, "--resume") == 130
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-16", "checkpoint-24"}
    assert "got " + str(out / "checkpoint-24") + "; --resume goes on from there" in refused(
        capsys, "--out", out, *options
    )
    (out / "checkpoint-24" / "trainer_state.json").write_text("{")  # a kill while it was written
    assert finetune("--out", out, *options, "--resume") == 0
    assert result(out) == result(tmp_path / "whole")
    assert not list(out.glob("checkpoint-*"))
    with monkeypatch.context() as patched:  # what has ended is not run again
        patched.setattr(runs, "prepare", lambda _: pytest.fail("must not begin"))
        assert finetune("--out", out, *options, "--resume") == 0
    error = refused(capsys, "--out", out, *options, "--resume", tmp_path)
    assert "--resume must be auto, or a whole checkpoint" in error


def test_killed_at_any_moment(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    """kill -9, and the same command again."""
    options = {"--model": encoder, "--data": reviews, "--max-steps": 30, "--batch-size": 4, "--threads": 1}
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-m", "ardlora_ext", "finetune", *words, "--training-arg", "save_steps=3", "--resume"]

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "--out", str(tmp_path / name)], stdout=-3, stderr=-3)

    process = start("run")
    while not list((tmp_path / "run").glob("checkpoint-9")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start("run").wait() == 0
    assert start("whole").wait() == 0
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_early_stopping_ends_with_the_best_weights(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    options = ("--max-steps", 60, "--eval-steps", 5, "--early-stopping", 2, "--lr", 3e-2, "--seed", 1)
    assert finetune("--out", tmp_path / "run", "--model", encoder, "--data", reviews, *options) == 0
    metrics = saved(tmp_path / "run")
    assert metrics["steps"] < 60
    assert metrics["metric_after"] == max(entry["metric"] for entry in metrics["evals"])


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [(), ("--fsdp",)], ids=["whole", "sharded"])
def test_two_processes_equal_one_on_the_concatenated_batch(
    tmp_path: Path, encoder: Path, reviews: Path, sharded: tuple[str, ...]
) -> None:
    words = ["--training-arg", "optim=sgd", "--lr", "0.3", "--head-lr", "0.3"]  # Adam makes much of the last bits
    words += ["--model", str(encoder), "--data", str(reviews), "--max-steps", "12", "--device", "cpu", "--threads", "1"]
    config = json.loads((encoder / "config.json").read_text())  # masks differ between processes
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (encoder / "config.json").write_text(json.dumps(config))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finetune_ = ["-m", "ardlora_ext", "finetune", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *torchrun, *finetune_, "--batch-size", "4", "--out", str(tmp_path / "two"), *sharded],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("final rank per layer") == 1  # the first process speaks
    assert finetune("--out", tmp_path / "one", *words[:-2], "--batch-size", 8) == 0
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert (one["batch_size"], one["epochs"]) == (two["batch_size"], two["epochs"])
    losses = [torch.tensor([entry["loss"] for entry in run["history"]]) for run in (one, two)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    assert one["loss_after"] == pytest.approx(two["loss_after"], abs=1e-4)
    assert one["ranks"].keys() == two["ranks"].keys()
    for name, ranks in one["ranks"].items():  # padding differs, and with it the means of h and dh a little
        assert all(abs(a - b) <= 1 for a, b in zip(ranks, two["ranks"][name], strict=True))
