"""The command line: help, and every mistake ends in one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import ardlora_ext
from ardlora_ext.commands.cli import main
from ardlora_ext.config.registry import METHODS, config_for, has_option
from ardlora_ext.errors import InputError
from ardlora_ext.plan import BUILT_IN
from ardlora_ext.train.settings import Settings

from helpers.command_line import finetune, refused

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


def test_help_names_the_models_of_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    shown = re.search(r"or one of: (.*?)\.\n\n", capsys.readouterr().out, re.DOTALL)
    assert shown is not None
    assert re.split(r",\s+", shown[1]) == list(BUILT_IN)


def test_help_tells_the_defaults_of_the_methods(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for option in ("granularity", "factoring", "tolerance"):
        told = re.search(rf"--{option} .*?\(default: ([^)]*)\)", shown)
        assert told is not None
        configs = [config_for(method, 8, {}) for method in METHODS if has_option(method, option)]
        assert {str(getattr(config, option)) for config in configs} == {told[1]}, option


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["finetune", "--methd", "lora"], "--methd lora; did you mean --method?"),
        (
            ["finetune", "--weight-decay=0.1"],
            "--weight-decay=0.1; what Trainer takes: --training-arg weight_decay=VALUE",
        ),
        (["report", "run", "--weight-decay", "1"], "--weight-decay 1\n"),
    ],
)
def test_options_that_are_none(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*words, *(["--out", "run"] if words[0] == "finetune" else [])])
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"usage: python -m ardlora_ext {words[0]} ")
    assert f"unrecognized arguments: {hint}" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ardlora_ext {ardlora_ext.__version__}\n"


def test_a_budget_is_a_number_or_auto(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--out", "run", "--budget", "some"])
    assert caught.value.code == 2
    assert "argument --budget: must be a whole number or auto, got 'some'" in capsys.readouterr().err


def test_help_lists_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "finetune" in text
    assert "report" in text


TINY = ["--model", "{encoder}", "--data", "{reviews}", "--max-steps", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{encoder}"], "--model must come with --data"),
        (["--model", "nowhere", "--data", "{reviews}"], "load_tokenizer: nowhere must hold a tokenizer"),
        (["--model", "{empty}", "--data", "{reviews}"], "--model must hold a config.json or one .gguf file, got"),
        (["--model", "{encoder}", "--data", "none.csv"], "--data must be an existing file, got none.csv"),
        (["--task", "lm"], "--task lm must come with --data, got no --data"),
        (["--method", "lora", "--budget", "9999"], "finetune: budget must come with method ard, got lora"),
        (["--batch-size", "0"], "--batch-size must be positive, got 0"),
        (["--max-steps", "-3"], "--max-steps must be positive, got -3"),
        (["--lr", "nan"], "--lr must be positive, got nan"),
        (["--device", "cuda:99"], "--device must be cpu or a GPU that torch and this build can use, got 'cuda:99'"),
        (["--device", "gpu"], "--device must be cpu or a GPU that torch and this build can use, got 'gpu'"),
        (["--max-length", "1"], "--max-length must be at least 2, got 1"),
        ([*TINY, "--task", "lm"], "needs a causal language model, got bert"),
        ([*TINY, "--r", "0"], "must be"),
        ([*TINY, "--target-modules", "qerry"], "qerry"),
        ([*TINY, "--budget", "3"], "budget"),
        (["--budget", "auto", "--tolerance", "2"], "finetune: ArdConfig: tolerance must be in (0, 1), got 2.0"),
        (["--budget", "900", "--tolerance", "0.1"], "tolerance must come with budget='auto', got budget=900"),
        (["--budget", "auto", "--method", "lora"], "finetune: budget must come with method ard, got lora"),
        (
            [*TINY, "--training-arg", "weight_decai=1"],
            "must be NAME=VALUE of TrainingArguments, got weight_decai=1; did you mean",
        ),
        ([*TINY, "--training-arg", "weight_decay"], "must be NAME=VALUE of TrainingArguments, got weight_decay"),
        ([*TINY, "--training-arg", "weight_decay=much"], "--training-arg: argument --weight_decay"),
        ([*TINY, "--training-arg", "output_dir=x"], "must be NAME=VALUE of TrainingArguments, got output_dir=x"),
        ([*TINY, "--columns", "word=x"], "--columns must be text|label|"),
        ([*TINY, "--columns", "text=sentence"], "--columns text=sentence must name a column, got text, label"),
        ([*TINY, "--max-length", "25"], "--max-length must be <= 24, the positions of the model, got 25"),
        ([*TINY, "--eval-share", "1.5"], "--eval-share must be between 0 and 1, got 1.5"),
        ([*TINY, "--load-in-4bit", "--load-in-8bit"], "--load-in-4bit must not come with --load-in-8bit"),
        (
            [*TINY, "--fsdp"],
            "--fsdp must have several processes and float weights, got one process alone: use torchrun",
        ),
        ([*TINY, "--task", "lm", "--packing"], "--packing must come with --task sft, got lm"),
        ([*TINY, "--report-to", "nobody"], "nobody"),
        ([*TINY, "--attn", "mine"], "cannot be loaded for classification"),
        ([*TINY, "--seed", "-1"], "--seed must be in [0, 2**32), got -1"),
        ([*TINY, "--columns", "text=text", "label=text"], "--columns must name different columns, got text=text"),
        ([*TINY, "--answers-only"], "--answers-only must come with chats, got classification data"),
        ([*TINY, "--eval-split", "test"], "a file has no splits, got "),
        ([*TINY, "--early-stopping", "1", "--training-arg", "eval_strategy=no"], "requires the save and eval strategy"),
        ([*TINY, "--early-stopping", "0"], "--early-stopping must be positive, got 0"),
        (
            [*TINY, "--task", "token-classification"],
            "rows must have a tokens column (token-classification reads tokens and tags)",
        ),
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
    words = [word.format(**places) for word in arguments]
    assert message in refused(capsys, "--out", tmp_path / "run", *words)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_out_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    error = refused(capsys, "--out", tmp_path / "file" / "run")
    assert "--out must be a folder that can be written" in error


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


@pytest.mark.parametrize("logged", [(), ("logging_steps=99", "save_strategy=no")], ids=["loss", "rank change"])
def test_diverged_run_is_named(
    tmp_path: Path, encoder: Path, reviews: Path, capsys: pytest.CaptureFixture[str], logged: tuple[str, ...]
) -> None:
    options = ("--lr", 1e18, "--head-lr", 1e18, "--training-arg", "max_grad_norm=0", "warmup_steps=0", *logged)
    assert finetune("--out", tmp_path / "run", "--model", encoder, "--data", reviews, *options) == 1
    said = "weights became nan by" if logged else "the loss became (nan|inf) at"
    assert re.search(rf"error: finetune: {said} step \d+; try a smaller --lr", capsys.readouterr().err)


def test_a_model_without_numbers_is_named(
    tmp_path: Path, encoder: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(encoder / "model.safetensors")
    next(value for name, value in weights.items() if name.endswith("query.weight"))[0, 0] = float("nan")
    save_file(weights, encoder / "model.safetensors", {"format": "pt"})
    assert finetune("--out", tmp_path / "run", "--model", encoder, "--data", reviews) == 1
    assert "error: finetune: the loss became nan at step 1" in capsys.readouterr().err
