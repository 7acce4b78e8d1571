"""Small random models of each architecture, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)


class Attention(nn.Module):
    """A block without a transformers config: 4 heads of 8, and an MLP."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o_proj(torch.tanh(self.q_proj(x)))
        out: torch.Tensor = self.down(torch.relu(self.up(x)))
        return out


Batch = dict[str, torch.Tensor]
VOCABULARY = 64


def _tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(1))


def llama() -> tuple[nn.Module, Batch]:
    """LLaMA with grouped-query attention: 4 query heads, 2 key-value heads."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ids = _tokens()
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def bert() -> tuple[nn.Module, Batch]:
    """BERT with a classification head."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )
    return BertForSequenceClassification(config), {"input_ids": _tokens(), "labels": torch.tensor([0, 1, 2, 1])}


def gpt2() -> tuple[nn.Module, Batch]:
    """GPT-2: Conv1D layers and a fused qkv."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ids = _tokens()
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def vit() -> tuple[nn.Module, Batch]:
    """ViT with a classification head."""
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return ViTForImageClassification(config), {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 1])}


ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "llama": llama,
    "bert": bert,
    "gpt2": gpt2,
    "vit": vit,
}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters an optimizer should hold."""
    return [p for p in model.parameters() if p.requires_grad]
