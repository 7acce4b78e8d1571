"""Kinds of base model: which matrices have heads, gradients as of dense weights, PEFT's logits, merging."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.optim import AdamW
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import ardlora_ext as ard
from ardlora_ext.layers.linear import Conv1D, LoraLinear
from ardlora_ext.native import reference

from helpers.adapters import scramble
from helpers.models import VOCABULARY, Batch, bert, gpt2, llama, trainable, vit
from helpers.training import fast_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # PEFT
    pytest.mark.filterwarnings("ignore:save_pretrained.*was never called:UserWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def ids(length: int = 10) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 1, (2, length), generator=torch.Generator().manual_seed(1))


def neox() -> tuple[nn.Module, Batch]:
    """GPT-NeoX: q, k and v of a head side by side in one matrix."""
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)), {"input_ids": ids()}


def phi3() -> tuple[nn.Module, Batch]:
    """Phi-3: all q, then all k, then all v in one matrix; gate and up in another."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Phi3ForCausalLM(Phi3Config(**SIZES, **special, num_key_value_heads=2)), {"input_ids": ids()}


def t5() -> tuple[nn.Module, Batch]:
    """T5: cross-attention, and a head wider than d_model / heads."""
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config), {"input_ids": ids(), "decoder_input_ids": ids(6)}


def bart() -> tuple[nn.Module, Batch]:
    """BART: cross-attention whose q reads the decoder, k and v the encoder."""
    sides = {f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=16, **sides, **heads)
    return BartForConditionalGeneration(config), {"input_ids": ids(), "decoder_input_ids": ids(6)}


def paligemma2() -> tuple[nn.Module, Batch]:
    """PaliGemma-2: a SigLIP tower with heads of its own width, a projector, and Gemma-2 with grouped queries."""
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma2", **SIZES, "num_key_value_heads": 2, "head_dim": 16},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "vision_use_head": False,
        },
        image_token_index=VOCABULARY - 1,
        projection_dim=32,
        hidden_size=32,
    )
    tokens = torch.cat([torch.full((2, 4), VOCABULARY - 1), ids()], dim=1)  # 4 patches, then text
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "pixel_values": pixels, "attention_mask": torch.ones_like(tokens)}
    return PaliGemmaForConditionalGeneration(config), batch


BASES: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "llama": llama,
    "gpt2": gpt2,
    "neox": neox,
    "phi3": phi3,
    "t5": t5,
    "bart": bart,
    "bert": bert,
    "vit": vit,
    "paligemma2": paligemma2,
}
# Matrices with a rank per head, by a regular expression: how many heads, and whether rows (outputs) or columns (inputs)
# are theirs. All others are whole.
HEADS: dict[str, dict[str, tuple[str, int]]] = {
    "llama": {"q_proj": ("out_heads", 4), "[kv]_proj": ("out_heads", 2), "o_proj": ("in_heads", 4)},
    "gpt2": {"c_attn": ("out_heads", 12), r"attn\.c_proj": ("in_heads", 4)},
    "neox": {"query_key_value": ("out_heads", 12), r"attention\.dense": ("in_heads", 4)},
    "phi3": {"qkv_proj": ("out_heads", 8), "o_proj": ("in_heads", 4)},
    "t5": {r"Attention\.[qkv]": ("out_heads", 4), r"Attention\.o": ("in_heads", 4)},
    "bart": {"[qkv]_proj": ("out_heads", 4), "out_proj": ("in_heads", 4)},
    "bert": {"self.(query|key|value)": ("out_heads", 4), r"attention\.output\.dense": ("in_heads", 4)},
    "vit": {"[qkv]_proj": ("out_heads", 4), "o_proj": ("in_heads", 4)},
    "paligemma2": {
        r"vision_tower.*\.[qkv]_proj": ("out_heads", 2),
        r"vision_tower.*\.out_proj": ("in_heads", 2),
        r"language_model.*\.q_proj": ("out_heads", 4),
        r"language_model.*\.[kv]_proj": ("out_heads", 2),
        r"language_model.*\.o_proj": ("in_heads", 4),
    },
}


@pytest.fixture(params=list(BASES))
def base(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Batch]:
    """A name, a small random model in eval mode (no dropout), and a batch without labels."""
    torch.manual_seed(0)
    model, batch = BASES[request.param]()
    batch.pop("labels", None)
    return request.param, model.eval(), batch


