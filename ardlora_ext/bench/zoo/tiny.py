"""Every architecture of transformers, as small as its config lets it be made.

Configs are read, not listed: a field is known by what its name says (a width, a count, a token), in sub-configs too.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 96
MOST_PARAMETERS = 60_000_000

# Of several classes for one type the first: those people fine-tune.
_TASKS = (
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "CAUSAL_LM",
    "CTC",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "OBJECT_DETECTION",
    "DEPTH_ESTIMATION",
    "TIME_SERIES_PREDICTION",
)

# What a field's name says, and its small value; the first that fits.
_COUNTS: tuple[tuple[str, int], ...] = (
    (r"layers?_to|_per_layer|interval|shared_layers|first_k_dense|skip|offset|period", -1),  # relations: as they are
    (r"(kv|key_value)_?heads?$|num_query_groups|n_?groups$|multi_query_group", 2),
    (r"experts?_per|top_?k|moe_k$|num_shared_experts|n_shared_experts", 2),
    (r"experts$|num_local_experts|moe_num_experts|n_group$", 4),
    (r"heads?$|^n_head|num_heads", 4),
    (r"tokens_per_image", 4),
    (r"layers?$|num_blocks|^depth$|n_blocks", 2),
    (r"^vocab_size|vocab_size$|num_embeddings$", VOCABULARY),
)
_WIDTHS: tuple[tuple[str, int], ...] = (
    (r"state_size|conv|kernel|stride|patch|window|rank|codebook|bins|mel|fft|num_|^n_(?!embd|inner)", -1),
    (r"head_(dim|size|width)|^d_kv|head_dim$|key_value_proj_dim", 8),
    (r"intermediate|ffn|ff_dim|inner|feed_?forward|d_ff|mlp_dim", 64),
    (r"hidden_(size|dim)|d_model|n_embd|embed(ding)?_(dim|size)|_dim$|^dim$|width$|_channels$|^embed|hidden_size", 32),
)
_WAYS = ((0, 32), (16, 32), (16, 224), (4, 224), (1, 224))  # a divisor of widths, pixels a side
_IMAGE = r"(^|_)(image|img|input|crop)_size$"
_TOKEN = r"_(token_)?(id|index|idx)$"


def architectures() -> dict[str, str]:
    """Return the class to try for every model type of the installed transformers, by type."""
    found: dict[str, str] = {}
    for task in (*(f"FOR_{task}" for task in _TASKS), ""):
        mapping = getattr(modeling_auto, f"MODEL_{task}_MAPPING_NAMES".replace("__", "_"), {})
        for kind, name in mapping.items():
            found.setdefault(kind, name if isinstance(name, str) else name[0])
    return dict(sorted(found.items()))


def modality(model: PreTrainedModel) -> str:
    """Return what goes into a model, as a word."""
    names = " ".join(inspect.signature(model.forward).parameters)
    words = [
        word
        for word, pattern in (
            ("text", r"\binput_ids\b"),
            ("vision", r"\bpixel_values"),
            ("audio", r"\binput_(features|values)\b"),
        )
        if re.search(pattern, names)
    ]
    return "other" if not words else words[0] if len(words) == 1 else "multimodal"


def tiny_models(kind: str) -> Iterator[PreTrainedModel]:
    """Yield a model type in several sizes, the smallest way of writing its config first.

    A config may state one thing twice, and a rule that shrinks only one makes a model that cannot be built or called:
    then all widths are divided alike, or kept.

    Raises:
        Exception: whatever the last way raises, if no way builds.
    """
    model_class = getattr(transformers, architectures()[kind])
    last: Exception | None = None
    built = False
    for divisor, image in _WAYS:
        try:
            config = _small(CONFIG_MAPPING[kind](), divisor, image)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size:,} parameters")
            model = model_class(config)
        except Exception as cause:
            last = cause
            continue
        built = True
        yield model.eval()
    if not built and last is not None:
        raise last


def _small(config: PreTrainedConfig, divisor: int, image: int) -> PreTrainedConfig:
    """Return a config of the same class with small values; `divisor`: of widths, 0 for set ones."""
    values: dict[str, Any] = {}
    for name in _fields(type(config)):
        value = getattr(config, name, None)
        if isinstance(value, PreTrainedConfig):
            values[name] = _small(value, divisor, image)
        elif re.search(_IMAGE, name):
            values[name] = [image for _ in value] if isinstance(value, (list, tuple)) else image
        elif isinstance(value, dict) and "mrope_section" in value and not divisor:
            values[name] = {**value, "mrope_section": [2, 1, 1]}  # half of a head
        elif (small := _value(name, value, divisor)) is not None:
            values[name] = small
    return type(config)(**values)


def _fields(kind: type) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [entry.name for entry in dataclasses.fields(kind) if entry.init]
    return [name for name in inspect.signature(kind).parameters if name not in ("self", "kwargs")]


def _value(name: str, value: Any, divisor: int) -> Any:
    """Return the small value of a field, or None where it stays."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (list, tuple)):
        return _values(name, list(value), divisor)
    if not isinstance(value, int):
        return None
    if re.search(_TOKEN, name):
        return value % VOCABULARY if value >= VOCABULARY else None
    if (count := _by(_COUNTS, name)) is not None:
        keep = count < 0 or (divisor > 0 and ("head" in name or "group" in name))
        return None if keep else min(value, count)
    if (width := _by(_WIDTHS, name)) is not None and width > 0:
        small = max(value // divisor, min(width, 8)) if divisor else width
        return min(value, small)
    if name == "window_size":
        return min(value, 2) if not divisor else None
    if name == "max_position_embeddings" or name == "n_positions":
        return min(value, 512)
    return None


def _values(name: str, value: list[Any], divisor: int) -> Any:
    """Return the small values of a list: one a stage of a hierarchy, or one a layer."""
    if not value or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return None
    if re.search(r"depths|num_layers|layers$|blocks", name):
        return [min(v, 1) for v in value]
    if re.search(r"heads$", name):
        return None if divisor else [min(v, 2) for v in value]
    if re.search(r"hidden_sizes|embed_dims?|_dims$|channels|widths", name):
        return [max(v // divisor, 1) if divisor else min(v, 32) for v in value]
    return None


def _by(rules: tuple[tuple[str, int], ...], name: str) -> int | None:
    return next((small for pattern, small in rules if re.search(pattern, name)), None)
