"""`compare`: the runs are `finetune`'s own, what has ended is not run again, mistakes come before the first run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ardlora_ext.commands.cli import main
from ardlora_ext.train import finetune as runs
from ardlora_ext.train.progress import DivergenceError
from ardlora_ext.train.settings import Settings

from helpers.command_line import finetune, saved

pytestmark = pytest.mark.usefixtures("one_process")


def compare(*arguments: object) -> int:
    return main(["compare", *map(str, arguments), "--threads", "1"])


def test_a_sweep_goes_on_where_it_was(
    tmp_path: Path, encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", encoder, "--data", reviews, "--max-steps", 5)
    sweep = ("--out", tmp_path / "sweep", "--methods", "lora", "ard", "--ranks", 3, "--seeds", 0, 1, *options)
    begun: list[str] = []
    prepare = runs.prepare

    def broken(settings: Settings) -> Any:
        begun.append(settings.out.name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return prepare(settings)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "prepare", broken)
        assert compare(*sweep, "--mode", "paper") == 130
        assert begun == ["lora-r3-lr0.001-seed0", "ard-r3-lr0.001-seed0"]
        assert compare(*sweep, "--mode", "paper") == 0
    assert len(begun) == 2 + 3, "one had ended"
    shown = capsys.readouterr().out
    for row in ("lora", "ard mode paper"):
        assert re.search(rf"{row} .* 2 .*\d% ± \d", shown), row
    page = (tmp_path / "sweep" / "comparison.html").read_text()
    assert shown.rstrip().endswith("comparison.html")
    assert page.count("data:image/png;base64,") == 3
    assert all(f"seed{seed}" in page for seed in (0, 1))

    folder = tmp_path / "sweep" / "ard-r3-lr0.001-seed1"
    alone = ("--method", "ard", "--mode", "paper", "--r", 3, "--seed", 1)
    assert finetune("--out", tmp_path / "alone", *options, *alone) == 0
    for name in ("loss_after", "metric_after", "ranks", "history"):
        assert saved(folder)[name] == saved(tmp_path / "alone")[name]

    with monkeypatch.context() as patched:
        patched.setattr(runs, "prepare", lambda _: pytest.fail("must not begin"))
        assert compare(*sweep, "--mode", "paper") == 0


def test_what_was_begun_by_another_sweep_is_begun_anew(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    options = ("--out", tmp_path / "sweep", "--methods", "lora", "--seeds", 0, "--model", encoder, "--data", reviews)
    assert compare(*options, "--max-steps", 6, "--save-steps", 3) == 0
    assert compare(*options, "--max-steps", 9, "--save-steps", 3) == 0
    metrics = saved(tmp_path / "sweep" / "lora-r8-lr0.001-seed0")
    assert (metrics["steps"], len(metrics["history"])) == (9, 9)
    fresh = ("--method", "lora", "--model", encoder, "--data", reviews, "--max-steps", 9)
    assert finetune("--out", tmp_path / "fresh", *fresh) == 0
    assert metrics["loss_after"] == saved(tmp_path / "fresh")["loss_after"]


def test_runs_that_diverge_are_left_out(
    tmp_path: Path, encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.run

    def diverging(settings: Settings) -> Any:
        if settings.lr > 1:
            raise DivergenceError("finetune: the loss became nan at step 1; try a smaller --lr")
        return run(replace(settings, max_steps=2))

    monkeypatch.setattr(runs, "run", diverging)
    options = ("--out", tmp_path / "sweep", "--methods", "lora", "--seeds", 0, "--model", encoder, "--data", reviews)
    assert compare(*options, "--lrs", 1e-3, 5) == 0
    error = capsys.readouterr().err
    assert (
        "error: lora-r8-lr5-seed0: finetune: the loss became nan at step 1; try a smaller --lr; it is left out" in error
    )
    assert compare(*options, "--lrs", 5) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "4", "4"], "compare: --ranks must be different, got 4 4"),
        (["--ranks", "4", "0"], "finetune: "),
        (["--lrs", "0.001", "-1"], "--lr must be positive, got -1"),
        (["--methods", "lora", "dora", "--budget", "9999"], "budget must come with method ard, got lora"),
        (["--model", "x"], "--model must come with --data"),
    ],
)
def test_mistakes_come_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert compare("--out", tmp_path / "sweep", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_options_of_one_method_go_to_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Settings] = []

    def stop(settings: Settings) -> Any:
        given.append(settings)
        raise DivergenceError("stop")

    monkeypatch.setattr(runs, "run", stop)
    config = tmp_path / "sweep.json"
    config.write_text(json.dumps({"methods": ["lora", "ard"], "budget": 9999, "seeds": [7]}))
    assert compare("--out", tmp_path / "sweep", "--config", config) == 1
    assert [(s.method, s.budget, s.seed) for s in given] == [("lora", None, 7), ("ard", 9999, 7)]
