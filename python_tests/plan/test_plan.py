"""`plan`: its bytes against what training really holds, its arithmetic against the paper's figures."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, RobertaConfig

import ardlora_ext as ard
from ardlora_ext.commands.cli import main
from ardlora_ext.config import AdapterConfig
from ardlora_ext.config.registry import METHODS, config_from_dict
from ardlora_ext.model.targets import plan_targets
from ardlora_ext.plan import make_plan, skeleton
from ardlora_ext.plan.memory import live_parameters, uniform
from ardlora_ext.plan.trace import SavedBytes

from helpers.experts import tiny_experts, tokens

BATCH, LENGTH = 2, 24


def make_config(kind: str) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "bert":
        return BertConfig(**sizes, vocab_size=90, num_labels=3, architectures=["BertForSequenceClassification"])
    return LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=90, architectures=["LlamaForCausalLM"])


def held(kind: str, config: AdapterConfig) -> dict[str, int]:
    """Bytes of one real training step."""
    model: Any = (BertForSequenceClassification if kind == "bert" else LlamaForCausalLM)(make_config(kind))
    base = sum(p.numel() * p.element_size() for p in model.parameters())
    ard.wrap(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ard.attach(model, optimizer, total_steps=100)
    ids = torch.randint(90, (BATCH, LENGTH))
    labels = torch.randint(3, (BATCH,)) if kind == "bert" else ids
    with SavedBytes(model).counting() as saved:
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        activations = saved.total
    loss.backward()
    adapters = [p for layer in ard.adapters(model).values() for p in layer.trained.values()]
    gradients = sum(p.grad.numel() * 4 for p in adapters if p.grad is not None)
    optimizer.step()
    moments = sum(
        v.numel() * v.element_size() for p in adapters for k, v in optimizer.state[p].items() if k.startswith("exp_avg")
    )
    return {"base": base, "gradients": gradients, "moments": moments, "activations": activations}


PATTERN = {r"down_proj|intermediate\.dense": 2, r".*\.0\..*(v_proj|value)": 6}
NAMES = ["lora", "ard-matrix", "ard-head", "elalora", "dora", "lora-pattern", "ard-pattern"]
CONFIGS = [
    ard.LoraConfig(r=5),
    ard.ArdConfig(mode="paper", r0=4, granularity="matrix"),
    ard.ArdConfig(mode="paper", r0=4, granularity="head"),
    ard.ElaConfig(r=4),
    ard.DoraConfig(r=4),
    ard.LoraConfig(r=5, rank_pattern=PATTERN, lora_dropout=0.1),
    ard.ArdConfig(r0=3, rank_pattern=PATTERN),
]


@pytest.mark.parametrize(
    "config", CONFIGS, ids=["lora", "ard-matrix", "ard-head", "elalora", "dora", "lora-pattern", "ard-pattern"]
)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_bytes_are_what_training_holds(kind: str, config: AdapterConfig, tmp_path: Path) -> None:
    make_config(kind).save_pretrained(tmp_path)
    name, model = skeleton(str(tmp_path), torch.float32)
    plan = make_plan(name, model, config, BATCH, LENGTH)
    assert not plan.problem
    measured = held(kind, config)
    for key, value in measured.items():
        assert getattr(plan.training, key) == pytest.approx(value, rel=0.03), key


@pytest.mark.parametrize("method", ["lora", "dora", "ard", "elalora", "adalora"])
def test_parameters_are_what_the_report_counts(method: str) -> None:
    model, config = LlamaForCausalLM(make_config("llama")), config_from_dict({"method": method})
    layouts = plan_targets(model, config)[1]
    planned = live_parameters(layouts, uniform(layouts, config.initial_rank), config)
    assert planned == ard.parameters_report(ard.wrap(model, config)).live


def test_a_pattern_counts_in_the_budget_too(tmp_path: Path) -> None:
    make_config("llama").save_pretrained(tmp_path)
    name, model = skeleton(str(tmp_path), torch.float32)
    config = ard.ArdConfig(r0=3, rank_pattern=PATTERN)
    plan = make_plan(name, model, config, BATCH, LENGTH)
    wrapped = ard.wrap(LlamaForCausalLM(make_config("llama")), config)
    assert plan.budget == ard.attach(wrapped, total_steps=9).summary()["budget"]
    assert plan.peft_mean.weights == 4 * sum(
        config.share(name) * (layer.in_features + layer.out_features) for name, layer in ard.adapters(wrapped).items()
    )


def test_a_plan_loads_and_changes_nothing(tmp_path: Path) -> None:
    make_config("llama").save_pretrained(tmp_path)
    name, model = skeleton(str(tmp_path), torch.bfloat16)
    before = {n: p.shape for n, p in model.named_parameters()}
    make_plan(name, model, ard.LoraConfig(r=2), 1, 8)
    assert {n: p.shape for n, p in model.named_parameters()} == before
    assert all(p.device.type == "meta" or type(p.data).__name__ == "FakeTensor" for p in model.parameters())


def test_arithmetic_of_the_papers_model(capsys: pytest.CaptureFixture[str]) -> None:
    """LLaMA-3.1-70B, all linear: 12.94 M parameters per rank, so rank 16 is 0.29 %, near the 0.32 % of the abstract."""
    assert main(["plan", "llama-3.1-70b", "--length", "128", "--r", "16", "--method", "lora", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 70_553_706_496
    curve = {point["rank"]: point for point in found["curve"]}
    assert curve[1]["parameters"] == pytest.approx(12.94e6, rel=1e-3)
    assert curve[16]["share"] == pytest.approx(0.0029, abs=5e-5)


def test_the_length_is_what_the_model_can_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "all-minilm-l6-v2", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["length"], found["problem"]) == (512, "")
    assert found["bytes"]["training"]["activations"] > 0


def test_a_length_beyond_the_positions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "all-minilm-l6-v2", "--length", "513"]) == 2
    assert "--length must be <= 512" in capsys.readouterr().err
    # RoBERTa's table has 2 positions before the first token's: with pad_token_id = 1, 18 hold 16 tokens.
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    RobertaConfig(**small, max_position_embeddings=18, pad_token_id=1).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["length"], found["problem"]) == (16, "")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plan bert-base --method lora --r-max 9", "plan: r_max must come with method ard or elalora, got lora"),
        ("plan bert-base --method elalora --granularity head", "plan: ElaConfig: granularity must be 'matrix', or"),
        ("finetune --dry-run --method elalora --granularity head", "finetune: ElaConfig: granularity must be"),
        ("finetune --dry-run --r 0", "finetune: ArdConfig: r0 must be >= 1, got 0"),
    ],
)
def test_an_option_that_a_method_lacks_is_refused(
    command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)] if command.startswith("finetune") else []
    assert main([*command.split(), *out]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", [["head"], ["matrix"], ["head", "--factoring", "independent"]], ids=" ".join)
def test_dry_run_of_every_method(
    method: str, granularity: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_config("bert").save_pretrained(tmp_path)
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "a", "label": "b"}\n')
    words = [
        "finetune",
        "--model",
        str(tmp_path),
        "--data",
        str(data),
        "--method",
        method,
        "--out",
        str(tmp_path / "out"),
    ]
    refused = granularity == ["head"] and method in ("elalora", "adalora")
    assert main([*words, "--method", method, "--granularity", *granularity, "--dry-run"]) == (2 if refused else 0)
    if not refused:
        attention = 4 * (4 if granularity[0] == "head" else 1)  # q, k, v and o, with 4 heads
        assert f"{2 * (attention + 2)} units" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([], "all-MiniLM-L6-v2: 22,713,986 parameters in float32, 16 x 128 tokens"),
        (["--task", "sft"], "SmolLM2-135M-Instruct: 134,515,008 parameters in float32, 16 x 1024 tokens"),
        (
            ["--task", "lm", "--data", "x.txt"],
            "SmolLM2-135M-Instruct: 134,515,008 parameters in float32, 16 x 128 tokens",
        ),
        (
            ["--data", "x.csv"],
            "--dry-run must come with --model, or with --task, which tells the default one, got neither",
        ),
    ],
    ids=["questions", "chats", "text", "unknown"],
)
def test_dry_run_takes_the_model_that_a_run_would(
    words: list[str], shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["finetune", "--out", str(tmp_path / "out"), "--dry-run", *words])
    found = capsys.readouterr()
    assert shown in " ".join((found.out + found.err).split())
    assert code == (2 if "neither" in shown else 0)


def test_a_model_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-9"]) == 2
    assert "llama-9" in capsys.readouterr().err


def test_dry_run_takes_its_options_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_config("llama").save_pretrained(tmp_path)
    options = tmp_path / "run.yaml"
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "a"}\n')
    options.write_text(f"model: {tmp_path}\ndata: {data}\nmethod: lora\nr: 3\nout: {tmp_path / 'out'}\n")
    assert main(["finetune", "--config", str(options), "--dry-run"]) == 0
    per_rank = 2 * (6 * 64 + 2 * 32 + 3 * (64 + 176))
    assert f"budget {3 * per_rank:,}" in " ".join(capsys.readouterr().out.split())
    assert main(["finetune", "--config", str(options), "--r", "2", "--dry-run"]) == 0  # the command line wins
    assert f"budget {2 * per_rank:,}" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_in_the_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = tmp_path / "run.json"
    options.write_text('{"rank": 3}')
    assert main(["plan", "bert-base", "--config", str(options)]) == 2
    assert "must hold options of plan, got 'rank'" in capsys.readouterr().err


def _gpt_oss_layer() -> int:
    attention = (2880 + 4096) + 2 * (2880 + 512) + (4096 + 2880)
    return attention + 32 * ((2880 + 5760) + (2880 + 2880))


def _deepseek() -> int:
    attention = (7168 + 1536) + (1536 + 24576) + (7168 + 576) + (512 + 32768) + (16384 + 7168)
    experts = 3 * (7168 + 2048) + 256 * ((7168 + 4096) + (2048 + 7168))
    return 61 * attention + 3 * 3 * (7168 + 18432) + 58 * experts


@pytest.mark.parametrize(("name", "each_rank"), [("gpt-oss-20b", 24 * _gpt_oss_layer()), ("deepseek-v3", _deepseek())])
def test_parameters_of_mixtures(name: str, each_rank: int) -> None:
    config = ard.LoraConfig(r=1)
    layouts = plan_targets(skeleton(name, torch.bfloat16)[1], config)[1]
    assert live_parameters(layouts, uniform(layouts, 1), config) == each_rank


def test_a_mixture_is_planned_with_its_activations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mixtral-8x7b", "--length", "32", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["curve"][0]["parameters"] == 13_959_168
    assert (found["problem"], "experts" in {kind["cut"] for kind in found["kinds"]}) == ("", True)
    ours, theirs = (found["bytes"][key]["activations"] for key in ("training", "peft_mean"))
    assert 0 < ours < theirs


@pytest.mark.parametrize("config", [ard.LoraConfig(r=5), ard.LoraConfig(r=9, lora_dropout=0.1), ard.ArdConfig(r0=3)])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text"])
def test_activations_of_experts_are_what_training_holds(family: str, config: AdapterConfig, tmp_path: Path) -> None:
    model = tiny_experts(family)
    model.config.save_pretrained(tmp_path)
    name, planned = skeleton(str(tmp_path), torch.float32)
    plan = make_plan(name, planned, config, BATCH, LENGTH)
    assert not plan.problem
    assert planned.state_dict().keys() == model.state_dict().keys()  # all is out again
    ids = tokens(BATCH, LENGTH)
    ard.wrap(model, config).train()
    with SavedBytes(model).counting() as saved:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        assert plan.training.activations == pytest.approx(saved.total, rel=0.03)
    del loss


def test_activations_of_peft_form_the_updates(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_experts("mixtral")
    model.config.save_pretrained(tmp_path)
    plan = make_plan(*skeleton(str(tmp_path), torch.float32), ard.LoraConfig(r=4), BATCH, LENGTH)
    stacks = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=attention, target_parameters=stacks))
    ids = tokens(BATCH, LENGTH)
    with SavedBytes(theirs).counting() as saved:
        loss = theirs.train()(input_ids=ids, labels=ids, use_cache=False).loss
        assert plan.peft_mean.activations == pytest.approx(saved.total, rel=0.05)
    del loss


def test_rows_that_are_chosen_by_their_values_are_not_planned(tmp_path: Path) -> None:
    tiny_experts("jetmoe").config.save_pretrained(tmp_path)
    plan = make_plan(*skeleton(str(tmp_path), torch.float32), ard.LoraConfig(r=2), BATCH, LENGTH)
    assert "looks at values in its forward pass" in plan.problem
    assert plan.training.activations == 0
