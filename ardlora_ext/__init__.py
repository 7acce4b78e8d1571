"""LoRA fine-tuning whose ranks are learned during training, on native kernels.

import ardlora_ext as ard
model = ard.wrap(model, ard.ArdConfig(r0=8))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
controller = ard.attach(model, optimizer, total_steps=1000)
...                                    # any training loop
ard.save_pretrained(model, "out/")     # a plain PEFT LoRA checkpoint
"""

from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

# A source checkout finds the compiled core of the installed package.
__path__ = extend_path(__path__, __name__)

from ardlora_ext.checkpoint.load_adapter import load_adapter
from ardlora_ext.checkpoint.load_peft import load_peft
from ardlora_ext.checkpoint.load_pretrained import load_pretrained
from ardlora_ext.checkpoint.save_pretrained import save_pretrained
from ardlora_ext.checkpoint.training_state import load_state, save_state
from ardlora_ext.checkpoint.wrap import wrap
from ardlora_ext.config import AdaConfig, AdapterConfig, ArdConfig, DoraConfig, ElaConfig, LoraConfig
from ardlora_ext.distributed.fully_shard import fully_shard
from ardlora_ext.distributed.replicate import replicate
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.frozen import frozen_copy
from ardlora_ext.model.gradient_start import init_from_gradients
from ardlora_ext.model.inject import unwrap
from ardlora_ext.model.merge import merge, merge_adapter, unmerge_adapter
from ardlora_ext.model.parameters import ParametersReport, parameters_report
from ardlora_ext.model.record import adapters
from ardlora_ext.model.several.named import (
    active_adapter,
    adapter_names,
    add_adapter,
    delete_adapter,
    disable_adapter,
    set_adapter,
)
from ardlora_ext.model.several.weighted import add_weighted_adapter
from ardlora_ext.native.compiled import VERSION as __version__
from ardlora_ext.ranks.attach import attach
from ardlora_ext.ranks.compress import Compression, compress
from ardlora_ext.ranks.controllers.ard.anneal import AnnealController
from ardlora_ext.ranks.controllers.ard.controller import ArdController
from ardlora_ext.ranks.controllers.base import Controller
from ardlora_ext.ranks.controllers.svd.ada import AdaController
from ardlora_ext.ranks.controllers.svd.ela import ElaController
from ardlora_ext.ranks.frontier import Point, frontier, smallest_within
from ardlora_ext.ranks.optimizer import loraplus_param_groups
from ardlora_ext.ranks.resize import RankUpdate, UnitUpdate
from ardlora_ext.ranks.svd_prune import svd_prune

if TYPE_CHECKING:
    from ardlora_ext.train.callback import RankCallback

__all__ = [
    "AdaConfig",
    "AdaController",
    "AdapterConfig",
    "AnnealController",
    "ArdConfig",
    "ArdController",
    "Compression",
    "Controller",
    "DoraConfig",
    "ElaConfig",
    "ElaController",
    "LoraConfig",
    "LoraLinear",
    "ParametersReport",
    "Point",
    "RankCallback",
    "RankUpdate",
    "UnitUpdate",
    "__version__",
    "active_adapter",
    "adapter_names",
    "adapters",
    "add_adapter",
    "add_weighted_adapter",
    "attach",
    "compress",
    "delete_adapter",
    "disable_adapter",
    "frontier",
    "frozen_copy",
    "fully_shard",
    "init_from_gradients",
    "load_adapter",
    "load_peft",
    "load_pretrained",
    "load_state",
    "loraplus_param_groups",
    "merge",
    "merge_adapter",
    "parameters_report",
    "replicate",
    "save_pretrained",
    "save_state",
    "set_adapter",
    "smallest_within",
    "svd_prune",
    "unmerge_adapter",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import `RankCallback` when it is asked for: it takes transformers' Trainer machinery with it."""
    if name == "RankCallback":
        from ardlora_ext.train.callback import RankCallback

        return RankCallback
    raise AttributeError(f"module 'ardlora_ext' has no attribute '{name}'")
