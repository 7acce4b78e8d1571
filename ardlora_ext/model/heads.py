"""Find which matrices belong to attention heads, and how they are cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from ardlora_ext.config import AdapterConfig
from ardlora_ext.native.units import UnitLayout

Cut = Literal["out", "in"]

# Names of attention projections in transformers (LLaMA, Mistral, Qwen, Gemma, Phi, BERT, ViT, GPT-2, NeoX, OPT, BART,
# T5, DistilBERT ...): q, k, v and fused forms are cut by output rows, the attention output by input columns.
_OUT = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query", "key", "value", "query_key_value", "c_attn", "qkv", "Wqkv")
_OUT_ATTENTION = ("q", "k", "v", "q_lin", "k_lin", "v_lin", "q_attn")
_IN = ("o_proj", "out_lin")
_IN_ATTENTION = ("out_proj", "c_proj", "dense", "o", "proj", "wo")
_ATTENTION = ("attn", "attention", "selfattention", "encdecattention")


def head_cut(name: str) -> Cut | None:
    """Return how the attention matrix `name` is cut, or None when it is not one."""
    path = name.split(".")
    leaf = path[-1]
    in_attention = any(part.lower().endswith(_ATTENTION) for part in path[:-1])
    if leaf in _OUT or (leaf in _OUT_ATTENTION and in_attention):
        return "out"
    if leaf in _IN or (leaf in _IN_ATTENTION and in_attention):
        return "in"
    return None


def config_head_dims(model: nn.Module, name: str = "") -> list[int]:
    """Return the head widths that transformers configs state for the module `name`, the nearest config first.

    Text and vision parts have configs, and head widths, of their own.
    """
    configs = []
    scope: Any = model
    for part in ["", *name.split(".")]:
        scope = getattr(scope, part, None) if part else scope
        configs.append(getattr(scope, "config", None))
    configs.reverse()
    configs += [getattr(configs[-1], part, None) for part in ("text_config", "vision_config")]
    dims: list[int] = []
    for config in configs:
        heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
        hidden = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
        dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
        if dim is None and isinstance(heads, int) and isinstance(hidden, int) and hidden % heads == 0:
            dim = hidden // heads
        if isinstance(dim, int):
            dims.append(dim)
    return dims


def _explicit(name: str, head_dim: int | Mapping[str, int | tuple[str, int]] | None) -> tuple[Cut, int] | None:
    cut = head_cut(name)
    if isinstance(head_dim, Mapping):
        for pattern, value in head_dim.items():
            if name == pattern or name.endswith("." + pattern):
                if isinstance(value, int):
                    return cut or "out", value
                side, dim = value
                if side not in ("in", "out"):
                    raise ValueError(f"head_dim: side of '{pattern}' must be 'in' or 'out', got {side!r}")
                return ("in" if side == "in" else "out"), dim
        return None
    return None if head_dim is None or cut is None else (cut, head_dim)


def unit_layout(model: nn.Module, name: str, in_features: int, out_features: int, config: AdapterConfig) -> UnitLayout:
    """Return how the matrix `name` [out_features, in_features] is cut into units.

    Raises:
        ValueError: the head width, given or read from the config, does not divide the features it cuts.
    """
    whole = UnitLayout("matrix", config.factoring, 1, in_features, out_features)
    if config.granularity != "head":
        return whole
    found = _explicit(name, config.head_dim)
    if found is None and config.head_dim is None:
        cut = head_cut(name)
        dims = config_head_dims(model, name)
        if cut is None or not dims:
            return whole
        features = out_features if cut == "out" else in_features
        found = cut, next((d for d in dims if features % d == 0), dims[0])
    if found is None:
        return whole
    cut, dim = found
    features = out_features if cut == "out" else in_features
    if dim < 1 or features % dim:
        raise ValueError(
            f"wrap: head_dim of '{name}' must divide its {features} {cut}put features, got {dim}; "
            "pass head_dim or granularity='matrix'"
        )
    kind: Literal["out_heads", "in_heads"] = "out_heads" if cut == "out" else "in_heads"
    return UnitLayout(kind, config.factoring, features // dim, in_features, out_features)
