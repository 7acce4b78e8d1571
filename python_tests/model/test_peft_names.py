"""Names as PEFT reads them: what it refuses, layers by number, ranks and scales by pattern."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconMambaConfig, Mamba2Config, MambaConfig

import ardlora_ext as ard
from ardlora_ext.checkpoint.reexport import reexport
from ardlora_ext.config import AdapterConfig

from helpers.models import trainable
from helpers.peft_adapters import assert_same, base, logits

pytestmark = pytest.mark.filterwarnings("ignore")

_MAMBA: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 40, "state_size": 8}
MAMBAS = {
    "mamba": MambaConfig(**_MAMBA),
    "falcon_mamba": FalconMambaConfig(**_MAMBA),
    "mamba2": Mamba2Config(**_MAMBA, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
}


def fill(model: nn.Module, seed: int = 0) -> None:
    """Give lora_B random rows: an adapter that does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in ard.adapters(model).values():
            rows = layer.layout.rows(layer.ranks)[1]
            layer.lora_B[:rows] = torch.randn(rows, layer.lora_B.shape[1], generator=generator) / 4


@pytest.mark.parametrize("name", MAMBAS)
def test_out_proj_of_mamba_is_left_out_and_refused_by_name(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MAMBAS[name]).eval()
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    for config in (
        ard.LoraConfig(target_modules=["in_proj", "out_proj"]),
        ard.LoraConfig(target_modules=r".*(in|out)_proj"),
    ):
        with pytest.raises(ValueError, match=r"target_modules must not take '.*mixer.out_proj' of a \w+ model, whose"):
            ard.wrap(model, config)
    ard.wrap(model, ard.LoraConfig())
    assert {n.split(".")[-1] for n in ard.adapters(model)} & {"in_proj", "out_proj"} == {"in_proj"}
    fill(model)
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    ard.save_pretrained(model, tmp_path)
    other = AutoModelForCausalLM.from_config(MAMBAS[name]).eval()
    other.load_state_dict(plain)
    assert_same(logits(model, batch), logits(peft.PeftModel.from_pretrained(other, tmp_path).eval(), batch))


class Deep(nn.Module):
    """Numbers at two depths, in two lists, and none."""

    def __init__(self) -> None:
        super().__init__()
        for kind in ("h", "blocks"):
            parts = [
                nn.ModuleDict({"fc": nn.Linear(8, 8), "e": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])})
                for _ in "ab"
            ]
            setattr(self, kind, nn.ModuleList(parts))
        self.fc = nn.Linear(8, 8)


def peft_targets(model: nn.Module, **options: Any) -> set[str]:
    found = peft.LoraModel(model, peft.LoraConfig(**options), "default")
    return {n.removeprefix("model.") for n, m in found.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["fc"], "layers_to_transform": [1]},
        {"target_modules": ["fc"], "layers_to_transform": 0},
        {"target_modules": ["fc", "e.1"], "layers_to_transform": [0], "layers_pattern": "blocks"},
        {"target_modules": ["0", "1", "fc"], "layers_to_transform": [0, 1], "layers_pattern": ["nothing", "h"]},
        {"target_modules": ["h.1.fc", "blocks.0.fc"], "layers_to_transform": [0]},
        {"target_modules": ["fc"], "layers_to_transform": []},
    ],
)
def test_layers_by_number_are_those_of_peft(options: dict[str, Any]) -> None:
    ours = set(ard.adapters(ard.wrap(Deep(), ard.LoraConfig(r=2, **options))))
    assert ours == peft_targets(Deep(), r=2, **options)


