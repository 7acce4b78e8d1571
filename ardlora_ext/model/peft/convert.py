"""PEFT's LoraConfig where one of ours is expected: what it says, said our way, or refused by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import nn

from ardlora_ext.config import AdapterConfig, DoraConfig, LoraConfig
from ardlora_ext.layers.expert_stacks import expert_stacks

# Options that are ours under the same name.
_SHARED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "modules_to_save",
    "trainable_token_indices",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
_ELSEWHERE = (
    *(
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "use_dora",
        "init_lora_weights",
        "task_type",
    ),  # read below
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),  # about files
    *("fan_in_fan_out", "runtime_config", "qalora_group_size", "megatron_core"),  # read from the model, or of no effect
)
_HEADED = ("SEQ_CLS", "TOKEN_CLS")  # tasks whose head PEFT saves beside `modules_to_save`


class PeftLoraConfig(Protocol):
    """A `peft.LoraConfig`, which need not be installed."""

    peft_type: Any
    use_dora: bool


def check_config(op: str, config: object) -> None:
    """Check that it is a config: one of ours, or PEFT's.

    Raises:
        ValueError: it is something else; the message says what to write.
    """
    kind = type(config)
    if isinstance(config, AdapterConfig) or (kind.__name__ == "LoraConfig" and kind.__module__.startswith("peft.")):
        return
    counterpart = {"AdaLoraConfig": "ardlora_ext.AdaConfig(init_r=..., target_r=...)"}.get(kind.__name__)
    raise ValueError(
        f"{op}: config must be one of ardlora_ext's (ArdConfig, ElaConfig, AdaConfig, LoraConfig, DoraConfig) or a "
        f"peft.LoraConfig, got {kind.__name__}{f'; write {counterpart}' if counterpart else ''}"
    )


def own_config(op: str, config: AdapterConfig | PeftLoraConfig, model: nn.Module) -> AdapterConfig:
    """Return `config`, or what it is in our words if it is PEFT's.

    Args:
        op: who asks, for messages.
        config: of any method, or a `peft.LoraConfig`, which becomes `LoraConfig` or, with `use_dora`, `DoraConfig`.
        model: tells PEFT's default targets and which heads it has.

    Raises:
        ValueError: it is something else, or has an option without counterpart; the message says what to write.
    """
    check_config(op, config)
    if isinstance(config, AdapterConfig):
        return config
    said = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}  # type: ignore[arg-type]
    _check_rest(op, config, said)
    values = {name: said[name] for name in _SHARED if said[name] not in (None, {}, [])}
    values["modules_to_save"] = _saved(said, model)
    stacks = _stacks(op, said["target_parameters"] or (), model)
    targets = _targets(op, said["target_modules"], model, needed=not stacks)
    excluded = said["exclude_modules"]
    if targets == "all-linear" and stacks:  # which ours take stacks for, PEFT's do not
        excluded = _either(excluded or (), [name for name in expert_stacks(model) if name not in stacks])
    elif stacks:
        targets = _either(targets, stacks)
    values["target_modules"] = targets
    values["exclude_modules"] = excluded if isinstance(excluded, str) else sorted(excluded or ())
    values["init"] = _start(op, said["init_lora_weights"])
    return (DoraConfig if said["use_dora"] else LoraConfig)(**values)


_WAYS = {
    "bias": "; modules_to_save trains whole layers",
}


def _check_rest(op: str, config: PeftLoraConfig, said: dict[str, Any]) -> None:
    """Check that every option without counterpart is as PEFT has it by default."""
    for entry in dataclasses.fields(config):  # type: ignore[arg-type]
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        value = said[entry.name]
        if entry.name in (*_SHARED, *_ELSEWHERE) or value == default or value in (None, False, "none", {}, []):
            continue
        way = _WAYS.get(entry.name, "")
        raise ValueError(f"{op}: peft.LoraConfig must leave {entry.name} at {default!r}, got {value!r:.60}{way}")


def _start(op: str, start: Any) -> str:
    found = {"True": "default", "pissa": "pissa"}.get(str(start))
    if found is None:
        raise ValueError(
            f"{op}: init_lora_weights of peft.LoraConfig must be True or 'pissa', got {start!r}; LoraConfig(init=...) "
            "has 'orthogonal' and 'gradient'"
        )
    return found


def _saved(said: dict[str, Any], model: nn.Module) -> list[str] | None:
    """Return `modules_to_save`; for classification PEFT adds the head, which None stands for here."""
    if not said["modules_to_save"]:
        return None
    task = getattr(said["task_type"], "value", said["task_type"])
    names = {name for name, _ in model.named_children()}
    added = [head for head in ("classifier", "score") if task in _HEADED and head in names]
    return list(dict.fromkeys([*said["modules_to_save"], *added]))


def _stacks(op: str, names: Iterable[str], model: nn.Module) -> list[str]:
    """Return the stacks of experts that PEFT would take for `target_parameters`: by the end of their names."""
    known, parameters = expert_stacks(model), [name for name, _ in model.named_parameters()]
    found = []
    for name in names:
        own = [full for full in parameters if f".{full}".endswith(f".{name}")]
        strange = [full for full in own if full not in known] if own else [name]
        if strange:
            raise ValueError(
                f"{op}: target_parameters must name stacks of experts, got '{strange[0]}'; name layers in "
                "target_modules, and what is to be trained whole in modules_to_save"
            )
        found += own
    return sorted(set(found))


def _either(patterns: str | Iterable[str], names: Sequence[str]) -> str | list[str]:
    """Return patterns that take the names too: one expression if that is what they are."""
    if isinstance(patterns, str):
        return "|".join([f"(?:{patterns})", *map(re.escape, names)])
    return sorted({*patterns, *names})


def _targets(op: str, targets: Any, model: nn.Module, needed: bool) -> Any:
    """Return target_modules; None stands for PEFT's own choice for the model's type, and none where not `needed`."""
    if isinstance(targets, str):
        return "all-linear" if targets.lower() == "all-linear" else targets
    if targets is None and not needed:
        return []
    if targets is None:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICE

        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in CHOICE:
            raise ValueError(f'{op}: target_modules must name layers, or be "all-linear", got None for {kind}')
        targets = CHOICE[kind]
    return targets if isinstance(targets, str) else sorted(targets)
