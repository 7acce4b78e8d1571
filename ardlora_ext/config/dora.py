"""DoRA (arXiv:2402.09353), fixed rank with trained row norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ardlora_ext.config.adapter import AdapterConfig
from ardlora_ext.config.lora import LoraConfig


@dataclass(frozen=True, kw_only=True)
class DoraConfig(LoraConfig):
    """DoRA (arXiv:2402.09353): W' = m (W + (lora_alpha / r) B A) / ||W + (lora_alpha / r) B A||_row, m trained.

    Fixed rank as plain LoRA; a layer costs `out_features` parameters more, its magnitudes. Base layers need a dense
    floating-point weight.
    """

    inits: ClassVar[tuple[str, ...]] = AdapterConfig.inits
