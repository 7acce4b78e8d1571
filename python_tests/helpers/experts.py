"""Models with stacks of experts: tiny ones of transformers' families, and a bed of planted ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_COUNTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
_JAMBA = {"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0}
FAMILIES: dict[str, dict[str, Any]] = {  # model_type: what it needs beside TINY
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_COUNTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**_COUNTS, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "deepseek_v2": {**_DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": {**_DEEPSEEK, "num_key_value_heads": 2, "head_dim": 8},
    "dots1": {**_DEEPSEEK, "num_key_value_heads": 2, "head_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 0},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "jamba": {"num_experts": 4, "num_experts_per_tok": 2, **_JAMBA},
    "lfm2_moe": {**_COUNTS, "num_dense_layers": 0, "layer_types": ["full_attention"] * 2},
    "qwen3_next": {
        **_COUNTS,
        "head_dim": 8,
        "layer_types": ["full_attention"] * 2,
    },
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2},
    **dict.fromkeys(
        ("granitemoeshared", "granitemoe_swa", "minimax_m2", "solar_open", "cohere2_moe", "mellum"), _LOCAL
    ),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "axk1"), _DEEPSEEK),
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 40, "head_dim": 8},
}


def tiny_experts(family: str) -> Any:
    """A random causal language model of a family, in eval mode."""
    torch.manual_seed(0)
    values = TINY | FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # some families leave experts as they come from memory
            if parameter.ndim == 3:
                parameter.normal_(0.0, 0.1)
    return model.eval()


def tokens(rows: int = 4, length: int = 32) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(5))


class StackedExperts(nn.Module):
    """One stacked weight [experts, out, in] by which rows are multiplied, sorted or not."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.weight = nn.Parameter(torch.randn(experts, width, width) / width**0.5)

    def forward(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Multiply rows sorted by expert."""
        offs = torch.tensor(counts).cumsum(0).int()
        return F.grouped_mm(x, self.weight.transpose(-2, -1), offs=offs)


class ExpertBed(nn.Module):
    """Experts that have to learn an update of their own planted rank each.

    `counts` says how many tokens each sees, on average if they `vary`; `noise` is the deviation of what they aim at.
    """

    def __init__(self, planted: Sequence[int], counts: Sequence[int], noise: float = 0.3, vary: bool = False) -> None:
        super().__init__()
        self.planted, self.counts, self.width, self.noise, self.vary = planted, counts, 24, noise, vary
        self.experts = StackedExperts(len(planted), self.width)
        generator = torch.Generator().manual_seed(1)
        updates = []
        width = self.width
        for rank in planted:
            left, right = (torch.linalg.qr(torch.randn(width, width, generator=generator)).Q for _ in range(2))
            updates.append(left[:, :rank] @ torch.diag(torch.linspace(2, 1, rank)) @ right[:rank])
        self.updates = torch.stack(updates)
        self.target = self.experts.weight.detach() + self.updates

    def loss(self) -> torch.Tensor:
        counts = torch.tensor(self.counts)
        counts = torch.poisson(counts.float()).long() if self.vary else counts
        experts = torch.arange(len(self.planted)).repeat_interleave(counts)
        x = torch.randn(len(experts), self.width)
        noisy = torch.einsum("mk,mnk->mn", x, self.target[experts]) + self.noise * torch.randn(len(x), self.width)
        return (self.experts(x, counts.tolist()) - noisy).square().sum(dim=1).mean()
