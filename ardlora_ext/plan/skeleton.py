"""Models without weights: a transformers config becomes a model of fake tensors, which have shapes and no memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PaliGemmaConfig,
    Qwen3MoeConfig,
    ViTConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ardlora_ext.errors import InputError, first_line


def _llama(hidden: int, inner: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )


def _paligemma() -> PaliGemmaConfig:
    """PaliGemma 2, 3B, 224 pixels: Gemma 2 2B and SigLIP So400m/14."""
    text = {
        "model_type": "gemma2",
        "vocab_size": 257216,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "vision_use_head": False,
        "projection_dim": 2304,
    }
    return PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=2304, hidden_size=2304)


BUILT_IN: dict[str, Callable[[], Any]] = {
    "llama-3.1-8b": lambda: _llama(4096, 14336, 32, 32),
    "llama-3.1-70b": lambda: _llama(8192, 28672, 80, 64),
    "llama-3.1-405b": lambda: _llama(16384, 53248, 126, 128),
    "paligemma-2-3b": _paligemma,
    "mixtral-8x7b": lambda: MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "qwen3-30b-a3b": lambda: Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
    ),
    "gpt-oss-20b": lambda: GptOssConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
    ),
    "deepseek-v3": lambda: DeepseekV3Config(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        first_k_dense_replace=3,
        kv_lora_rank=512,
        q_lora_rank=1536,
    ),
    "smollm2-135m-instruct": lambda: LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "all-minilm-l6-v2": lambda: BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    ),
    "bert-base": BertConfig,
    "vit-base": ViTConfig,
}


def skeleton(name: str, dtype: torch.dtype) -> tuple[str, nn.Module]:
    """Return (name, model of fake CPU tensors) of a built-in name or of a folder with a config.json.

    The head is the one a fine-tuning would give it: language model, sequence or image classifier.

    Raises:
        InputError: there is no such model, or transformers cannot build it.
    """
    config = BUILT_IN[name.lower()]() if name.lower() in BUILT_IN else _read(Path(name))
    return Path(name).name, empty_model(auto_class(config), config, dtype)


def empty_model(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """Build a model by `kind.from_config` out of fake CPU tensors.

    Raises:
        InputError: transformers cannot build it.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _no_initial_weights():
        try:
            model: nn.Module = kind.from_config(config, dtype=dtype)
            model.tie_weights()  # type: ignore[operator]
        except Exception as error:  # its classes check a config in their own ways, and not all of it
            text = f"plan: transformers cannot build a {config.model_type} model: {first_line(error)}"
            raise InputError(text) from error
    return model


def _no_initial_weights() -> AbstractContextManager[Any]:
    """Transformers' initialisers look at values, and there are none."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers 4
        from transformers.modeling_utils import no_init_weights
    context: AbstractContextManager[Any] = no_init_weights()
    return context


def fake_mode(model: nn.Module) -> FakeTensorMode:
    """Return the mode under which a skeleton's tensors live."""
    parameter = next(iter(model.parameters()))
    if not isinstance(parameter.data, FakeTensor):
        raise TypeError("plan: model must be a skeleton of fake tensors")
    return parameter.data.fake_mode


def _read(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"plan: MODEL must be a folder with a config.json or one of {', '.join(BUILT_IN)}, got {folder}"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a wrong type in it has an error class of its own in each version
        text = f"plan: {folder / 'config.json'} must be a transformers config: {first_line(error)}"
        raise InputError(text) from error


def auto_class(config: Any) -> Any:
    """Return the transformers Auto class that fine-tunes models of this config."""
    kind = config.model_type
    if getattr(config, "vision_config", None) is not None and getattr(config, "text_config", None) is not None:
        return AutoModelForImageTextToText
    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return AutoModelForSequenceClassification
    if kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return AutoModelForImageClassification
    return AutoModel
