"""What PEFT will make of our files: names that it reads otherwise than they are meant."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ardlora_ext.layers.tokens import TokenRows

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # PEFT saves none of these whole
_EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj", "gate")


def task_type(model: nn.Module) -> str | None:
    """Return PEFT's task type, whose wrapper expects the inputs of text.

    None for Whisper or BLIP, and for models that generate without a decoder of their own (LLaVA).
    """
    kind = type(model).__name__
    text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    found = next((task for suffix, task in _TASKS.items() if text and kind.endswith(suffix)), None)
    names = inspect.signature(model.forward).parameters
    return None if found == "SEQ_2_SEQ_LM" and "decoder_input_ids" not in names else found


def peft_saved(model: nn.Module, saved: Sequence[str], adapted: Iterable[str]) -> list[str]:
    """Return names for PEFT's modules_to_save: those of `saved`, or of their parts where PEFT misreads the whole.

    PEFT takes every module whose name ends alike, adapts nothing whose path holds the name, and saves no lists.
    """
    names, adapted = [name for name, _ in model.named_modules(remove_duplicate=False) if name], list(adapted)

    def readable(name: str) -> list[str]:
        module = model.get_submodule(name)
        if not module.state_dict():
            return []
        taken = [n for n in names if n.endswith(name) and n != name and n not in saved]
        taken += [n for n in adapted if re.match(rf"(^|.*\.){name}($|\..*)", n)]
        if not taken and not isinstance(module, _CONTAINERS):
            return [name]
        parts = [f"{name}.{key}" for key, child in module.named_children() if child.state_dict()]
        if parts and not module._parameters and not module._buffers:
            return [n for part in parts for n in readable(part)]
        warnings.warn(
            f"save_pretrained: PEFT will not load what was trained, for it takes '{(taken or [name])[0]}' for '{name}' "
            f"of modules_to_save too; load with ardlora_ext.load_pretrained, or leave '{name}' out of modules_to_save",
            stacklevel=5,
        )
        return [name]

    return [n for name in saved for n in readable(name)]


def say_what_peft_takes_for_experts(model: nn.Module, layers: Iterable[str], experts: bool) -> None:
    """Warn of dense layers that PEFT, by their last name alone, takes for the fused experts of such a model.

    Args:
        model: as it is saved.
        layers: names of the adapters.
        experts: whether the model has fused experts.
    """
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as fused
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # transformers before 5 has no fused experts
        return
    taken = [name for name in layers if name.rpartition(".")[2] in _EXPERT_NAMES]
    kind = getattr(getattr(model, "config", None), "model_type", None)
    kinds = {kind, *(type(module).__name__ for module in model.modules())}
    renamed = any(fused.get(k, k) in ("qwen2_moe", "mixtral") for k in kinds)
    converted = experts and isinstance(kind, str) and get_checkpoint_conversion_mapping(kind) is not None
    if taken and (renamed or converted):
        warnings.warn(
            f"save_pretrained: PEFT will compute something else, for it takes '{taken[0]}' for an expert of {kind}; "
            "load with ardlora_ext.load_pretrained, or adapt attention layers only",
            stacklevel=5,
        )


def say_what_peft_leaves_untied(model: nn.Module, tokens: Mapping[str, TokenRows]) -> None:
    """Warn of trained rows that PEFT keeps from what is tied to their embedding: it reads tying from a config."""
    rows = [id(layer.token_rows) for layer in tokens.values()]
    tied = [name for name, layer in tokens.items() if rows.index(id(layer.token_rows)) != list(tokens).index(name)]
    knows = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    if tied and not (knows and hasattr(model, "_tied_weights_keys")):
        warnings.warn(
            f"save_pretrained: PEFT will compute something else, for it does not know that '{tied[0]}' is tied to an "
            "embedding with trained rows; load with ardlora_ext.load_pretrained",
            stacklevel=5,
        )


def say_what_peft_adapts_once(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Warn of a layer with several names: PEFT puts an adapter at the first one only."""
    firsts = {id(layer): name for name, layer in layers.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        first = firsts.get(id(module), name)
        if first != name:
            warnings.warn(
                f"save_pretrained: PEFT will compute something else, for it adapts '{first}' but not '{name}', the "
                "same layer; load with ardlora_ext.load_pretrained",
                stacklevel=4,
            )
            return