def test_layers_by_number_of_all_linear_and_what_is_refused() -> None:
    model = ard.wrap(base("llama")[0], ard.ArdConfig(mode="paper", granularity="head", r0=2, layers_to_transform=[1]))
    assert {name.split(".")[2] for name in ard.adapters(model)} == {"1"}
    for options, said in (
        ({"layers_to_transform": [7]}, r"layers_to_transform must be numbers of layers, got \(7,\) and no layer"),
        ({"layers_pattern": ["layers"]}, "layers_pattern must come with layers_to_transform"),
        ({"layers_to_transform": [1], "target_modules": ".*q_proj"}, "layers_to_transform must come with names"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be whole numbers"),
        ({"layers_to_transform": [-1]}, "layers_to_transform must be whole numbers"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must map names to whole numbers >= 1, got 0 for 'q_proj'"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map names to whole numbers"),
        ({"alpha_pattern": {"q_proj": -1.0}}, "alpha_pattern must map names to numbers > 0"),
        ({"rank_pattern": {"*q": 2}}, r"rank_pattern must .* regular expression"),
        ({"rank_pattern": {"q_porj": 2}}, r"rank_pattern must match a layer, got 'q_porj'; near misses: q_proj"),
    ):
        with pytest.raises(ValueError, match=said):
            ard.wrap(base("llama")[0], ard.LoraConfig(**options))


PATTERNS: dict[str, Any] = {
    "rank_pattern": {
        r"layers\.0\.self_attn\.q_proj": 2,
        "q_proj": 5,
        "(k|v)_proj": 3,
        "(.*)v_proj": 7,
        r"^model.layers.1.mlp.up_proj": 1,
    },
    "alpha_pattern": {"v_proj": 3, r".*layers\.1\.mlp\.down_proj": 11, ".*v_proj": 7, "(q|down)_proj": 5},
}


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_ranks_and_scales_by_pattern_are_those_of_peft(more: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        base("llama")[0],
        peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], **PATTERNS, **more
        ),
    )
    kind = ard.DoraConfig if more.get("use_dora") else ard.LoraConfig
    config = kind(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        use_rslora=bool(more.get("use_rslora")), **PATTERNS,
    )  # fmt: skip
    model, batch = base("llama")
    ard.wrap(model, config)
    for name, layer in ard.adapters(model).items():
        other: Any = theirs.get_submodule(f"base_model.model.{name}")
        assert (layer.ranks, layer.scaling) == ([other.r["default"]], other.scaling["default"])
    fill(model)
    expected = logits(model, batch)
    ard.save_pretrained(model, tmp_path / "a")
    loaded = ard.load_pretrained(base("llama")[0], tmp_path / "a")
    assert torch.equal(logits(loaded, batch), expected)
    assert_same(logits(peft.PeftModel.from_pretrained(base("llama")[0], tmp_path / "a").eval(), batch), expected)
    reexport(tmp_path / "a", tmp_path / "b", form="compact")
    assert_same(logits(peft.PeftModel.from_pretrained(base("llama")[0], tmp_path / "b").eval(), batch), expected)
    assert_same(logits(ard.merge(model), batch), expected)


def test_learned_ranks_start_where_the_pattern_says() -> None:
    config = ard.ArdConfig(mode="paper", r0=4, r_max=8, granularity="matrix", rank_pattern={"q_proj": 6, "v_proj": 1})
    model, batch = base("llama")
    ard.wrap(model, config)
    size = ard.parameters_report(model).live
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    controller = ard.attach(model, optimizer, total_steps=20)
    starts = {"q_proj": 6, "v_proj": 1}
    assert controller.ranks() == {n: [starts.get(n.split(".")[-1], 4)] for n in ard.adapters(model)}
    assert controller.summary()["budget"] == size
    for _ in range(20):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(ValueError, match="rank_pattern must be at most r_max = 8, got 9 for 'q_proj'"):
        ard.ArdConfig(mode="paper", granularity="head", r0=4, r_max=8, rank_pattern={"q_proj": 9})


@pytest.mark.parametrize(
    "config",
    [ard.ElaConfig(r=4, total_steps=99), ard.AdaConfig(init_r=4, target_r=2, total_steps=99)],
    ids=["ela", "ada"],
)
def test_methods_that_share_out_ranks_refuse_a_pattern(config: AdapterConfig) -> None:
    with pytest.raises(ValueError, match="rank_pattern must be empty, because ranks are shared out from one"):
        dataclasses.replace(config, rank_pattern={"q_proj": 2})
