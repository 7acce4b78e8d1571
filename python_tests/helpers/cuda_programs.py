"""The programs of csrc/testing and what they are made of."""

from __future__ import annotations

PTX = ("testing/ptx_main.cpp",)
PROGRAMS = {
    "resize": (
        "testing/rank_resize_main.cpp",
        "cuda/launch.cu",
        "cuda/device_facts.cpp",
        "cuda/resize_table.cpp",
        "core/rank_resize.cpp",
    ),
    "controller": (
        "testing/controller_main.cpp",
        "cuda/controller.cu",
        "cuda/row_table.cpp",
        "core/regularizer.cpp",
    ),
    "lora": (
        "testing/lora_main.cpp",
        "cuda/lora_linear.cu",
        "cuda/gemm_plan.cpp",
        "cuda/segment_table.cpp",
        "core/lora_checks.cpp",
        "core/philox.cpp",
        "core/unit_table.cpp",
    ),
}
