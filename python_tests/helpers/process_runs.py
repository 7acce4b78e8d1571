"""Methods whose ranks move within a run of a few steps in several processes."""

from __future__ import annotations

import ardlora_ext as ard
from ardlora_ext.config import AdapterConfig

STEPS = 24
BATCH = 8

_common = {"head_dim": 8, "seed": 3}
ARD = {
    "mode": "paper",
    "granularity": "head",
    "r0": 2,
    "r_max": 4,
    "update_interval": 2,
    "lr_alpha": 0.1,
    "warmup_ratio": 0.05,
    "freeze_ratio": 0.2,
    **_common,
}
SVD = {"tinit": 2, "tfinal": 6, "deltaT": 3, "target_modules": "all-linear", "seed": 3}
HELD_OUT = ("ard-bilevel", "ard-auto")  # those that look at held-out batches
METHODS: dict[str, AdapterConfig] = {
    "ard-secant": ard.ArdConfig(**ARD),
    "ard-bilevel": ard.ArdConfig(**ARD),
    "ard-tangent": ard.ArdConfig(slope="tangent", **ARD),
    "ard-anneal": ard.ArdConfig(r0=2, update_interval=2, warmup_ratio=0.05, freeze_ratio=0.2, **_common),
    "ard-auto": ard.ArdConfig(
        r0=2, budget="auto", tolerance=0.3, update_interval=2, warmup_ratio=0.05, freeze_ratio=0.2, **_common
    ),
    "elalora": ard.ElaConfig(r=4, r_max=8, k=2, b=3, **SVD),
    "adalora": ard.AdaConfig(init_r=4, target_r=2, **SVD),
    "adalora-removal": ard.AdaConfig(init_r=4, target_r=2, removal=True, **SVD),
}