def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch).logits
    return found


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A random direction of the logits: no entry is without a gradient."""
    found: torch.Tensor = model(**batch).logits
    return (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(2))).sum()


def test_what_has_a_rank_per_head(base: tuple[str, nn.Module, Batch]) -> None:
    name, model, batch = base
    plain = logits(model, batch)
    linears = {id(module) for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))}
    ard.wrap(model, ard.ArdConfig(mode="paper", granularity="head", r0=2))
    assert torch.equal(logits(model, batch), plain), "nothing is changed at the start"
    for module, layer in ard.adapters(model).items():
        cuts = [cut for pattern, cut in HEADS[name].items() if re.search(rf"{pattern}$", module)]
        assert [(layer.layout.kind, layer.layout.units)] == (cuts or [("matrix", 1)]), module
    adapted = {id(layer.base_layer) for layer in ard.adapters(model).values()}
    heads = {id(model.get_submodule(head)) for head in ("lm_head", "classifier") if hasattr(model, head)}
    assert adapted == linears - heads


def delta(layer: LoraLinear) -> torch.Tensor:
    """The dense update [out_features, in_features] as autograd sees it, unit by unit."""
    lay, gates, start = layer.layout, layer.gate, 0
    out = torch.zeros(lay.out_features, lay.in_features)
    for rank, cut in zip(layer.ranks, reference.unit_slices(lay, layer.ranks), strict=True):
        a_rows, b_rows, in_cols, out_cols = cut
        assert gates is not None
        gate = gates[start : start + rank].detach()
        full = torch.zeros_like(out)
        full[out_cols, in_cols] = layer.scaling * (layer.lora_B[b_rows] * gate[:, None]).T @ layer.lora_A[a_rows]
        out, start = out + full, start + rank
    return out


def test_gradients_are_those_of_dense_weights(base: tuple[str, nn.Module, Batch]) -> None:
    _, model, batch = base
    dense = copy.deepcopy(model).requires_grad_(True)
    ard.wrap(model, ard.ArdConfig(mode="paper", granularity="head", r0=2))
    scramble(model)
    layers = ard.adapters(model)
    updates = {module: delta(layer) for module, layer in layers.items()}
    weights = {module: dense.get_submodule(module).weight for module in layers}
    with torch.no_grad():
        for module, weight in weights.items():
            weight += updates[module].T if isinstance(dense.get_submodule(module), Conv1D) else updates[module]
    value, expected = loss(model, batch), loss(dense, batch)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-3)
    value.backward()
    slopes = torch.autograd.grad(expected, list(weights.values()))
    for (module, layer), slope in zip(layers.items(), slopes, strict=True):
        if not any(layer.ranks):
            continue
        if isinstance(dense.get_submodule(module), Conv1D):
            slope = slope.T
        wanted = torch.autograd.grad(updates[module], [layer.lora_A, layer.lora_B], slope)
        for factor, gradient in zip((layer.lora_A, layer.lora_B), wanted, strict=True):
            assert factor.grad is not None
            torch.testing.assert_close(factor.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("factoring", ["shared", "independent"])
def test_trained_ranks_reach_peft_and_the_merged_model(
    base: tuple[str, nn.Module, Batch], factoring: Any, tmp_path: Path
) -> None:
    _, model, batch = base
    original = copy.deepcopy(model)
    plain = logits(model, batch)
    ard.wrap(model, fast_config(head_dim=None, factoring=factoring))
    optimizer = AdamW(trainable(model), lr=0.02)
    controller = ard.attach(model, optimizer, total_steps=16)
    target = plain.roll(1, 0)
    for _ in range(16):
        (model(**batch).logits - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len({rank for units in controller.ranks().values() for rank in units}) > 1, "ranks moved"
    found = logits(model, batch)
    assert (found - plain).abs().max() > 0.01 * plain.abs().max()
    exported = ard.save_pretrained(model, tmp_path)
    assert exported.error == 0.0
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * float(found.abs().max())}
    served = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path).eval()
    torch.testing.assert_close(logits(served, batch), found, **tolerance)
    again = ard.load_pretrained(original, tmp_path).eval()
    assert torch.equal(logits(again, batch), found)
    torch.testing.assert_close(logits(ard.merge(model), batch), found, **tolerance)


def test_an_output_head_is_adapted_only_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = phi3()
    model.eval()
    original = copy.deepcopy(model)
    ard.wrap(model, ard.ArdConfig(mode="paper", granularity="head", r0=2, target_modules=["lm_head", "qkv_proj"]))
    scramble(model)
    assert ard.adapters(model)["lm_head"].layout.units == 1
    ard.save_pretrained(model, tmp_path)
    served = PeftModel.from_pretrained(original, tmp_path).eval()
    torch.testing.assert_close(logits(served, batch), logits(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "t5", "paligemma2"])
def test_embeddings_are_refused_and_what_is_there_is_named(name: str) -> None:
    model = BASES[name]()[0]
    embedding = next(n for n, m in model.named_modules() if isinstance(m, nn.Embedding)).rpartition(".")[2]
    with pytest.raises(
        ValueError, match=f"must match linear layers, got no match for '{embedding}'.*layers are named:"
    ):
        ard.wrap(model, ard.LoraConfig(target_modules=[embedding]))


def test_a_model_finds_the_attributes_of_its_layers() -> None:
    """T5 asks for the dtype of `wo.weight` in its forward pass."""
    layer = nn.Linear(8, 6)
    wrapped = ard.wrap(nn.Sequential(layer), ard.LoraConfig(r=2))[0]
    assert wrapped.weight is layer.weight
    assert wrapped.bias is layer.bias
    assert ard.wrap(nn.Sequential(nn.Linear(8, 6, bias=False)), ard.LoraConfig(r=2))[0].bias is None
    assert {name for name, _ in wrapped.named_parameters()} >= {"base_layer.weight", "base_layer.bias"}
    assert "weight" not in wrapped.state_dict()
