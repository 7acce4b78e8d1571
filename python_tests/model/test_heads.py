"""Heads are found where their width is stated: by the attention module, layer by layer, or by the config."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
import transformers
from torch import nn

import ardlora_ext as ard

GEMMA4 = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "vocab_size_per_layer_input": 60,
    "hidden_size_per_layer_input": 8,
    "head_dim": 8,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}


class Stated(nn.Module):
    """One attention projection under a config that states whatever it is given."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.q_proj(x)
        return y


class PerLayer:
    """A config that cannot say one number for all layers, as Gemma-4's."""

    @property
    def head_dim(self) -> int:
        raise RuntimeError("ask the layer")


def test_gemma4_has_heads_of_each_layers_own_width() -> None:
    config = transformers.Gemma4TextConfig(**GEMMA4)
    model = ard.wrap(transformers.Gemma4ForCausalLM(config), ard.ArdConfig(mode="paper", granularity="head", r0=2))
    layers = ard.adapters(model)
    widths = {}
    for name in ("q_proj", "k_proj", "o_proj"):
        for i in (0, 1):
            layout = layers[f"model.layers.{i}.self_attn.{name}"].layout
            assert layout.kind == ("in_heads" if name == "o_proj" else "out_heads")
            features = layout.in_features if name == "o_proj" else layout.out_features
            widths[name, i] = features // layout.units
    assert widths == {(n, i): (8, 16)[i] for n in ("q_proj", "k_proj", "o_proj") for i in (0, 1)}
    ids = torch.randint(3, 60, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()


def test_mla_has_a_width_for_q_and_another_for_the_output() -> None:
    config = transformers.DeepseekV3Config(
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        vocab_size=50,
        first_k_dense_replace=1,
    )
    layers = ard.adapters(
        ard.wrap(transformers.DeepseekV3ForCausalLM(config), ard.ArdConfig(mode="paper", granularity="head", r0=2))
    )
    units = {n.rpartition(".")[2]: layer.layout.units for n, layer in layers.items() if "self_attn" in n}
    assert units["q_proj"] == units["o_proj"] == 4


@pytest.mark.parametrize(
    "config",
    [
        PerLayer(),
        types.SimpleNamespace(head_dim=[8, 16]),
        types.SimpleNamespace(num_attention_heads=[4, 2], hidden_size=32),
        types.SimpleNamespace(head_dim=5),
        types.SimpleNamespace(head_dim=True),
        types.SimpleNamespace(num_attention_heads=0, hidden_size=32),
        types.SimpleNamespace(),
    ],
    ids=["raises", "list", "list of counts", "does not divide", "bool", "zero", "silent"],
)
def test_a_config_without_one_fitting_number_leaves_whole_matrices_with_a_word(config: object) -> None:
    with pytest.warns(UserWarning, match="no head width is stated that divides 'q_proj'"):
        model = ard.wrap(Stated(config), ard.ArdConfig(mode="paper", granularity="head", r0=2))
    assert ard.adapters(model)["q_proj"].layout.kind == "matrix"


def test_the_module_is_asked_before_the_config() -> None:
    model = Stated(types.SimpleNamespace(head_dim=16))
    model.head_dim = 8  # type: ignore[assignment]
    assert (
        ard.adapters(ard.wrap(model, ard.ArdConfig(mode="paper", granularity="head", r0=2)))["q_proj"].layout.units == 4
    )


def test_who_asks_for_whole_matrices_hears_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ard.wrap(Stated(PerLayer()), ard.ArdConfig(mode="paper", r0=2, granularity="matrix"))
