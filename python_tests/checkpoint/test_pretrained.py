"""Checkpoints: PEFT and the scale rules of servers read them, a resumed run goes on as if it had not stopped."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import ardlora_ext as ard
from ardlora_ext.layers.linear import Conv1D
from ardlora_ext.ranks.controllers.ard.controller import ArdController

from helpers.adapters import fingerprint, scramble, set_ranks
from helpers.ard_runs import heads
from helpers.logits import assert_same_logits, logits
from helpers.models import ARCHITECTURES, Attention, Batch, bert, llama, trainable
from helpers.sealing import edit_json

Architecture = tuple[nn.Module, Batch]

# transformers renamed an attribute that PEFT still reads
quiet_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def tuned(model: nn.Module, config: Any, seed: int = 0) -> nn.Module:
    """Wrap a model and leave nothing at its initial value: ragged ranks, one adapter of rank 0, a changed head."""
    ard.wrap(model, config)
    scramble(model, seed)
    empty = list(ard.adapters(model).values())[1]
    set_ranks(model, lambda layer, u: 0 if layer is empty else layer.ranks[u])
    with torch.no_grad():
        for p in trainable(model):
            if not any(p is factor for layer in ard.adapters(model).values() for factor in layer.factors.values()):
                p += 0.1 * torch.randn_like(p)
    return model


def save(model: nn.Module, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the reminder that nothing was attached
        ard.save_pretrained(model, directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@quiet_peft
@pytest.mark.parametrize("factoring", ["shared", "independent"])
def test_peft_gives_the_same_logits(architecture: Architecture, factoring: Any, tmp_path: Path) -> None:
    model, batch = architecture
    base = copy.deepcopy(model)
    plain = logits(model, batch)
    tuned(model, heads(r0=3, factoring=factoring, lora_alpha=6))
    expected = logits(model, batch)
    assert (expected - plain).abs().max() > 0.01 * plain.abs().max(), "the adapters do something"
    theirs = PeftModel.from_pretrained(base, save(model, tmp_path)).eval()
    assert_same_logits(logits(theirs, batch), expected)
    if hasattr(model, "classifier"):
        head = theirs.base_model.model.classifier.modules_to_save["default"]
        assert torch.equal(head.weight, model.classifier.weight)


def test_adapter_config(architecture: Architecture, tmp_path: Path) -> None:
    model, _ = architecture
    save(tuned(model, heads(r0=3)), tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert list(config) == sorted(config)
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] in (8, 16, 32, 64)  # ranks that vLLM serves
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not config["use_rslora"]
    assert config["target_modules"] == sorted(n for n, layer in ard.adapters(model).items() if any(layer.ranks))
    expected = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "vit": None}
    assert config["task_type"] == expected[model.config.model_type]
    assert config["fan_in_fan_out"] == (model.config.model_type == "gpt2")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scale_rules_of_servers_give_one(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name]()[0]
    save(tuned(model, heads(r0=3, lora_alpha=5)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    vllm = config["lora_alpha"] / config["r"]  # one scale for the whole adapter
    assert vllm == 1
    weights = {n: layer.base_layer.weight.detach().clone() for n, layer in ard.adapters(model).items()}
    merged = ard.merge(model)
    for module in config["target_modules"]:
        a, b = (tensors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        llama_cpp = config["lora_alpha"] / b.shape[1]  # alpha over the tensor's own rank
        assert llama_cpp == 1
        assert a.shape[0] == b.shape[1] == config["r"]
        layer = merged.get_submodule(module)
        delta = (b @ a).T if isinstance(layer, Conv1D) else b @ a
        torch.testing.assert_close(weights[module] + delta, layer.weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factoring", ["shared", "independent"])
@pytest.mark.parametrize("options", [{}, {"capacity": "fixed"}, {"adapter_dtype": "auto"}], ids=str)
def test_load_restores_every_bit(factoring: Any, options: Any, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if options.get("adapter_dtype") else torch.float32
    model, batch = llama()
    base = copy.deepcopy(model).to(dtype)
    tuned(model.to(dtype), heads(r0=3, modules_to_save=["norm"], factoring=factoring, **options))
    clone = ard.load_pretrained(base, save(model, tmp_path))
    assert clone is base
    for name, layer in ard.adapters(model).items():
        other = ard.adapters(clone)[name]
        assert (other.ranks, other.scaling, other.capacity) == (layer.ranks, layer.scaling, layer.capacity)
        assert layer.gate is not None
        assert other.gate is not None
        assert torch.equal(other.gate, layer.gate)
        for factor, rows in zip(("lora_A", "lora_B"), layer.layout.rows(layer.ranks), strict=True):
            assert torch.equal(getattr(other, factor)[:rows], getattr(layer, factor)[:rows])
            assert not getattr(other, factor)[rows:].any()
    assert torch.equal(clone.get_submodule("model.norm").weight, model.get_submodule("model.norm").weight)
    assert torch.equal(logits(clone.eval(), batch), logits(model.eval(), batch))
    assert ard.parameters_report(clone).live == ard.parameters_report(model).live


STEPS = 60


@pytest.mark.parametrize("at", [10, 24, 25, 38, 50])  # warm-up, before and after a rank change, hardening, frozen
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(at: int, tmp_path: Path) -> None:
    config = heads(r0=2, head_dim=8, update_interval=6, lr_alpha=0.05, warmup_ratio=0.2, harden_ratio=0.1)
    data = torch.randn(STEPS, 2, 16, 32)

    def train(model: nn.Module, optimizer: AdamW, steps: range) -> None:
        for t in steps:
            (model(data[t, 0]) - data[t, 1]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    base = Attention()
    model = ard.wrap(copy.deepcopy(base), config)
    optimizer = AdamW(trainable(model), lr=0.01)
    controller = ard.attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(at))
    ard.save_pretrained(model, tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    train(model, optimizer, range(at, STEPS))

    resumed = ard.load_pretrained(base, tmp_path)
    other_optimizer = AdamW(trainable(resumed), lr=0.01)
    other_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    other = ard.attach(resumed, other_optimizer, total_steps=STEPS)
    train(resumed, other_optimizer, range(at, STEPS))
    assert isinstance(controller, ArdController)
    assert isinstance(other, ArdController)
    assert other.records == controller.records
    assert other.alpha.tolist() == controller.alpha.tolist()
    assert len({tuple(units) for units in controller.ranks().values()}) > 1, "ranks moved"
    ours, theirs = ard.adapters(resumed), ard.adapters(model)
    for name, layer in theirs.items():
        assert ours[name].ranks == layer.ranks
        for factor, rows in zip(("lora_A", "lora_B"), layer.layout.rows(layer.ranks), strict=True):
            assert torch.equal(getattr(ours[name], factor)[:rows], getattr(layer, factor)[:rows])


def test_saving_an_ard_model_that_was_never_attached_says_so(tmp_path: Path) -> None:
    model = ard.wrap(Attention(), heads())
    with pytest.warns(UserWarning, match=r"ardlora_ext\.attach\(model, optimizer\) was never called"):
        ard.save_pretrained(model, tmp_path / "ard")
    ard.save_pretrained(ard.wrap(Attention(), ard.LoraConfig()), tmp_path / "lora")  # nothing to say here


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_nan_is_not_saved_over_a_good_one(value: float, tmp_path: Path) -> None:
    model = ard.wrap(Attention(), ard.LoraConfig(r=3))
    save(model, tmp_path)
    before = contents(tmp_path)
    ard.adapters(model)["up"].lora_A.data[0, 0] = value
    with pytest.raises(ValueError, match=r"adapters must be finite, got NaN or Inf in 'up\.lora_A'"):
        save(model, tmp_path)
    assert contents(tmp_path) == before


def test_an_interrupted_save_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Attention()
    first = tuned(copy.deepcopy(base), ard.LoraConfig(r=3))
    save(first, tmp_path)
    second = tuned(copy.deepcopy(base), ard.LoraConfig(r=3), seed=1)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            save(second, tmp_path)
    x = torch.randn(2, 32)
    assert torch.equal(ard.load_pretrained(copy.deepcopy(base), tmp_path)(x), first(x))
    save(second, tmp_path)
    assert torch.equal(ard.load_pretrained(base, tmp_path)(x), second(x))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_transformers_model_saves_its_adapter_as_pefts_does(tmp_path: Path) -> None:
    """`model.save_pretrained` with what Accelerate's scripts pass; once unwrapped, the model saves itself again."""
    model = tuned(bert()[0], ard.LoraConfig(r=3))
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(
        tmp_path / "theirs", is_main_process=True, state_dict=model.state_dict(), max_shard_size="1GB"
    )
    ard.save_pretrained(model, tmp_path / "ours")
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert theirs.pop("model.safetensors"), "what Trainer resumes from"
    assert theirs == ours
    with pytest.raises(ValueError, match="push_to_hub must be False"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    ard.unwrap(model)
    model.save_pretrained(tmp_path / "base")
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert "model.safetensors" in names
    assert "adapter_config.json" not in names


def test_saving_needs_a_wrapped_model_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Attention must be wrapped"):
        ard.save_pretrained(Attention(), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        save(ard.wrap(Attention(), ard.LoraConfig()), tmp_path / "file")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = heads(r0=3, head_dim=8, modules_to_save=["down"])
    return save(tuned(Attention(), config), tmp_path_factory.mktemp("checkpoint"))


def assert_refused(model: nn.Module, directory: Path, message: str, error: type[Exception] = ValueError) -> None:
    before, files = fingerprint(model), contents(directory) if directory.is_dir() else None
    with pytest.raises(error, match=message):
        ard.load_pretrained(model, directory)
    assert fingerprint(model) == before
    assert getattr(model, "_ardlora", None) is None
    assert files == (contents(directory) if directory.is_dir() else None)


def test_missing_files(checkpoint: Path, tmp_path: Path) -> None:
    message = r"directory must hold ardlora_state\.json, got '.*' without it"
    assert_refused(Attention(), tmp_path / "nowhere", message, FileNotFoundError)
    assert_refused(Attention(), tmp_path, message, FileNotFoundError)
    assert_refused(Attention(), checkpoint / "adapter_config.json", message, FileNotFoundError)
    shutil.copy(checkpoint / "adapter_config.json", tmp_path)
    assert_refused(Attention(), tmp_path, message + "; ardlora_ext.load_peft takes what PEFT wrote", FileNotFoundError)
    shutil.copy(checkpoint / "ardlora_state.json", tmp_path)
    assert_refused(Attention(), tmp_path, r"ardlora_state\.safetensors must match its checksum")


Spoil = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "null", "{}", '{"format": 1}', '{"format": 1, "modules": [], "sha256": ""}', "\0\xff"]
)
def test_foreign_or_corrupt_json(checkpoint: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "ardlora_state.json").write_bytes(text.encode("latin-1"))
    assert_refused(Attention(), tmp_path, r"ardlora_state\.json must be one that save_pretrained wrote")


