"""Every architecture of transformers, as small as its config lets it be made.

Configs are read, not listed: a field is known by what its name says (a width, a count, a token), in sub-configs too.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

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

_LAYERS = 0  # stands for the layers of the way
# What a field's name says, and its small value; the first that fits.
_COUNTS: tuple[tuple[str, int], ...] = (
    (r"layers?_to|_per_layer|interval|shared_layers|first_k_dense|skip|offset|period", -1),  # relations: as they are
    (r"(kv|key_value)_?heads?$|num_query_groups|n_?groups$|multi_query_group", 2),
    (r"experts?_per|top_?k|moe_k$|num_shared_experts|n_shared_experts", 2),
    (r"experts$|num_local_experts|moe_num_experts|n_group$", 4),
    (r"heads?$|^n_head|num_heads", 4),
    (r"tokens_per_image", 4),
    (r"layers?$|num_blocks|^depth$|n_blocks", _LAYERS),
    (r"^vocab_size|vocab_size$|num_embeddings$", VOCABULARY),
)
_WIDTHS: tuple[tuple[str, int], ...] = (
    (r"state_size|conv|kernel|stride|patch|window|rank|codebook|bins|mel|fft|num_|^n_(?!embd|inner)", -1),
    (r"head_(dim|size|width)|^d_kv|head_dim$|key_value_proj_dim", 8),
    (r"intermediate|ffn|ff_dim|inner|feed_?forward|d_ff|mlp_dim", 64),
    (r"hidden_(size|dim)|d_model|n_embd|embed(ding)?_(dim|size)|_dim$|^dim$|width$|_channels$|^embed|hidden_size", 32),
)


class _Way(NamedTuple):
    """How small: widths divided by `divisor`, or set (0); pixels a side; layers; head width where widths are set."""

    divisor: int
    image: int
    layers: int = 2
    head: int = 8


_WAYS = (_Way(0, 32), _Way(0, 32, 9), _Way(0, 32, 2, 128), _Way(16, 32), _Way(16, 224), _Way(4, 224), _Way(1, 224))
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
    for way in _WAYS:
        try:
            config = _small(CONFIG_MAPPING[kind](), way)
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


def _small(config: PreTrainedConfig, way: _Way) -> PreTrainedConfig:
    """Return a config of the same class with small values."""
    values: dict[str, Any] = {}
    found = {name: _read(config, name) for name in _fields(type(config))}
    depth, layers = _layers(config, found, way)
    for name, value in found.items():
        if isinstance(value, PreTrainedConfig):
            values[name] = _small(value, way)
        elif isinstance(value, list) and depth > 2 and len(value) == depth:  # one entry a layer: keep every kind
            kinds = [value.index(entry) for entry in value if value.index(entry) < layers]
            firsts = list(dict.fromkeys(value.index(entry) for entry in value))
            values[name] = [value[i] for i in sorted([*firsts, *kinds][:layers])]
        elif re.search(_IMAGE, name):
            values[name] = [way.image for _ in value] if isinstance(value, (list, tuple)) else way.image
        elif isinstance(value, dict) and "mrope_section" in value and not way.divisor and way.head == 8:
            values[name] = {**value, "mrope_section": [2, 1, 1]}  # half of a head
        elif (small := _value(name, value, way, layers)) is not None:
            values[name] = small
    return type(config)(**values)


def _read(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a property that differs from layer to layer
        return None


def _layers(config: PreTrainedConfig, found: dict[str, Any], way: _Way) -> tuple[int, int]:
    """Return how many layers a config has, and how many the small one gets: at least one of each kind."""
    depth = _read(config, "num_hidden_layers")
    if not isinstance(depth, int):
        return 0, way.layers
    kinds = [len({str(entry) for entry in v}) for v in found.values() if isinstance(v, list) and len(v) == depth]
    return depth, min(depth, max([way.layers, *(k for k in kinds if k < 6)]))


def _fields(kind: type) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [entry.name for entry in dataclasses.fields(kind) if entry.init]
    return [name for name in inspect.signature(kind).parameters if name not in ("self", "kwargs")]


def _value(name: str, value: Any, way: _Way, layers: int) -> Any:
    """Return the small value of a field, or None where it stays."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (list, tuple)):
        return _values(name, list(value), way)
    if not isinstance(value, int):
        return None
    if re.search(_TOKEN, name):
        return value % VOCABULARY if value >= VOCABULARY else None
    if (count := _by(_COUNTS, name)) is not None:
        relation = count < 0 or (way.divisor > 0 and ("head" in name or "group" in name))
        if "head" in name and way.head > 8:
            count = max(count // 2, 1)
        return None if relation else min(value, layers if count == _LAYERS else count)
    if (width := _by(_WIDTHS, name)) is not None and width > 0:
        if way.head > 8:
            width = way.head if width == 8 else 2 * way.head
        return min(value, max(value // way.divisor, min(width, 8)) if way.divisor else width)
    if name == "window_size":
        return min(value, 2) if not way.divisor else None
    if name in ("max_position_embeddings", "n_positions"):
        return min(value, 512)
    return None


def _values(name: str, value: list[Any], way: _Way) -> Any:
    """Return the small values of a list: one a stage of a hierarchy."""
    if not value or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return None
    if re.search(r"depths|num_layers|layers$|blocks", name):
        return [min(v, 1) for v in value]
    if re.search(r"heads$", name):
        return None if way.divisor else [min(v, 2) for v in value]
    if re.search(r"hidden_sizes|embed_dims?|_dims$|channels|widths", name):
        return [max(v // way.divisor, 1) if way.divisor else min(v, 32) for v in value]
    return None


def _by(rules: tuple[tuple[str, int], ...], name: str) -> int | None:
    return next((small for pattern, small in rules if re.search(pattern, name)), None)
