"""`frontier`: the sizes of a saved run, their scores, and the one that is asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import ardlora_ext as ard
from ardlora_ext.commands.cli import main
from ardlora_ext.report.page import write_report
from ardlora_ext.report.sizes import FRONTIER_FILE, load_frontier

from helpers.command_line import finetune, saved

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def run(tmp_path: Path, encoder: Path, reviews: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    out = tmp_path / "run"
    options = ("--epochs", 6, "--lr", 5e-3, "--r", 4)
    assert finetune("--out", out, "--model", encoder, "--data", reviews, *options) == 0
    capsys.readouterr()
    return out


def test_sizes_are_scored_drawn_and_written(run: Path, encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = run.parent / "small"
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert main(["frontier", str(run), "--smallest-within", "0.5", "--to", str(small), "--threads", "1"]) == 0
    text = capsys.readouterr().out
    found = json.loads((run / FRONTIER_FILE).read_text())
    metrics = saved(run)
    sizes = [point["parameters"] for point in found["points"]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) > 4
    assert sizes[0] == metrics["params_live"]
    assert found["points"][0]["score"] == pytest.approx(metrics["metric_after"])
    assert found["points"][0]["loss"] == pytest.approx(metrics["loss_after"], rel=1e-5)
    assert f"{sizes[-1]:,}" in text
    assert "within 0.5 of the best" in text
    page = (run / "report.html").read_text()
    assert "At other sizes" in page
    assert f"Ringed: {found['chosen']:,} parameters" in page
    assert f"{sizes[-1]:,}" in page
    changed = {name for name, data in before.items() if (run / name).read_bytes() != data}
    assert changed == {"report.html"}

    best = max(point["score"] for point in found["points"])
    fitting = [p for p in found["points"] if p["score"] >= best - 0.005]
    assert found["chosen"] == min(p["parameters"] for p in fitting)
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(encoder)
    loaded = ard.load_pretrained(base, small)
    assert ard.parameters_report(loaded).live == found["chosen"]


def test_another_run_in_the_folder_has_no_sizes_yet(run: Path, encoder: Path, reviews: Path) -> None:
    assert main(["frontier", str(run), "--shares", "1", "0.5", "--threads", "1"]) == 0
    assert load_frontier(run) is not None
    options = ("--max-steps", 3, "--seed", 1, "--r", 4, "--overwrite")
    assert finetune("--out", run, "--model", encoder, "--data", reviews, *options) == 0
    assert load_frontier(run) is None
    assert "At other sizes" not in write_report(run).read_text()


def test_other_data_and_a_limit_of_parameters(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.csv"
    other.write_text("text,label\nthe film was good,good\nthe plot was very bad,bad\n")
    small = tmp_path / "small"
    limit = str(saved(run)["params_live"] // 3)
    words = ["frontier", str(run), "--eval-data", str(other), "--parameters", limit, "--to", str(small)]
    assert main([*words, "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert f"at most {int(limit):,}: " in text
    assert "scored on" in text
    assert "other.csv" in text
    assert (small / "adapter_model.safetensors").is_file()
    assert load_frontier(run)["data"] == "other.csv"  # type: ignore[index]


def refused(capsys: pytest.CaptureFixture[str], message: str, *words: object) -> None:
    capsys.readouterr()
    assert main(["frontier", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_mistakes_are_told_in_one_sentence(
    run: Path, tmp_path: Path, encoder: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (["--smallest-within", "-1"], "--smallest-within must be at least 0, got -1"),
        (["--to", str(tmp_path / "small")], "--to must come with --smallest-within or --parameters, got neither"),
        (["--parameters", "5", "--to", str(run)], "--to must be another folder than DIR"),
        (["--parameters", "0"], "--parameters must be at least 1, got 0"),
        (["--batches", "0"], "--batches must be at least 1, got 0"),
        (["--shares", "2"], r"shares must be in \(0, 1\], got 2"),
        (["--data", "none.csv"], "--data must be an existing file, got none.csv"),
        (["--parameters", "1"], "--parameters must be at least [0-9,]+, the smallest that was scored"),
    ):
        refused(capsys, message, run, *words)
    refused(capsys, "DIR must be a folder that finetune wrote, got no metrics.json in", tmp_path / "nothing")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    ard.attach(ard.wrap(model, ard.LoraConfig(r=2))).report(tmp_path / "loop")
    refused(capsys, "which knows its data, got another run in", tmp_path / "loop")
    whole = (run / "metrics.json").read_text()
    (run / "metrics.json").write_text(re.sub(r'"epochs": 6\b(?!\.)', '"epochs": "six"', whole))
    refused(capsys, r"settings in .* must be those of finetune, got TypeError", run)
    (run / "metrics.json").write_text(whole)
    untrained = tmp_path / "untrained"
    options = ("--max-steps", 2, "--lr", 1e-46, "--method", "lora")
    assert finetune("--out", untrained, "--model", encoder, "--data", reviews, *options) == 0
    refused(capsys, "adapters must have been trained, got updates that are all zero", untrained)
    assert not (untrained / FRONTIER_FILE).exists()
