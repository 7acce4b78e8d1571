"""The tasks of `finetune`: the columns that each reads, and the number that scores it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

Task = Literal["classification", "regression", "token-classification", "lm", "sft"]
TASKS: tuple[Task, ...] = get_args(Task)

COLUMNS: dict[Task, tuple[tuple[str, ...], ...]] = {  # the first of several sets that is there
    "classification": (("text", "label"),),
    "regression": (("text", "label"),),
    "token-classification": (("tokens", "tags"),),
    "lm": (("text",),),
    "sft": (("messages",), ("prompt", "completion"), ("text",)),
}
OPTIONAL = ("text_pair",)
NAMES = tuple(dict.fromkeys(name for sets in COLUMNS.values() for names in sets for name in names)) + OPTIONAL

METRICS: dict[Task, str] = {
    "classification": "accuracy",
    "regression": "correlation",
    "token-classification": "accuracy",
    "lm": "perplexity",
    "sft": "perplexity",
}


def metric_of(task: Task, metrics: Mapping[str, float]) -> tuple[float, float]:
    """Return loss and metric of an evaluation by Trainer."""
    loss, name = metrics["eval_loss"], METRICS[task]
    return loss, math.exp(min(loss, 700.0)) if name == "perplexity" else metrics[f"eval_{name}"]