@pytest.mark.parametrize("key", ["format", "config", "modules", "sha256", "controller"])
def test_a_key_that_is_missing(checkpoint: Path, tmp_path: Path, key: str) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "ardlora_state.json"
    state = json.loads(path.read_text())
    del state[key]
    path.write_text(json.dumps(state))
    assert_refused(Attention(), tmp_path, key)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.update(format=2), r"format of ardlora_state\.json must be 1, got 2"),
        (lambda s: s["modules"]["up"].update(ranks=[-1]), "ranks in ardlora_state.json must be whole numbers >= 0"),
        (lambda s: s["modules"]["up"].update(ranks=["x"]), "ranks in ardlora_state.json must be whole numbers >= 0"),
        (lambda s: s["modules"]["up"].update(ranks=[1, 1]), "up"),
        (lambda s: s["modules"]["up"].update(ranks=[10**6]), "up"),
        (lambda s: s["modules"]["q_proj"].update(ranks=[1, 2, 1, 2]), "q_proj"),
        (lambda s: s["modules"]["q_proj"].update(kind="in_heads"), "q_proj"),
        (lambda s: s["modules"]["up"].update(in_features=31), r"model must have 'up' with features \[31, 64\]"),
        (lambda s: s["modules"].update(other=s["modules"]["up"]), "model must have 'other'"),
        (lambda s: s["modules"].pop("up"), "the model's targets must be those of the checkpoint"),
        (lambda s: s["config"].update(method="other"), "method must be one of"),
        (lambda s: s["config"].update(r0=0), "r0 must be >= 1"),
        (lambda s: s["config"].update(colour=1), "fields must be those of ArdConfig"),
        (lambda s: s["config"].update(head_dim=4), "q_proj"),
        (lambda s: s.update(modules_to_save=["nowhere"]), "nowhere"),
    ],
    ids=[
        "format",
        "negative rank",
        "rank of text",
        "too many ranks",
        "too large a rank",
        "ranks of other tensors",
        "kind",
        "features",
        "unknown module",
        "module left out",
        "method",
        "r0",
        "unknown field",
        "head_dim",
        "modules_to_save",
    ],
)
def test_a_state_that_does_not_fit(checkpoint: Path, tmp_path: Path, spoil: Spoil, message: str) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "ardlora_state.json"
    edit_json(path, spoil)
    assert_refused(Attention(), tmp_path, message)


