"""Let a controller follow an optimizer: two hooks, nothing else to call in the training loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ardlora_ext import resize, world
from ardlora_ext.config import LoraConfig
from ardlora_ext.controllers import Controller, make_controller
from ardlora_ext.distributed import bare, check_placement, check_running
from ardlora_ext.inject import adapters, check_unmerged, injection
from ardlora_ext.optim import check_optimizer, settle_loss_scale, unwrapped


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
        model: a model that `wrap` or `load_pretrained` prepared, also inside DistributedDataParallel, or after
            `fully_shard` or `replicate`. With several processes each of them attaches, and every rank change is
            compared before it is made.
        optimizer: a torch optimizer that holds all adapter parameters: Adam, AdamW, SGD or another with one moment per
            weight.
        total_steps: optimizer steps of the run, when the config does not say; ARD freezes ranks in the last part.
        holdout: returns the loss of a held-out batch; ARD then learns alpha on those (bilevel, first order) at the
            price of one more forward and backward per step, instead of on the training batch.

    Returns:
        The controller: `ranks()`, `records`, `summary()`, `state_dict()`.

    Raises:
        ValueError: the model is not wrapped or already attached, inside a wrapper that cannot follow rank changes, or
            the optimizer cannot.
        TypeError: not an optimizer.
    """
    wrapper, model = model, bare(model)
    record = injection(model)
    if record.controller is not None:
        raise ValueError("attach: model must not be attached already")
    if record.config.init == "gradient" and not record.started:
        raise ValueError(
            "attach: init='gradient' must get its directions first: call "
            "ardlora_ext.init_from_gradients(model, batches, loss_fn)"
        )
    torch_optimizer = unwrapped(optimizer)
    check_placement(model)
    layers = adapters(model)
    for name, layer in layers.items():
        check_unmerged("attach", name, layer)
    named = [(f"{n}.{f}", p) for n, layer in layers.items() for f, p in layer.trained.items()]
    check_optimizer(torch_optimizer, named)

    controller = make_controller(model, record.config, total_steps, holdout)
    if record.controller_state:
        controller.load_state_dict(record.controller_state)

    controller.processes = getattr(wrapper, "process_group", None) if record.sync is None else record.sync.group
    device = next(iter(layers.values())).lora_A.device
    moves = not isinstance(record.config, LoraConfig)

    def apply(update: resize.RankUpdate | None) -> None:
        if moves and world.initialised():  # compared even if there is none here: another process may have one
            plan = json.dumps(None if update is None else update.to_json())
            world.agree(f"rank change after step {controller.step}", plan, device, controller.processes)
        if update is not None:
            resize.apply(model, update, torch_optimizer)
            controller.applied()

    skipped = False

    def observe(optimizer: Optimizer) -> None:
        nonlocal skipped
        check_running(wrapper)
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
        apply(None if skipped else controller.propose())

    apply(controller.start())
    controller.applied()
    controller.apply = apply
    controller.handles = [
        torch_optimizer.register_step_pre_hook(before),
        torch_optimizer.register_step_post_hook(after),
    ]
    record.controller = controller
    return controller
