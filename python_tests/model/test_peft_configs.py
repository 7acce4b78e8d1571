"""PEFT's LoraConfig where ours is expected, and PEFT on a model that has our adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedTokenizerFast

import ardlora_ext as ard

from helpers.adapters import fingerprint
from helpers.experts import tiny_experts
from helpers.peft_adapters import base, trained_by_peft
from helpers.tiny_models import save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj"], "use_rslora": True}),
    ("llama", {"target_modules": r".*\.[12]\..*_proj", "lora_dropout": 0.1, "bias": "none"}),
    ("llama", {"task_type": "CAUSAL_LM"}),
    ("llama", {"r": 4, "target_modules": ["q_proj"], "use_dora": True, "rank_pattern": {"q_proj": 2}}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "alpha_pattern": {"q_proj": 3}}),
    ("bert", {"task_type": "SEQ_CLS"}),
    ("bert", {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"], "target_modules": ["query"]}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "pissa"}),
]


@pytest.mark.parametrize(("name", "options"), TAKEN)
def test_adapters_are_those_that_peft_would_make(name: str, options: dict[str, Any]) -> None:
    ours = base(name)[0]
    assert ard.wrap(ours, peft.LoraConfig(**options)) is ours
    theirs = peft.get_peft_model(base(name)[0], peft.LoraConfig(**options))
    layers = {n: m for n, m in theirs.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    found = ard.adapters(ours)
    assert found.keys() == layers.keys()
    for key, layer in found.items():
        other: Any = layers[key]
        drop = getattr(other.lora_dropout["default"], "p", 0.0)
        expected = [other.r["default"]], other.scaling["default"], drop, other.use_dora.get("default", False)
        assert (layer.ranks, layer.scaling, layer.lora_dropout, hasattr(layer, "lora_magnitude_vector")) == expected
    trained = {
        n.replace(".modules_to_save.default", "").removeprefix("base_model.model.")
        for n, p in theirs.named_parameters()
        if p.requires_grad and "lora_" not in n
    }
    assert trained == {n for n, p in ours.named_parameters() if p.requires_grad and "lora_" not in n}


STACKS: list[dict[str, Any]] = [
    {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    {"target_modules": ["q_proj"], "target_parameters": ["model.layers.1.mlp.experts.down_proj"]},
    {"target_modules": r".*\.[01]\.self_attn\.[qv]_proj", "target_parameters": ["down_proj"]},
    {"target_modules": "all-linear", "target_parameters": ["gate_up_proj"]},
    {"target_parameters": ["gate_up_proj"]},
]


@pytest.mark.parametrize("options", STACKS, ids=[str(options)[:60] for options in STACKS])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_target_parameters_are_the_stacks_that_peft_would_take(family: str, options: dict[str, Any]) -> None:
    if family == "mixtral" and options.get("target_modules") == "all-linear":
        pytest.skip("PEFT adds routers and all experts of families whose files have an expert each")
    ours = ard.wrap(tiny_experts(family), peft.LoraConfig(r=3, lora_alpha=5, **options))
    theirs = peft.get_peft_model(tiny_experts(family), peft.LoraConfig(r=3, lora_alpha=5, **options))
    wanted = set()
    for name, module in theirs.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.ParamWrapper):
            wanted.add(f"{name.replace('.base_layer', '')}.{module.parameter_name}")
        elif isinstance(module, peft.tuners.lora.LoraLayer):
            wanted.add(name)
    assert ard.adapters(ours).keys() == wanted
    for layer in ard.adapters(ours).values():
        assert set(layer.ranks) == {3}
        assert layer.scaling == pytest.approx(5 / 3)


REFUSED: list[tuple[Any, str]] = [
    (peft.LoraConfig(bias="all"), "peft.LoraConfig must leave bias at 'none', got 'all'"),
    (peft.LoraConfig(lora_bias=True), "must leave lora_bias at False, got True"),
    (
        peft.LoraConfig(target_parameters=["a.b"]),
        "target_parameters must name stacks of experts, got 'a.b'; name layers",
    ),
    (peft.LoraConfig(layer_replication=[(0, 1)]), "must leave layer_replication at None"),
    (peft.LoraConfig(use_qalora=True), "must leave use_qalora at False"),
    (peft.LoraConfig(init_lora_weights="gaussian"), "init_lora_weights .* must be True or 'pissa', got 'gaussian'"),
    (peft.LoraConfig(init_lora_weights=False), "init_lora_weights .* must be True or 'pissa', got False"),
    (peft.LoraConfig(inference_mode=True), "must leave inference_mode at False"),
    (peft.LoraConfig(ensure_weight_tying=True), "must leave ensure_weight_tying at False"),
    (peft.AdaLoraConfig(total_step=9), r"got AdaLoraConfig; write ardlora_ext.AdaConfig\(init_r=..., target_r=...\)"),
    (peft.IA3Config(), r"config must be one of ardlora_ext's \(.*\) or a peft.LoraConfig, got IA3Config"),
    ({"r": 8}, "or a peft.LoraConfig, got dict"),
]


@pytest.mark.parametrize(("config", "said"), REFUSED, ids=[said[:30] for _, said in REFUSED])
def test_what_has_no_counterpart_is_refused_by_name(config: Any, said: str) -> None:
    model = base("llama")[0]
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"wrap: .*{said}"):
        ard.wrap(model, config)
    assert fingerprint(model) == before


def test_everything_that_takes_a_config_takes_that_of_peft(tmp_path: Path) -> None:
    model = ard.wrap(base("llama")[0], peft.LoraConfig(target_modules=["q_proj"]))
    ard.add_adapter(model, "other", peft.LoraConfig(target_modules=["v_proj"]))
    trained_by_peft(tmp_path, "llama")
    ard.load_adapter(model, tmp_path, "third", peft.LoraConfig())
    ard.load_peft(base("llama")[0], tmp_path, peft.LoraConfig())
    with pytest.raises(ValueError, match='target_modules must name layers, or be "all-linear", got None for None'):
        ard.wrap(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig())


def test_trl_imported_after_wrap_is_refused_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = ard.wrap(base("llama")[0], ard.LoraConfig(r=2))
    save_tokenizer(tmp_path, eos_token="</s>", pad_token="[PAD]")
    own = getattr(BaseTuner.inject_adapter, "__wrapped__", BaseTuner.inject_adapter)
    monkeypatch.setattr(BaseTuner, "inject_adapter", own)  # as if PEFT had not been there
    with pytest.raises(ValueError, match="with TRL, leave out peft_config and pass callbacks="):
        SFTTrainer(
            model,
            SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False),
            train_dataset=Dataset.from_list([{"input_ids": [1, 2, 3]}]),
            processing_class=PreTrainedTokenizerFast.from_pretrained(tmp_path),
            peft_config=peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
            callbacks=[ard.RankCallback()],
        )


def test_peft_on_ours_is_refused_with_the_way() -> None:
    model = ard.wrap(base("llama")[0], ard.LoraConfig(r=2))
    before = fingerprint(model)
    for put in (
        lambda: peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")),
        lambda: model.add_adapter(peft.LoraConfig(target_modules=["q_proj"])),  # type: ignore[operator]
    ):
        with pytest.raises(
            ValueError, match=r"must not have adapters of ardlora_ext already; with TRL, leave out peft_"
        ):
            put()
    assert fingerprint(model) == before
    peft.get_peft_model(ard.unwrap(model), peft.LoraConfig(target_modules=["q_proj"]))(torch.arange(4).view(1, 4))
