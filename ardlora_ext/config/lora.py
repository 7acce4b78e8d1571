"""Plain LoRA (arXiv:2106.09685), the fixed-rank baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ardlora_ext.config.adapter import AdapterConfig
from ardlora_ext.config.checks import require


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """Plain LoRA (arXiv:2106.09685): one fixed rank, W' = W + (lora_alpha / r) B A.

    Attributes:
        r: rank. Default as in PEFT.
    """

    inits: ClassVar[tuple[str, ...]] = (*AdapterConfig.inits, "pissa")

    r: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r >= 1, f"LoraConfig: r must be >= 1, got {self.r}")

    @property
    def initial_rank(self) -> int:
        return self.r

    def limit(self, name: str) -> int:
        return self.start_rank(name)
