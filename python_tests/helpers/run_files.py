"""Metrics and records of a run that never was."""

from __future__ import annotations

from typing import Any

KINDS = {"attention.self.query": 4, "attention.output.dense": 4, "intermediate.dense": 1, "output.dense": 1}


def ranks_of(*layers: int) -> dict[str, list[int]]:
    """One rank for every unit of a layer, in a small BERT-like model."""
    return {
        f"bert.encoder.layer.{layer}.{kind}": [rank] * units
        for layer, rank in enumerate(layers)
        for kind, units in KINDS.items()
    }


def metrics_of(**changes: Any) -> dict[str, Any]:
    steps = 40
    metrics: dict[str, Any] = {
        "method": "ard",
        "model": "tiny",
        "data": "toy.jsonl",
        "task": "classification",
        "labels": ["low", "high"],
        "seed": 0,
        "command": "python -m ardlora_ext finetune --out 'my run'",
        "config": {"r0": 4, "target_modules": "all-linear", "modules_to_save": ["classifier"]},
        "settings": {"out": "my run", "lr": 1e-3, "model": None},
        "controller": {"phase": "frozen", "price": 0.125},
        "steps": steps,
        "epochs": 2.0,
        "batch_size": 8,
        "train_examples": 160,
        "test_examples": 16,
        "metric_name": "accuracy",
        "metric_before": 0.5,
        "metric_after": 0.875,
        "loss_before": 0.7,
        "loss_after": 0.2,
        "params_live": 12345,
        "params_peak": 23456,
        "params_budget": 12500,
        "params_trainable": 13000,
        "params_total": 100000,
        "seconds": 12.5,
        "step_ms_median": 8.25,
        "tokens_per_s": 4321.0,
        "peak_rss_mb": 512.0,
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "history": [
            {"step": s, "loss": 1 / s, "lr": 1e-3, "mean_rank": 4, "params_live": 9, "tokens_per_s": 1.0}
            for s in range(1, steps + 1)
        ],
        "evals": [{"step": s, "loss": 0.5, "metric": 0.5 + s / 100, "examples": 16} for s in (0, 20, 40)],
        "ranks": ranks_of(1, 9),
        "rank_history": [
            {"step": 0, "params": 20000, "ranks": ranks_of(4, 4)},
            {"step": 10, "params": 23456, "ranks": ranks_of(3, 6)},
            {"step": 20, "params": 12345, "ranks": ranks_of(1, 9)},
        ],
    }
    return {**metrics, **changes}


def record(step: int, **changes: Any) -> dict[str, Any]:
    plain = {
        "step": step,
        "event": "grow",
        "module": "bert.encoder.layer.1.output.dense",
        "unit": 0,
        "from": 4,
        "to": 5,
    }
    return {**plain, "rho": 4.75, "gain": 0.00123456, "price": 0.5, "reason": "gain above price", **changes}
