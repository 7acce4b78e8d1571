"""What to adapt and how ranks are learned: one frozen dataclass per method, checked on construction."""

from ardlora_ext.config.ada import AdaConfig
from ardlora_ext.config.adapter import AdapterConfig, Granularity
from ardlora_ext.config.ard import ArdConfig
from ardlora_ext.config.dora import DoraConfig
from ardlora_ext.config.ela import ElaConfig
from ardlora_ext.config.lora import LoraConfig
from ardlora_ext.config.svd import SvdConfig

__all__ = [
    "AdaConfig",
    "AdapterConfig",
    "ArdConfig",
    "DoraConfig",
    "ElaConfig",
    "Granularity",
    "LoraConfig",
    "SvdConfig",
]
