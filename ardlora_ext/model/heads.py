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


# What attention modules of transformers call the width of a head; MLA has one for q and another for v and the output.
_WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_head", "attention_head_dim")
_OWN_WIDTHS = {"o_proj": "v_head_dim", "q_proj": "qk_head_dim"}
_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
_SIZES = ("embed_dim", "hidden_size", "d_model", "all_head_size")


def _number(owner: Any, *names: str) -> int | None:
    """Return the first of these attributes that is one positive number; a config may raise, or hold one per layer."""
    for name in names:
        try:
            value = getattr(owner, name, None)
        except Exception:  # a stranger's property: whatever it raises, it states no one number
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _width(owner: Any, leaf: str = "") -> int | None:
    """Return the head width that a module or a config states."""
    own = (_OWN_WIDTHS[leaf],) if leaf in _OWN_WIDTHS else ()
    if (stated := _number(owner, *own, *_WIDTHS, "d_kv")) is not None:
        return stated
    count, size = _number(owner, *_COUNTS), _number(owner, *_SIZES)
    return size // count if count and size and size % count == 0 else None


def head_dims(model: nn.Module, name: str = "") -> list[int]:
    """Return the head widths that are stated for the matrix `name`, the nearest first.

    By the attention module it is in, which may differ from layer to layer, then by the configs of transformers: text
    and vision parts have configs, and head widths, of their own.
    """
    owners: list[Any] = [model]
    for part in name.split(".") if name else []:
        owners.append(getattr(owners[-1], part, None))
    owners.reverse()
    configs = [getattr(owner, "config", None) for owner in owners]
    configs += [getattr(configs[-1], part, None) for part in ("text_config", "vision_config")]
    widths = [_width(owner, name.rpartition(".")[2]) for owner in owners[1:3]] + [_width(c) for c in configs]
    return list(dict.fromkeys(width for width in widths if width is not None))


def uncut(model: nn.Module, layouts: Mapping[str, UnitLayout], config: AdapterConfig) -> list[str]:
    """Return the attention matrices of a model with a config that stay whole though heads were asked for."""
    if config.granularity != "head" or config.head_dim is not None or getattr(model, "config", None) is None:
        return []
    return [name for name, layout in layouts.items() if layout.kind == "matrix" and head_cut(name) is not None]


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
        ValueError: the head width of `config.head_dim` does not divide the features it cuts.
    """
    whole = UnitLayout("matrix", config.factoring, 1, in_features, out_features)
    if config.granularity != "head":
        return whole
    found = _explicit(name, config.head_dim)
    if found is None and config.head_dim is None:
        cut = head_cut(name)
        features = out_features if cut == "out" else in_features
        fitting = [d for d in head_dims(model, name) if features % d == 0] if cut is not None else []
        if cut is None or not fitting:
            return whole
        found = cut, fitting[0]
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
