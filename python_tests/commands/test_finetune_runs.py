"""What `finetune` learns, resumes and refuses: every task, chats by TRL, several processes, kills."""

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
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from ardlora_ext.commands.cli import main
from ardlora_ext.train import finetune as runs
from ardlora_ext.train.settings import Settings

from helpers.tiny_models import WORDS

pytestmark = pytest.mark.usefixtures("one_process")
UNTIMED = ("seconds", "step_ms_median", "tokens_per_s", "peak_rss_mb", "settings", "command")


def finetune(*arguments: object) -> int:
    return main(["finetune", *map(str, arguments), "--threads", "1"])


def saved(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return content


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def result(folder: Path) -> dict[str, Any]:
    """What two equal runs have in common: their metrics but for times, and the bytes of their adapters."""
    metrics = {name: value for name, value in saved(folder).items() if name not in UNTIMED}
    names = ("adapter_model.safetensors", "ardlora_state.safetensors", "ardlora_state.json", "records.jsonl")
    return {**metrics, **{name: (folder / name).read_bytes() for name in names}}


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_measurements(tmp_path: Path, encoder: Path) -> None:
    rows = [{"text": f"the {WORDS[i % 12]} {WORDS[i // 12]}", "label": (i % 12) / 5.5 - 1} for i in range(120)]
    data = write(tmp_path / "rows.jsonl", *rows)
    options = ("--epochs", 6, "--lr", 5e-3, "--batch-size", 8)
    assert finetune("--out", tmp_path / "run", "--model", encoder, "--data", data, *options) == 0
    metrics = saved(tmp_path / "run")
    assert (metrics["task"], metrics["metric_name"], metrics["labels"]) == ("regression", "correlation", [])
    assert metrics["metric_after"] > 0.7
    assert metrics["loss_after"] < metrics["loss_before"]


def test_tags_of_tokens(tmp_path: Path, encoder: Path) -> None:
    rows = [{"words": ["the", WORDS[i % 12], WORDS[i // 12]], "kinds": ["O", "BI"[i % 12 < 6], "O"]} for i in range(60)]
    data = write(tmp_path / "rows.jsonl", *rows)
    options = ("--columns", "tokens=words", "tags=kinds", "--epochs", 6, "--lr", 5e-3, "--batch-size", 8)
    assert finetune("--out", tmp_path / "run", "--model", encoder, "--data", data, *options) == 0
    metrics = saved(tmp_path / "run")
    assert (metrics["task"], metrics["labels"]) == ("token-classification", ["B", "I", "O"])
    assert metrics["metric_after"] > max(0.7, metrics["metric_before"])


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>{% endgeneration %}"
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of TRL
@pytest.mark.parametrize("form", ["messages", "prompts"])
def test_chats_by_trl(tmp_path: Path, decoder: Path, form: str) -> None:
    config = json.loads((decoder / "tokenizer_config.json").read_text())
    (decoder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    chats = [(f"the {WORDS[i % 12]} {WORDS[i // 12]}", ("bad plot", "good film")[i % 12 < 6]) for i in range(60)]
    rows = [
        {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]}
        if form == "messages"
        else {"prompt": said, "completion": " " + answer}
        for said, answer in chats
    ]
    data = write(tmp_path / "rows.jsonl", *rows)
    options = ["--epochs", 4, "--lr", 1e-2, "--batch-size", 8, "--gradient-accumulation-steps", 2]
    options += ["--answers-only"] if form == "messages" else ["--packing"]
    assert finetune("--out", tmp_path / "run", "--model", decoder, "--data", data, *options) == 0
    metrics = saved(tmp_path / "run")
    assert (metrics["task"], metrics["metric_name"], metrics["batch_size"]) == ("sft", "perplexity", 16)
    assert metrics["metric_after"] < 0.95 * metrics["metric_before"]


def test_half_precision_quantised_base_and_checkpointing(tmp_path: Path, decoder: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=3 + len(WORDS), **sizes)).save_pretrained(decoder)  # for blocks of 64
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS) * 40)
    options = ("--dtype", "bf16", "--load-in-4bit", "--gradient-checkpointing", "--attn", "eager", "--max-steps", 4)
    assert finetune("--out", tmp_path / "run", "--model", decoder, "--data", text, "--max-length", 16, *options) == 0
    metrics = saved(tmp_path / "run")
    assert metrics["loss_after"] < metrics["loss_before"]
    assert "--load-in-4bit" in metrics["command"]


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
    assert finetune("--out", out, *options) == 2
    assert "got " + str(out / "checkpoint-24") + "; --resume goes on from there" in capsys.readouterr().err
    (out / "checkpoint-24" / "trainer_state.json").write_text("{")  # a kill while it was written
    assert finetune("--out", out, *options, "--resume") == 0
    assert result(out) == result(tmp_path / "whole")
    assert not list(out.glob("checkpoint-*"))
    with monkeypatch.context() as patched:  # what has ended is not run again
        patched.setattr(runs, "prepare", lambda _: pytest.fail("must not begin"))
        assert finetune("--out", out, *options, "--resume") == 0
    assert finetune("--out", out, *options, "--resume", tmp_path) == 2
    assert "--resume must be auto, or a whole checkpoint" in capsys.readouterr().err


def test_killed_at_any_moment(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    """kill -9, and the same command again."""
    words = [
        "--model",
        str(encoder),
        "--data",
        str(reviews),
        "--max-steps",
        "30",
        "--batch-size",
        "4",
        "--threads",
        "1",
    ]
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


def test_two_processes_equal_one_on_the_concatenated_batch(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    words = ["--training-arg", "optim=sgd", "--lr", "0.3", "--head-lr", "0.3"]  # Adam makes much of the last bits
    words += ["--model", str(encoder), "--data", str(reviews), "--max-steps", "12", "--device", "cpu", "--threads", "1"]
    config = json.loads((encoder / "config.json").read_text())  # masks differ between processes
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (encoder / "config.json").write_text(json.dumps(config))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finetune_ = ["-m", "ardlora_ext", "finetune", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *torchrun, *finetune_, "--batch-size", "4", "--out", str(tmp_path / "two")],
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


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--training-arg", "weight_decai=1"],
            "must be NAME=VALUE of TrainingArguments, got weight_decai=1; did you mean",
        ),
        (["--training-arg", "weight_decay"], "must be NAME=VALUE of TrainingArguments, got weight_decay"),
        (["--training-arg", "weight_decay=much"], "--training-arg: argument --weight_decay"),
        (["--training-arg", "output_dir=x"], "must be NAME=VALUE of TrainingArguments, got output_dir=x"),
        (["--columns", "word=x"], "--columns must be text|label|"),
        (["--columns", "text=sentence"], "--columns text=sentence must name a column, got text, label"),
        (["--max-length", "25"], "--max-length must be <= 24, the positions of the model, got 25"),
        (["--eval-share", "1.5"], "--eval-share must be between 0 and 1, got 1.5"),
        (["--load-in-4bit", "--load-in-8bit"], "--load-in-4bit must not come with --load-in-8bit"),
        (["--task", "lm", "--packing"], "--packing must come with --task sft, got lm"),
        (["--report-to", "nobody"], "nobody"),
        (["--attn", "mine"], "cannot be loaded for classification"),
        (["--early-stopping", "0"], "--early-stopping must be positive, got 0"),
        (
            ["--task", "token-classification"],
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
    words = ("--model", encoder, "--data", reviews, "--max-steps", 2)
    assert finetune("--out", tmp_path / "run", *words, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_training_arguments_reach_trainer(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    settings = Settings(
        out=tmp_path,
        model=str(encoder),
        data=str(reviews),
        device="cpu",
        training_arg=("weight_decay=0.25", "lr_scheduler_type=cosine", "bf16=true", "optim-args=foreach=True"),
    )
    job = runs.prepare(settings)
    arguments = job.trainer.args
    assert (arguments.weight_decay, arguments.lr_scheduler_type, arguments.bf16) == (0.25, "cosine", True)
    assert arguments.optim_args == "foreach=True"
    groups = job.trainer.create_optimizer().param_groups
    assert {(group["lr"], len(group["params"]) > 0) for group in groups} >= {(1e-3, True), (1e-2, True)}
    trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert trained == sum(p.numel() for p in job.trainer.model.parameters() if p.requires_grad)


def test_what_is_cut_is_said(tmp_path: Path, encoder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"{WORDS[i % 12]} " * (30 if i < 3 else 2) + WORDS[i // 12], "label": i % 2} for i in range(40)]
    data = write(tmp_path / "rows.jsonl", *rows)
    runs.prepare(Settings(out=tmp_path, model=str(encoder), data=str(data), max_length=16, device="cpu"))
    assert "3 of 40 texts fill --max-length 16 tokens" in caplog.text