@pytest.mark.parametrize("where", ["first", "middle", "last", "cut"])
def test_tampered_tensors(checkpoint: Path, tmp_path: Path, where: str) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "ardlora_state.safetensors"
    data = bytearray(path.read_bytes())
    if where == "cut":
        data = data[:-5]
    else:
        data[{"first": 0, "middle": len(data) // 2, "last": -1}[where]] ^= 1
    path.write_bytes(data)
    assert_refused(Attention(), tmp_path, r"safetensors must match its checksum in ardlora_state\.json; the file is")


def test_files_of_another_save(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "ardlora_state.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    assert_refused(Attention(), tmp_path, "must match its checksum")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(width=64), r"model must have 'o_proj' with features \[32, 32\], got shape \[64, 64\]"),
        (lambda: llama()[0], "model must have 'o_proj' with features .*, got no such layer"),
        (lambda: nn.Sequential(Attention()), "model must have 'o_proj'"),
        (lambda: ard.wrap(Attention(), ard.LoraConfig()), "must not be wrapped already"),
    ],
    ids=["wider", "another kind", "inside another", "wrapped"],
)
def test_a_checkpoint_of_another_model(checkpoint: Path, make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        ard.load_pretrained(model, checkpoint)
    assert fingerprint(model) == before


def test_other_heads_in_the_same_matrices(tmp_path: Path) -> None:
    model = llama()[0]
    save(tuned(model, heads(r0=2)), tmp_path)
    config = copy.deepcopy(model.config)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 16
    other = type(model)(config)
    assert_refused(other, tmp_path, r"'model\.layers\.0\.self_attn\.q_proj'")


@pytest.mark.filterwarnings("ignore:wrap. .*experts")
def test_dense_layers_that_peft_takes_for_experts_are_named(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    more = {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4, "num_key_value_heads": 2}
    for targets, said in (("all-linear", True), (["q_proj", "v_proj"], False)):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **more, mlp_only_layers=[0]))
        ard.wrap(model, ard.LoraConfig(r=2, target_modules=targets))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            ard.save_pretrained(model, tmp_path)
        texts = [str(w.message) for w in found]
        assert any("PEFT will compute something else" in text for text in texts) == said
