"""Let a controller follow an optimizer: two hooks, nothing else to call in the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ardlora_ext import resize
from ardlora_ext.controllers import Controller, make_controller
from ardlora_ext.inject import adapters, check_unmerged, injection
from ardlora_ext.optim import check_optimizer, settle_loss_scale, unwrapped

_SHARDED = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def attach(
    model: nn.Module,
    optimizer: Any,
    total_steps: int | None = None,
    holdout: Callable[[], torch.Tensor] | None = None,
) -> Controller[Any]:
    """Let ranks follow the gradients that `optimizer` steps on.

    A pre-step hook reads the gradients (accumulated, unscaled and clipped by then), a post-step hook changes ranks, so
    any loop works: raw, Trainer, Accelerate, Lightning. A wrapped plain LoRA gets a controller that changes nothing.

    Args:
        model: a model that `wrap` or `load_pretrained` prepared.
        optimizer: a torch optimizer that holds all adapter parameters: Adam, AdamW, SGD or another with one moment per
            weight.
        total_steps: optimizer steps of the run, when the config does not say; ARD freezes ranks in the last part.
        holdout: returns the loss of a held-out batch; ARD then learns alpha on those (bilevel, first order) at the
            price of one more forward and backward per step, instead of on the training batch.

    Returns:
        The controller: `ranks()`, `records`, `summary()`, `state_dict()`.

    Raises:
        ValueError: the model is not wrapped or already attached, or the optimizer cannot follow rank changes.
        TypeError: not an optimizer.
    """
    if type(model).__name__ in _SHARDED:
        raise ValueError(
            f"attach: model must not be inside {type(model).__name__}, which keeps its own view of the parameters; "
            "pass the module before it was wrapped and train on one process"
        )
    record = injection(model)
    if record.controller is not None:
        raise ValueError("attach: model must not be attached already")
    if record.config.init == "gradient" and not record.started:
        raise ValueError(
            "attach: init='gradient' must get its directions first: call "
            "ardlora_ext.init_from_gradients(model, batches, loss_fn)"
        )
    torch_optimizer = unwrapped(optimizer)
    layers = adapters(model)
    for name, layer in layers.items():
        check_unmerged("attach", name, layer)
    named = [(f"{n}.{f}", p) for n, layer in layers.items() for f, p in layer.trained.items()]
    check_optimizer(torch_optimizer, named)

    controller = make_controller(model, record.config, total_steps, holdout)
    if record.controller_state:
        controller.load_state_dict(record.controller_state)

    def apply(update: resize.RankUpdate) -> None:
        resize.apply(model, update, torch_optimizer)
        controller.applied()

    skipped = False

    def observe(optimizer: Optimizer) -> None:
        nonlocal skipped
        skipped = settle_loss_scale(optimizer)
        if not skipped:
            controller.observe()

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            observe(optimizer)
            return None

        def observed() -> Any:  # a closure makes the gradients inside the step
            loss = closure()
            observe(optimizer)
            return loss

        return ((args[0], observed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": observed})

    def after(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        update = None if skipped else controller.propose()
        if update is not None:
            apply(update)

    first = controller.start()
    if first is not None:
        apply(first)
    controller.applied()
    controller.apply = apply
    controller.handles = [
        torch_optimizer.register_step_pre_hook(before),
        torch_optimizer.register_step_post_hook(after),
    ]
    record.controller = controller
    return controller
