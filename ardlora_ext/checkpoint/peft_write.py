"""What PEFT and servers read: plain LoRA factors, written so that every loader gives them the trained scale.

Units, gates and scaling are folded into B. `portable` form: every module is zero-padded to one rank R and
`r = lora_alpha = R`, so PEFT, vLLM and llama.cpp all compute a scale of 1. `compact` form: every module keeps its rank
r_i and patterns tell it, so PEFT and vLLM compute 1, but llama.cpp R / r_i.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ardlora_ext.json_file import non_finite
from ardlora_ext.model.parameters import served_rank

Form = Literal["portable", "compact"]
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_ROWS = ".token_adapter.trainable_tokens_delta"  # after the name of an embedding: trained rows, not their change


@dataclass(frozen=True)
class Exported:
    """What `save_pretrained` wrote for PEFT and servers.

    Attributes:
        r: rank in adapter_config.json, the largest a server must hold.
        ranks: of each module's tensors.
        errors: by module, ||dW' - dW|| / ||dW|| (Frobenius) that `compress` left; 0 where nothing was cut.
    """

    r: int
    ranks: dict[str, int]
    errors: dict[str, float]

    @property
    def error(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values(), default=0.0)


def truncated(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the best factors of B A of this rank, and what is lost: QR of both, SVD of the small core.

    Of a stack, the best of each expert; what is lost is a share of all.
    """
    (qa, ra), (qb, rb) = torch.linalg.qr(a.double().mT), torch.linalg.qr(b.double())
    u, values, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    root = values[..., :rank].sqrt()
    lost = float(values[..., rank:].norm() / values.norm().clamp(min=1e-300))
    return (
        (root[..., None] * (vh[..., :rank, :] @ qa.mT)).float(),
        ((qb @ u[..., :rank]) * root[..., None, :]).float(),
        lost,
    )


def _padded(rows: torch.Tensor, rank: int) -> torch.Tensor:
    out = rows.new_zeros(*rows.shape[:-2], rank, rows.shape[-1])
    out[..., : rows.shape[-2], :] = rows
    return out


@dataclass(frozen=True)
class StackPlace:
    """How PEFT sees a stack of experts.

    Attributes:
        order: of the parameter among the stacks of its module: PEFT's wrappers nest in it, the first innermost.
        exchanged: whether PEFT takes the outputs for inputs: [experts, in, out] that the module does not call
            transposed.
    """

    order: int
    exchanged: bool


def stack_prefixes(stacks: Mapping[str, StackPlace]) -> dict[str, str]:
    """Return where PEFT keeps the factors of each stack by the full name of its parameter: `module[.base_layer]*`."""
    found = {}
    for name, place in stacks.items():
        module = name.rpartition(".")[0]
        outside = [n for n, p in stacks.items() if n.rpartition(".")[0] == module and p.order > place.order]
        found[name] = module + ".base_layer" * len(outside)
    return found


def pack_stack(a: torch.Tensor, b: torch.Tensor, exchanged: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PEFT's lora_A [experts r, in] and lora_B [out, r experts]: the expert is slowest in A, fastest in B.

    Args:
        a: [experts, r, in].
        b: [experts, out, r].
        exchanged: see `StackPlace`.
    """
    if exchanged:
        a, b = b.mT, a.mT
    return a.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()


def unpack_stack(
    lora_A: torch.Tensor, lora_B: torch.Tensor, experts: int, exchanged: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (a [experts, r, in], b [experts, out, r]): undoes `pack_stack`."""
    a, b = lora_A.view(experts, -1, lora_A.shape[1]), lora_B.view(len(lora_B), -1, experts).permute(2, 0, 1)
    return (b.mT, a.mT) if exchanged else (a, b)


def peft_files(
    folded: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    magnitudes: Mapping[str, torch.Tensor],
    saved: Mapping[str, torch.Tensor],
    about: Mapping[str, Any],
    form: Form,
    limit: int | None,
    stacks: Mapping[str, StackPlace],
) -> tuple[dict[str, Any], dict[str, torch.Tensor], Exported]:
    """Return PEFT's adapter_config, its tensors, and what became of the ranks.

    Args:
        folded: plain factors (A [r, in_features], B [out_features, r]) by module, their product the update. Of stacks
            of experts by parameter, with a leading axis of experts.
        magnitudes: DoRA's, by module; none for other methods.
        saved: tensors of `modules_to_save` and rows of embeddings by full name.
        about: what the config says of the base model.
        form: see `save_pretrained`.
        limit: largest rank of a module, or None.
        stacks: which of `folded` are stacks of experts.
    """
    dora = bool(magnitudes)
    live = {name: factors for name, factors in folded.items() if dora or factors[0].shape[-2] > 0}
    errors = dict.fromkeys(live, 0.0)
    for name, (a, b) in live.items():
        if limit is not None and a.shape[-2] > limit:
            a, b, errors[name] = truncated(a, b, limit)
            live[name] = a, b
    ranks = {name: max(1, a.shape[-2]) for name, (a, _) in live.items()}
    rank = max((1, *ranks.values()))
    if form == "portable":
        rank = served_rank(rank) if limit is None else min(served_rank(rank), limit)
        ranks = dict.fromkeys(ranks, rank)
    patterns = {"^" + re.escape(name): r for name, r in ranks.items() if r != rank}
    tensors = {}
    places = stack_prefixes({name: place for name, place in stacks.items() if name in live})
    for name, (a, b) in live.items():
        prefix = f"base_model.model.{places.get(name, name)}"
        a, b = _padded(a, ranks[name]), _padded(b.mT, ranks[name]).mT.contiguous()
        if dora:  # PEFT takes the norm of W + B A itself, at a scale of 1
            tensors[f"{prefix}.lora_magnitude_vector"] = magnitudes[name]
        if name in places:
            a, b = pack_stack(a, b, stacks[name].exchanged)
        tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = a, b
    tensors |= {f"base_model.model.{name}": value for name, value in saved.items()}
    config: dict[str, Any] = {
        **about,
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "use_dora": dora,
        "bias": "none",
        "target_modules": sorted(live.keys() - places.keys()),
        "target_parameters": sorted(places) or None,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
    }
    return config, tensors, Exported(rank, ranks, errors)


def check_json(op: str, state: Any) -> None:
    """Check that a state can be written.

    Raises:
        ValueError: a number in it is NaN or Inf.
    """
    where = non_finite(state)
    if where is not None:
        raise ValueError(
            f"{op}: numbers of the state must be finite, got NaN or Inf in {where}: a gradient was too large for its "
            "type; clip gradients, and go on from an earlier checkpoint"
        )


def to_json(value: Any) -> bytes:
    """Return the bytes of a JSON file."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def check_form(op: str, form: str, compress: int | None) -> None:
    """Check the options of an export.

    Raises:
        ValueError: one is out of range.
    """
    if form not in ("portable", "compact"):
        raise ValueError(f"{op}: form must be 'portable' or 'compact', got {form!r}")
    if compress is not None and compress < 1:
        raise ValueError(f"{op}: compress must be >= 1, got {compress}")
