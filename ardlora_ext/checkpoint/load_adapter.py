"""One more adapter of a wrapped model, from a folder of ours or of PEFT's."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ardlora_ext.checkpoint.load_peft import load_peft
from ardlora_ext.checkpoint.load_pretrained import load_pretrained
from ardlora_ext.config import AdapterConfig
from ardlora_ext.model.peft.convert import PeftLoraConfig
from ardlora_ext.model.several.named import add_resting


def load_adapter(
    model: nn.Module, directory: str | Path, adapter_name: str, config: AdapterConfig | PeftLoraConfig | None = None
) -> None:
    """Add an adapter from a checkpoint; it rests until `set_adapter`.

    Args:
        model: a wrapped model.
        directory: what `save_pretrained` wrote, or with a `config` any PEFT LoRA checkpoint.
        adapter_name: not in use yet.
        config: the method to go on with, see `load_peft`.

    Raises:
        FileNotFoundError, ValueError: as `load_pretrained` and `load_peft`; nothing has changed then.
    """

    def load() -> None:
        load_pretrained(model, directory) if config is None else load_peft(model, directory, config)

    add_resting(model, "load_adapter", adapter_name, load)
